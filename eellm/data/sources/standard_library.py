"""The source code of the interpreter's own standard library: text that every machine has."""

from __future__ import annotations

import fnmatch
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from eellm.config.schema import DataConfig
from eellm.data.sources.document import Document
from eellm.data.sources.files import NamedFile, files_under, reading

# Installed packages are not part of the library, and what the build machine wrote into generated files would make the
# corpus differ between machines with the same interpreter.
_FOLDERS_LEFT_OUT = ("site-packages", "dist-packages", "__pycache__", "config-*")
_TESTS = ("test", "tests", "idle_test")
_FILES_LEFT_OUT = ("_sysconfigdata*", "sitecustomize.py")


def files(data: DataConfig) -> list[NamedFile]:
    left_out = _FOLDERS_LEFT_OUT if data.include_tests else (*_FOLDERS_LEFT_OUT, *_TESTS)
    return files_under(data, Path(sysconfig.get_path("stdlib")), lambda root: _modules(root, left_out))


def documents(data: DataConfig) -> Iterator[Document]:
    for name, path in files(data):
        with reading(path):
            content = path.read_bytes()
        try:
            yield Document(name, content.decode())
        except UnicodeDecodeError:
            continue  # a few modules declare an older encoding


def _modules(root: Path, folders_left_out: tuple[str, ...]) -> Iterator[Path]:
    for folder, folders, names in os.walk(root):
        # in place: os.walk then does not descend, and an interpreter's site-packages can be huge
        folders[:] = [name for name in folders if not _matches(name, folders_left_out)]
        for name in names:
            if name.endswith(".py") and not _matches(name, _FILES_LEFT_OUT):
                yield Path(folder, name)


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
