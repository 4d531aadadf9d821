"""A sparse model beside its two dense twins, on three axes, none hidden."""

import time
from pathlib import Path
from typing import Any

from tenfold import specialization
from tenfold.checkpoint import load_config, load_decoder_only
from tenfold.config import ModelConfig
from tenfold.device import pick_device, pick_precision
from tenfold.engine.generation import Generation
from tenfold.engine.meter import decode_tokens_per_second
from tenfold.errors import TenfoldError
from tenfold.files import write_json, write_text, writing
from tenfold.report.page import render
from tenfold.report.verdict import judge
from tenfold.sampling import SamplingParams
from tenfold.switch_config import decoder_only
from tenfold.train.data import TokenData, prepare, with_tokenizer
from tenfold.train.settings import TrainSettings, resolve_config
from tenfold.train.state import RunFolder
from tenfold.train.trainer import Trainer

WEIGHTS = "float32"
"""What the models are saved and measured in."""
DECODE_TOKENS = 128
SAMPLE_TOKENS = 160
SAMPLE_PROMPT_TOKENS = 24

Result = dict[str, Any]


def compare(
    settings: TrainSettings, out: Path, resume: bool, taken: dict[str, Path] | None = None
) -> dict[str, Any]:
    """Train (or take from run folders) the three models, measure them, and write the report.

    `taken` maps sparse, dense_active and dense_total to finished run folders. Returns what
    report.json holds. Raises TenfoldError if the runs do not compare like with like.
    """
    start = time.perf_counter()
    if out.exists() and not out.is_dir():
        raise TenfoldError(f"{out} is a file; --out names a folder")
    if not resume and out.exists() and any(out.iterdir()):
        raise TenfoldError(f"{out} is not empty: continue it with --resume, or choose another --out")
    if settings.init:
        raise TenfoldError("init: compare trains all three from the beginning; leave it out")
    pick_device(settings.device)
    results = {name: _taken_result(folder) for name, folder in (taken or {}).items()}
    sparse = _trained_config(results["sparse"]) if "sparse" in results else resolve_config(settings)
    three_configs(sparse)
    vocab_size = results["sparse"]["vocab_size"] if "sparse" in results else sparse.vocab_size
    data = prepare(settings.data, settings.tokenizer, vocab_size)
    configs = three_configs(with_tokenizer(sparse, data))
    _check_alike(results, configs, settings, data)
    for name, config in configs.items():
        if name not in results:
            results[name] = Trainer(config, settings, data, out / name, resume).run(name)
    models = {name: results[name] for name in configs}
    measured = _measure(models, data, settings.seq_len)
    report = {
        "seconds": time.perf_counter() - start,
        "resumed": resume or bool(taken),
        "decode_device": "cpu",
        "models": models,
        "weights": WEIGHTS,
        "data": settings.data,
        **measured,
        **judge(models),
    }
    _write(report, out)
    return report


def _trained_config(result: Result) -> ModelConfig:
    return decoder_only(load_config(result["path"]), result["path"])


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


def _taken_result(folder: Path) -> Result:
    if not (folder / "result.json").is_file():
        raise TenfoldError(f"{folder}: no finished training run is there (no result.json)")
    return RunFolder(folder).read_result()


def _check_alike(
    taken: dict[str, Result],
    configs: dict[str, ModelConfig],
    settings: TrainSettings,
    data: TokenData,
) -> None:
    """Before anything is trained: runs that were taken saw the same text, and are of twin sizes."""
    wanted = _same_for_all(settings, data)
    if len(taken) == len(configs):
        wanted = {field: taken["sparse"][field] for field in wanted} | {"data_key": data.key}
    for name, result in taken.items():
        for field, value in wanted.items():
            if field == "data_key" and result[field] != value:
                raise TenfoldError(
                    f"{result['path']}: trained on other text or with another tokenizer; name the same"
                    " --data and --tokenizer"
                )
            if result[field] != value:
                raise TenfoldError(f"{result['path']}: {field} is {result[field]!r}, not {value!r}")
        params = configs[name].num_params()
        if abs(result["total_params"] / params - 1) > 0.02:
            raise TenfoldError(
                f"{result['path']}: {result['total_params']:,} parameters are not within 2% of the"
                f" {params:,} that {name} must have"
            )


def _same_for_all(settings: TrainSettings, data: TokenData) -> dict[str, Any]:
    return {
        "data_key": data.key,
        "tokens": settings.steps * settings.step_tokens,
        "seq_len": settings.seq_len,
        "seed": settings.seed,
        "precision": pick_precision(settings.precision, pick_device(settings.device)),
    }


def _write(report: dict[str, Any], out: Path) -> None:
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    write_json(out / "report.json", report)
    write_text(out / "report.html", render(report))
    write_text(out / "sample.txt", report["sample"]["prompt"] + report["sample"]["text"])


def _measure(results: dict[str, Result], data: TokenData, seq_len: int) -> dict[str, Any]:
    """Add each saved model's cost of a token to `results`; return what the sparse one's experts do."""
    models = {name: load_decoder_only(Path(result["path"])) for name, result in results.items()}
    speeds = decode_tokens_per_second(models, DECODE_TOKENS)
    for name, model in models.items():
        results[name]["weight_bytes_per_token"] = model.config.weight_bytes_per_token(WEIGHTS)
        results[name]["decode_tokens_per_second"] = speeds[name]
    experts = specialization.measure(models["sparse"], data, seq_len)
    size = min(SAMPLE_PROMPT_TOKENS, models["sparse"].config.max_position_embeddings // 2)
    opening = data.valid[:size].tolist()
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
        "sample": {"prompt": data.tokenizer.decode(opening), "text": sample.text},
    }
