"""Data sets of the `datasets` library: by name on the hub, or files and folders that it can read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from eellm.config.paths import expanded
from eellm.config.schema import DataConfig
from eellm.data.sources.document import Document
from eellm.errors import DataError, MissingExtra

if TYPE_CHECKING:
    from datasets import Dataset

_READERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv", ".arrow": "arrow", ".txt": "text"}
"""Ending of a file given alone -> how `datasets` calls its reader."""


def documents(data: DataConfig) -> Iterator[Document]:
    """Every row's `data.text_field`, in the data set's order; rows are read from disk as they are asked for."""
    rows, field = open_dataset(data), data.text_field
    if field not in rows.column_names:
        raise DataError(f"{_named(data)}: no column '{field}'; there are {sorted(rows.column_names)}. Set data.text_field.")
    for number, row in enumerate(rows.select_columns([field])):
        text = row[field]
        if not isinstance(text, str):
            raise DataError(f"{_named(data)} row {number}: '{field}' is a {type(text).__name__}, not text. Set data.text_field.")
        yield Document(f"{data.path}#{number}", text)


def open_dataset(data: DataConfig) -> Dataset:
    """The data set that `data.path`, `data.subset` and `data.hf_split` name: local where there is such a path, else of the hub.

    Raises MissingExtra without the `datasets` package, DataError where there is no such data set, subset or split.
    """
    try:
        import datasets
    except ImportError as error:
        raise MissingExtra("datasets", "hf", "data.source=huggingface") from error
    if not isinstance(data.path, str):
        raise DataError("data.source=huggingface needs data.path: the name of a data set, or a file or folder.")
    path = expanded(data.path)
    saved = any((path / name).is_file() for name in ("dataset_dict.json", "state.json"))
    try:
        if saved:
            found = datasets.load_from_disk(str(path))
            return found[data.hf_split] if isinstance(found, datasets.DatasetDict) else found
        if path.is_file():
            reader = _READERS.get(path.suffix)
            if reader is None:
                raise DataError(f"{_named(data)}: a file alone ends in one of {', '.join(_READERS)}.")
            # a file alone makes one split, which `datasets` calls train
            return datasets.load_dataset(reader, data_files=str(path), split="train")
        name = str(path) if path.is_dir() else data.path
        return datasets.load_dataset(name, data.subset, split=data.hf_split)
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(
            f"{_named(data)}: `datasets` cannot open it ({reason}). Check data.path, data.subset={data.subset} and "
            f"data.hf_split={data.hf_split}; a data set of the hub needs the network the first time."
        ) from error


def _named(data: DataConfig) -> str:
    return f"data.path={data.path}"
