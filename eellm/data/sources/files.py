"""The files of a corpus: which ones, their content, and what can go wrong with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from eellm.config.paths import expanded
from eellm.config.schema import DataConfig
from eellm.data.sources.document import check_memory
from eellm.errors import DataError

NamedFile = tuple[str, Path]
"""Name inside the corpus, path."""


def files_under(data: DataConfig, root: Path, chosen: Callable[[Path], Iterator[Path]]) -> list[NamedFile]:
    """The root itself where it is a file, else the files chosen in it, sorted by name. Raises DataError when there are none."""
    if root.is_file():
        return [(root.name, root)]
    files = sorted((path.relative_to(root).as_posix(), path) for path in chosen(root))
    if not files:
        raise DataError(f"data.source={data.source}: {root} has no files. Check data.path and data.pattern={data.pattern}.")
    return files


def given_files(data: DataConfig) -> list[NamedFile]:
    """The file that data.path names, or those of the folder that match data.pattern."""
    return files_under(data, given_path(data), lambda root: (path for path in root.glob(data.pattern) if path.is_file()))


def given_path(data: DataConfig) -> Path:
    """The file or folder that data.path names. Raises DataError when it is not there."""
    if not isinstance(data.path, str):
        raise DataError(f"data.source={data.source} needs data.path: a file or a folder.")
    root = expanded(data.path)
    if not root.exists():
        raise DataError(f"data.path={data.path}: there is no such file or folder ({root.absolute()}).")
    return root


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """What the system says when a file cannot be read, as a DataError with what to do about it."""
    try:
        yield
    except FileNotFoundError as error:
        raise DataError(
            f"{path}: the file was there when the corpus was listed and is gone. Put it back, or start again without it: "
            "what is prepared already is kept."
        ) from error
    except PermissionError as error:
        raise DataError(
            f"{path}: no permission to read it. Change that (chmod +r), or leave it out with data.pattern."
        ) from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}). Check the disk it lies on.") from error


def whole_text(path: Path) -> str:
    """Text of a UTF-8 file. Raises DataError where it cannot be read, is not UTF-8, or does not fit into memory."""
    with reading(path):
        check_memory(path, path.stat().st_size)
        content = path.read_bytes()
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 (byte {error.start}). Convert it, or leave it out with data.pattern.") from error
