"""The formats of a packed model, as its quantization_config and the command line name them. No torch here."""

from typing import Any, Literal

from tenfold.errors import TenfoldError
from tenfold.parsed import Parsed

QUANT_METHOD = "tenfold"
FORMAT_VERSION = 1

ExpertsFormat = Literal["bf16", "q8", "q4", "mxfp4"]
RestFormat = Literal["bf16", "q8", "q4"]


class Packing(Parsed):
    """The formats of a packed model's matrices; norms, biases and routers stay floating point."""

    experts: ExpertsFormat = "q4"
    rest: RestFormat = "q8"

    def to_hf(self) -> dict[str, Any]:
        """Its quantization_config."""
        return {"quant_method": QUANT_METHOD, "format_version": FORMAT_VERSION, **self.model_dump()}


def packing_of(raw: dict[str, Any], source: str) -> Packing | None:
    """How the model of a config.json is packed; None if it is not.

    Raises TenfoldError for a format version or a format that this tenfold does not know.
    """
    given = raw.get("quantization_config")
    if not isinstance(given, dict) or given.get("quant_method") != QUANT_METHOD:
        return None
    source = f"{source}: quantization_config"
    version = given.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:
        raise TenfoldError(
            f"{source} format_version is {version!r:.50}, and this tenfold reads only {FORMAT_VERSION}:"
            " pack the model again, or install the tenfold that packed it"
        )
    formats = {name: value for name, value in given.items() if name in Packing.model_fields}
    if missing := Packing.model_fields.keys() - formats.keys():
        raise TenfoldError(f"{source} lacks field {min(missing)}")
    return Packing.parse(formats, source)
