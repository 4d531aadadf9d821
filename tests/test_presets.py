"""Presets: published totals to the digit, the family they came from, and models built without memory."""

import time

import pytest
import torch

from tenfold.checkpoint.families import family_for
from tenfold.checkpoint.store import new_model
from tenfold.errors import TenfoldError
from tenfold.presets import load_preset, preset_names

PUBLISHED = {
    "mixtral-8x7b": (46_702_792_704, 12_879_925_248, 12_748_853_248),
    "mixtral-8x22b": (140_620_634_112, 39_152_031_744, 38_955_423_744),
    "deepseek-v2-lite": (15_706_484_224, 2_661_150_208, 2_451_435_008),
    "deepseek-v2": (235_741_434_880, 21_375_800_320, 20_851_512_320),
    "deepseek-v3": (671_026_419_200, 37_552_297_472, 36_625_618_432),
    "gpt-oss-20b": (20_914_757_184, 4_187_440_704, 3_608_307_264),
    "gpt-oss-120b": (116_829_156_672, 5_711_982_912, 5_132_849_472),
    "olmoe-1b-7b": (6_919_161_856, 1_282_017_280, 1_178_994_688),
    "qwen3-30b-a3b": (30_532_122_624, 3_353_032_704, 3_041_867_776),
    "qwen1.5-moe-a2.7b": (14_315_784_192, 2_689_173_504, 2_378_008_576),
    "granite-3.0-1b-a400m": (1_334_628_352, 428_658_688, 428_658_688),
    "llama-3.2-1b": (1_235_814_400, 1_235_814_400, 1_235_814_400),
    "mistral-7b": (7_241_732_096, 7_241_732_096, 7_110_660_096),
    "qwen3-0.6b": (596_049_920, 596_049_920, 596_049_920),
    "smollm2-135m": (134_515_008, 134_515_008, 134_515_008),
    "switch-base-8": (619_339_008, 222_977_280, 222_977_280),
    "switch-base-16": (1_072_397_568, 223_051_008, 223_051_008),
    "switch-base-32": (1_978_514_688, 223_198_464, 223_198_464),
    "switch-base-64": (3_790_748_928, 223_493_376, 223_493_376),
    "switch-base-128": (7_415_217_408, 224_083_200, 224_083_200),
    "switch-base-256": (14_664_154_368, 225_262_848, 225_262_848),
    "switch-large-128": (26_309_291_008, 740_813_824, 740_813_824),
    "switch-c-2048": (1_571_308_972_448, 1_728_326_048, 1_728_326_048),
}
"""Total, active with and without the input embedding (the same where it is tied to the head)."""


@pytest.mark.parametrize(("name", "totals"), PUBLISHED.items())
def test_published_totals(name: str, totals: tuple[int, int, int]) -> None:
    config = load_preset(name)
    active = config.num_active_params(), config.num_active_params(input_embedding=False)
    assert (config.num_params(), *active) == totals


@pytest.mark.parametrize("name", preset_names())
def test_presets_build_in_two_seconds_without_memory(name: str) -> None:
    config = load_preset(name)
    start = time.monotonic()
    with torch.device("meta"):
        model = new_model(config)
    assert time.monotonic() - start < 2
    tensors = [*model.parameters(), *model.buffers()]
    assert all(tensor.is_meta for tensor in tensors)
    assert sum(tensor.numel() for tensor in tensors) == config.num_params() + config.mtp_params()


@pytest.mark.parametrize("name", preset_names())
def test_presets_save_as_the_family_they_were_published_as(name: str) -> None:
    config = load_preset(name)
    assert family_for(config).model_type == config.model_type != "tenfold"


def test_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(TenfoldError, match=r"olmoe-1b \(did you mean olmoe-1b-7b\?\).*qwen3-30b-a3b"):
        load_preset("olmoe-1b")
