"""`tenfold compare`: three models, one report, in the names that machines read."""

import json
import re
from pathlib import Path

import pytest
from markupsafe import escape

from tenfold.compare import compare
from tenfold.errors import TenfoldError
from tenfold.report.verdict import judge, reached, speedup
from tenfold.train import train
from tenfold.train.settings import TrainSettings

MODEL_FIELDS = {
    "total_params",
    "active_params",
    "tokens",
    "train_flops",
    "train_seconds",
    "train_tokens_per_second",
    "val_bits_per_byte",
    "weight_bytes_per_token",
    "decode_tokens_per_second",
    "path",
}


@pytest.fixture(scope="module")
def compared(tiny: TrainSettings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("compared") / "out"
    compare(tiny, out, resume=False)
    return out


@pytest.fixture(scope="module")
def report(compared: Path) -> dict:
    return json.loads((compared / "report.json").read_text())


def test_report_json_has_the_stable_names(report: dict) -> None:
    assert report["seconds"] > 0
    assert list(report["models"]) == ["sparse", "dense_active", "dense_total"]
    for model in report["models"].values():
        assert model.keys() >= MODEL_FIELDS
        assert Path(model["path"]).is_dir()


def test_twins_are_twins(report: dict) -> None:
    sparse, active, total = report["models"].values()
    assert active["total_params"] == pytest.approx(sparse["active_params"], rel=0.02)
    assert total["total_params"] == pytest.approx(sparse["total_params"], rel=0.02)
    assert sparse["tokens"] == active["tokens"] == total["tokens"]
    assert sparse["train_flops"] == pytest.approx(active["train_flops"], rel=0.05)


def test_every_axis_has_a_sentence_and_the_experts_are_shown(report: dict) -> None:
    assert report["verdicts"].keys() == {"quality", "time", "cost"}
    experts = report["experts"]
    assert len(experts["load"]) == len(experts["layers"]) == 1
    for load in experts["load"]:
        assert sum(load) / len(load) == pytest.approx(1)
    assert report["speedup_to_equal_loss"]["dense_active"].keys() == {"tokens", "flops", "seconds"}


def test_the_page_is_self_contained(compared: Path, report: dict) -> None:
    page = (compared / "report.html").read_text()
    assert page.count("<svg") == 4
    namespaces = ("http://www.w3.org/", "http://purl.org/", "http://creativecommons.org/")
    links = re.findall(r"https?://[^\s\"'<>]+", page)
    assert all(link.startswith(namespaces) for link in links)
    assert not re.search(r"<script|<link|src=|@import", page)
    for sentence in report["verdicts"].values():
        assert escape(sentence) in page
    assert (compared / "sample.txt").read_text().startswith(report["sample"]["prompt"])


def test_text_from_outside_is_escaped(report: dict) -> None:
    from tenfold.report.page import render

    hostile = report | {"sample": {"prompt": "<b>", "text": "<script>alert(1)</script>"}}
    assert "<script" not in render(hostile)


def test_trained_models_are_taken(compared: Path, report: dict, tiny: TrainSettings, tmp_path: Path) -> None:
    taken = {name: compared / name for name in ("sparse", "dense_total")}
    again = compare(tiny, tmp_path / "again", resume=False, taken=taken)
    assert again["models"]["sparse"]["curve"] == report["models"]["sparse"]["curve"]
    assert sorted(p.name for p in (tmp_path / "again").iterdir() if p.is_dir()) == ["dense_active"]
    new, old = again["models"]["dense_active"], report["models"]["dense_active"]
    assert new["val_bits_per_byte"] == old["val_bits_per_byte"]


def test_runs_that_are_no_twins_are_refused(compared: Path, tiny: TrainSettings, tmp_path: Path) -> None:
    with pytest.raises(TenfoldError, match=r"dense_total.*not within 2% .* dense_active must have"):
        compare(tiny, tmp_path / "a", False, {"dense_active": compared / "dense_total"})
    other = tiny.model_copy(update={"seed": 1})
    train(other, tmp_path / "seeded", resume=False)
    with pytest.raises(TenfoldError, match="seed"):
        compare(tiny, tmp_path / "b", False, {"sparse": tmp_path / "seeded"})
    with pytest.raises(TenfoldError, match="no finished training run"):
        compare(tiny, tmp_path / "c", False, {"sparse": tmp_path / "nothing"})


def test_a_full_folder_is_refused_and_resume_goes_on(
    compared: Path, tiny: TrainSettings, report: dict
) -> None:
    with pytest.raises(TenfoldError, match="--resume"):
        compare(tiny, compared, resume=False)
    again = compare(tiny, compared, resume=True)
    assert again["models"]["sparse"]["curve"] == report["models"]["sparse"]["curve"]


def test_what_cannot_be_compared_is_refused(tiny: TrainSettings, tmp_path: Path) -> None:
    sizes = tiny.model.model_dump(exclude_none=True)
    dense = {"num_experts": 0, "num_experts_per_tok": 0, "moe_intermediate_size": 0}
    for change, words in ((dense, "sparse model"), ({"router": "expert_choice"}, "future")):
        changed = TrainSettings.model_validate(tiny.model_dump() | {"model": sizes | change})
        with pytest.raises(TenfoldError, match=words):
            compare(changed, tmp_path / "x", resume=False)


def curve(*points: tuple[float, float]) -> list[dict[str, float]]:
    return [{"seconds": x, "bits_per_byte": y} for x, y in points]


def test_speedup_reads_the_curves_at_equal_loss() -> None:
    fast = {"val_bits_per_byte": 1.0, "curve": curve((10, 3.0), (20, 2.0), (30, 1.0))}
    slow = {"val_bits_per_byte": 1.5, "curve": curve((10, 3.5), (50, 1.5))}
    assert reached(fast["curve"], 1.5, "seconds") == pytest.approx(25)
    assert speedup(fast, slow, "seconds") == pytest.approx(50 / 25)
    assert speedup(slow, fast, "seconds") == pytest.approx(25 / 50)
    assert reached(fast["curve"], 5.0, "seconds") == 10


def model_with(bits: float, flops: float, **fields: float) -> dict:
    points = [
        {"tokens": t, "flops": t * flops, "seconds": t * fields["pace"], "bits_per_byte": bits + 2 - 2 * t}
        for t in (0.25, 0.5, 0.75, 1.0)
    ]
    return {
        "val_bits_per_byte": bits,
        "curve": points,
        "tokens": 1000,
        "train_flops": flops,
        "train_tokens_per_second": 1 / fields["pace"],
        "weight_bytes_per_token": fields["size"],
        "decode_tokens_per_second": fields["speed"],
    }


def test_the_sentences_say_so_where_sparse_loses() -> None:
    models = {
        "sparse": model_with(1.5, 1.0, pace=2.0, size=1e6, speed=50),
        "dense_active": model_with(1.4, 1.0, pace=1.0, size=1e6, speed=100),
        "dense_total": model_with(1.2, 4.0, pace=4.0, size=4e6, speed=80),
    }
    verdicts = judge(models)["verdicts"]
    assert (
        "Sparse lost against the dense twin of equal active parameters (1.4000): 7.1% more"
        in (verdicts["quality"])
    )
    assert "the twin reaches its final loss with 1.05x fewer tokens" in verdicts["quality"]
    assert "sparse lost against the equal-active twin, with 2.11x more time" in verdicts["time"]
    assert "Sparse won on bytes" in verdicts["cost"] and "4.00x fewer" in verdicts["cost"]
    assert "Sparse lost on the clock" in verdicts["cost"]


def test_the_sentences_say_so_where_sparse_wins() -> None:
    models = {
        "sparse": model_with(1.2, 1.0, pace=1.0, size=1e6, speed=90),
        "dense_active": model_with(1.4, 1.0, pace=1.0, size=1e6, speed=100),
        "dense_total": model_with(1.2, 4.0, pace=4.0, size=4e6, speed=25),
    }
    verdicts = judge(models)["verdicts"]
    assert (
        "Sparse won against the dense twin of equal active parameters (1.4000): 14.3% fewer"
        in (verdicts["quality"])
    )
    assert "it reaches the twin's final loss with 1.11x fewer tokens" in verdicts["quality"]
    assert "sparse won against the equal-total twin, with 4.00x less time" in verdicts["time"]
    assert "Sparse won on the clock" in verdicts["cost"] and "shows less" not in verdicts["cost"]


def test_a_sigmoid_router_with_bias_is_compared_too(tiny: TrainSettings, tmp_path: Path) -> None:
    """The dense twins have no bias to update; every balance loss may be off."""
    off = {"balance_loss": 0.0, "z_loss": 0.0, "bias_update_rate": 0.01, "tokens": 3 * 4 * 32}
    sizes = tiny.model.model_dump(exclude_none=True) | {"router": "sigmoid", "n_shared_experts": 1}
    changed = TrainSettings.model_validate(tiny.model_dump() | off | {"model": sizes})
    report = compare(changed, tmp_path / "out", resume=False)
    assert report["models"]["sparse"]["saved_as"] == "Glm4MoeForCausalLM"
