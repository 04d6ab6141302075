"""The cache of tokenizers and tokenised corpora: files named by a hash of what they were made from.

Everything appears under its final name in one rename, so that a reader never sees half of it and processes that
build the same thing at the same time do not disturb each other.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from eellm.config.schema import DataConfig
from eellm.errors import DataError, writing


def cache_root(data: DataConfig) -> Path:
    """Folder of the cache, made if needed; `~` and environment variables in data.cache_dir are expanded."""
    root = Path(os.path.expandvars(data.cache_dir)).expanduser().absolute()
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"data.cache_dir={data.cache_dir}: cannot make the folder {root} ({error.strerror}).") from error
    return root


def cache_key(*parts: object) -> str:
    """Name under which something made from `parts` (JSON values) is kept."""
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=10).hexdigest()


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file that is there whole or not at all; text as UTF-8. Raises WriteError."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content.encode() if isinstance(content, str) else content)
            # mkstemp's files are for the owner alone; a cache may be shared
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except OSError:
            os.unlink(temporary)
            raise


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder to fill; it becomes `path` on leaving, unless another process was first or filling it failed.

    An OSError while it is filled counts as one of writing: WriteError.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
        try:
            yield temporary
            temporary.chmod(0o755)
            try:
                os.rename(temporary, path)
            except OSError:
                if not path.is_dir():
                    raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
