"""Published configs by name. Each file is the config.json of the repository its `_source` names."""

from pathlib import Path

from tenfold.checkpoint import read_config
from tenfold.errors import TenfoldError, nearest
from tenfold.switch_config import AnyConfig

_HERE = Path(__file__).parent


def preset_names() -> list[str]:
    return sorted(path.stem for path in _HERE.glob("*.json"))


def load_preset(name: str) -> AnyConfig:
    """The config of a preset; an unknown name is a TenfoldError that lists the known ones."""
    names = preset_names()
    if name not in names:
        raise TenfoldError(f"unknown preset {name}{nearest(name, names)}; known: {', '.join(names)}")
    return read_config(_HERE / f"{name}.json")[1]
