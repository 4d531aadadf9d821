"""A sparse model beside its two dense twins, on three axes, none hidden."""

import time
from pathlib import Path
from typing import Any

from tenfold import specialization
from tenfold.checkpoint import load_config, load_model
from tenfold.config import ModelConfig
from tenfold.engine.llm import Generation
from tenfold.engine.meter import decode_tokens_per_second
from tenfold.errors import TenfoldError
from tenfold.files import read_json, write_json, write_text
from tenfold.report.page import render
from tenfold.report.verdict import judge
from tenfold.sampling import SamplingParams
from tenfold.train.data import TokenData, prepare, with_tokenizer
from tenfold.train.settings import TrainSettings, resolve_config
from tenfold.train.trainer import Trainer

WEIGHTS = "float32"
"""What the models are saved and measured in."""
DECODE_TOKENS = 128
SAMPLE_TOKENS = 160


def compare(
    settings: TrainSettings, out: Path, resume: bool, taken: dict[str, Path] | None = None
) -> dict[str, Any]:
    """Train (or take from run folders) the three models, measure them, and write the report.

    `taken` maps sparse, dense_active and dense_total to finished run folders. Returns what
    report.json holds. Raises TenfoldError if the runs do not compare like with like.
    """
    start = time.perf_counter()
    if not resume and out.exists() and any(out.iterdir()):
        raise TenfoldError(f"{out} is not empty: continue it with --resume, or choose another --out")
    config = resolve_config(settings)
    three_configs(config)
    data = prepare(settings.data, settings.tokenizer, config.vocab_size)
    configs = three_configs(with_tokenizer(config, data))
    results = _results(configs, settings, data, out, resume, taken or {})
    report = {"seconds": 0.0, "models": results, "weights": WEIGHTS, "data": settings.data}
    report |= _measure(results, data, settings.seq_len)
    report |= judge(results)
    report["seconds"] = time.perf_counter() - start
    write_json(out / "report.json", report)
    write_text(out / "report.html", render(report))
    write_text(out / "sample.txt", report["sample"]["prompt"] + report["sample"]["text"])
    return report


def three_configs(sparse: ModelConfig) -> dict[str, ModelConfig]:
    """The sparse model and its twins. Raises TenfoldError for a model that cannot be compared."""
    if not sparse.is_sparse:
        raise TenfoldError("compare needs a sparse model: set model.num_experts above 0")
    if sparse.router == "expert_choice":
        raise TenfoldError(
            "router expert_choice cannot be compared: its experts see the future of the text they"
            " are scored on; use another router"
        )
    return {
        "sparse": sparse,
        "dense_active": sparse.dense_twin("active"),
        "dense_total": sparse.dense_twin("total"),
    }


def _results(
    configs: dict[str, ModelConfig],
    settings: TrainSettings,
    data: TokenData,
    out: Path,
    resume: bool,
    taken: dict[str, Path],
) -> dict[str, dict[str, Any]]:
    results = {name: _taken_result(folder) for name, folder in taken.items()}
    for name in [name for name in configs if name not in taken]:
        trainer = Trainer(configs[name], settings, data, out / name, resume)
        results[name] = trainer.run(name)
    _check_alike(results, data)
    for result in results.values():
        config = load_config(Path(result["path"]))
        result["weight_bytes_per_token"] = config.weight_bytes_per_token(WEIGHTS)
    return {name: results[name] for name in configs}


def _taken_result(folder: Path) -> dict[str, Any]:
    if not (folder / "result.json").is_file():
        raise TenfoldError(f"{folder}: no finished training run is there (no result.json)")
    return dict(read_json(folder / "result.json"))


def _check_alike(results: dict[str, dict[str, Any]], data: TokenData) -> None:
    """Twins are twins only on the same text, tokens and sizes."""
    sparse = results["sparse"]
    for name, result in results.items():
        if result["data_key"] != data.key:
            raise TenfoldError(f"{name} was trained on other data than {sparse['path']}")
        for field in ("tokens", "seq_len", "seed", "precision"):
            if result[field] != sparse[field]:
                raise TenfoldError(
                    f"{name}: {field} is {result[field]!r}, but {sparse[field]!r} in the sparse run"
                )
    for name, field in (("dense_active", "active_params"), ("dense_total", "total_params")):
        if abs(results[name]["total_params"] / sparse[field] - 1) > 0.02:
            raise TenfoldError(
                f"{name} has {results[name]['total_params']:,} parameters, not within 2% of the"
                f" sparse model's {field} {sparse[field]:,}"
            )


def _measure(
    results: dict[str, dict[str, Any]], data: TokenData, seq_len: int
) -> dict[str, Any]:
    """Decode speed of each saved model (added to `results`), and what the sparse one's experts do."""
    models = {name: load_model(Path(result["path"])) for name, result in results.items()}
    speeds = decode_tokens_per_second(models, DECODE_TOKENS)
    for name, speed in speeds.items():
        results[name]["decode_tokens_per_second"] = speed
    experts = specialization.measure(models["sparse"], data, seq_len)
    opening = data.tokenizer.decode(data.valid[1:25].tolist())
    params = SamplingParams(max_tokens=SAMPLE_TOKENS, temperature=0.7, top_p=0.9, seed=0)
    sample = Generation(models["sparse"], data.tokenizer, opening, params)
    sample.finish()
    return {
        "experts": {
            "layers": experts.layers,
            "kinds": list(specialization.KINDS),
            "load": experts.load,
            "preference": experts.preference,
            "strongest": [experts.strongest(i) for i in range(len(experts.layers))],
        },
        "sample": {"prompt": opening, "text": sample.text},
    }
