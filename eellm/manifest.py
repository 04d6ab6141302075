"""What makes a checkpoint folder whole: a manifest of its files and their sizes, written last.

Reading it takes milliseconds and no torch, so that a broken or foreign checkpoint is refused before any rank starts.
"""

from __future__ import annotations

import json
from pathlib import Path

from eellm.data.cache import write_atomically

MANIFEST = "eellm.json"

FORMAT = 1
"""Raised whenever the contents of a checkpoint change their meaning."""


def write_manifest(folder: Path) -> None:
    """Declare a folder whole as it is now. Raises WriteError."""
    files = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    write_atomically(folder / MANIFEST, json.dumps({"format": FORMAT, "files": files}, indent=2) + "\n")


def fault(folder: Path) -> str | None:
    """What is wrong with a checkpoint folder (what was looked for, what was found), or None if it is whole."""
    if not folder.is_dir():
        return f"looked for the folder {folder}, found {'a file' if folder.exists() else 'nothing'}"
    path = folder / MANIFEST
    if not path.is_file():
        return f"not a whole checkpoint of eellm: looked for {path}, found {listing(folder)}"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        format_, files = manifest["format"], dict(manifest["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{path} cannot be read ({error or type(error).__name__})"
    if format_ != FORMAT:
        return f"{path} says format {format_}; this version of eellm reads format {FORMAT}"
    for name, size in files.items():
        file = folder / name
        if not file.is_file():
            return f"looked for {file}, found {listing(folder)}"
        if file.stat().st_size != size:
            return f"{file} has {file.stat().st_size} bytes instead of {size}"
    return None


def listing(folder: Path) -> str:
    """The first few names in a folder, for messages."""
    return ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "nothing"
