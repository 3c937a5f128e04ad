"""Whole documents from local files and from the Hugging Face hub, one after the other."""

from __future__ import annotations

import csv
import glob
import gzip
import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infini.errors import InputError

HUB = "hf://"
COLUMN = "text"
_TABLES = {".parquet": "parquet", ".jsonl": "json", ".csv": "csv"}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Document:
    """A text and what to call it: the row's ``id`` where the table has one, else its file and row."""

    name: str
    text: str


def read_documents(texts: str | Iterable[str], column: str = COLUMN, skipped: Counter | None = None) -> Iterator[Document]:
    """The documents of files, in order of the patterns, of the files' names, of the rows; one is held at a time.

    Args:
        texts: paths or glob patterns: plain UTF-8 files, a document each, or tables, a document a row: ``.parquet`` (needs
            pyarrow), ``.jsonl``, ``.csv``, the last two also ``.gz``. ``"hf://datasets/OWNER/NAME/FILES"`` are such files
            on the Hugging Face hub (needs datasets); they are not downloaded first.
        column: of the tables.
        skipped: receives how many rows were left out, by reason: ``empty`` (no text, or blanks alone), ``binary`` (with a
            zero byte). They are logged too.

    Raises:
        InputError: no such file, one that cannot be read or holds no text, a column that is missing or holds no text.

    Example:
        >>> [document] = read_documents(__file__)
        >>> document.name, document.text == Path(__file__).read_text()
        ('documents.py', True)
    """
    for pattern in [texts] if isinstance(texts, str) else texts:
        for path in find_files(pattern):
            yield from _read(path, column, Counter() if skipped is None else skipped)


def find_files(pattern: str) -> list[str]:
    """The files that a path or a glob pattern names, in order of name; what is on the hub is left as it is.

    Raises:
        InputError: there are none.
    """
    # A name that exists is meant as it is, whatever its signs.
    if pattern.startswith(HUB) or Path(pattern).is_file():
        return [pattern]
    paths = [path for path in sorted(glob.glob(pattern, recursive=True)) if Path(path).is_file()]
    if not paths:
        raise InputError(f"text file {pattern} does not exist; give UTF-8 text, Parquet, JSONL or CSV files")
    return paths


def _read(path: str, column: str, skipped: Counter) -> Iterator[Document]:
    name, here, read = path.rpartition("/")[2], Counter(), 0
    kind = _kind(path)
    if path.startswith(HUB):
        rows = _hub_rows(path, kind)
    elif kind is None:
        rows = _plain(path)
        column = COLUMN
    else:
        rows = {"parquet": _parquet_rows, "json": _json_rows, "csv": _csv_rows}[kind](path, column)
    for i, row in enumerate(rows):
        if column not in row:
            raise InputError(f"{path} has no column {column!r}; its columns are {', '.join(map(str, row))}")
        text = row[column]
        if text is not None and not isinstance(text, str):
            raise InputError(f"{path}: column {column!r} holds {type(text).__name__} in row {i}, not text; name another column")
        if not text or not text.strip():
            here["empty"] += 1
        elif "\0" in text:
            here["binary"] += 1
        else:
            read += 1
            own = row.get("id")
            yield Document(name if kind is None else f"{name}:{i}" if own is None else str(own), text)
    if kind is None and here["binary"]:
        raise InputError(f"{path} is not a UTF-8 text file: it holds zero bytes")
    if not read:
        raise InputError(f"text file {path} holds no text; give UTF-8 text, Parquet, JSONL or CSV files")
    if here:
        logger.warning("%s: left out %s documents", path, " and ".join(f"{count} {why}" for why, count in here.items()))
        skipped.update(here)


def _kind(path: str) -> str | None:
    return _TABLES.get(Path(path.removesuffix(".gz").removesuffix(".zst")).suffix)


def _plain(path: str) -> Iterator[dict]:
    try:
        yield {COLUMN: Path(path).read_text("utf-8")}
    except (UnicodeDecodeError, OSError) as error:
        raise InputError(f"{path} is not a UTF-8 text file: {error}") from None


def _parquet_rows(path: str, column: str) -> Iterator[dict]:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise InputError(
            f"reading {path} needs pyarrow, which is not installed: pip install pyarrow, or give plain text files"
        ) from None
    try:
        # ParquetFile reads this very file; read_table would want a data set's partitions.
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if column not in names:
                raise InputError(f"{path} has no column {column!r}; its columns are {', '.join(names)}")
            for batch in file.iter_batches(8, columns=sorted({column, "id"} & set(names))):
                yield from batch.to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise InputError(f"{path} is not a Parquet file: {error}") from None


def _json_rows(path: str, column: str) -> Iterator[dict]:
    with _opened(path) as lines:
        for i, line in enumerate(_decoded(path, lines)):
            try:
                row = json.loads(line) if line.strip() else {column: None}
            except ValueError as error:
                raise InputError(f"{path}: line {i + 1} is not JSON ({error}); a JSONL file has an object a line") from None
            if not isinstance(row, dict):
                raise InputError(f"{path}: line {i + 1} is no object; a JSONL file has an object a line")
            yield row


def _csv_rows(path: str, column: str) -> Iterator[dict]:
    limit = csv.field_size_limit(2**31 - 1)  # a book is one field
    try:
        with _opened(path) as lines:
            yield from csv.DictReader(_decoded(path, lines))
    except csv.Error as error:
        raise InputError(f"{path} is not a CSV file: {error}") from None
    finally:
        csv.field_size_limit(limit)


def _opened(path: str) -> Any:
    if path.endswith(".zst"):
        raise InputError(f"{path} is compressed with zstd; unpack it first (unzstd), or compress with gzip")
    return gzip.open(path, "rt", encoding="utf-8", newline="") if path.endswith(".gz") else open(path, encoding="utf-8", newline="")


def _decoded(path: str, lines: Iterable[str]) -> Iterator[str]:
    try:
        yield from lines
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError) as error:
        raise InputError(f"{path} is not a UTF-8 text file: {error}") from None


def _hub_rows(path: str, kind: str | None) -> Iterator[dict]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise InputError(f"reading {path} needs the package datasets: pip install 'infini-attention[data]'") from None
    # Files, not the name of a data set: many of them are scripts, which datasets no longer runs.
    options = {} if kind else {"sample_by": "document"}
    try:
        yield from load_dataset(kind or "text", data_files=path, split="train", streaming=True, **options)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise InputError(f"{path} cannot be read from the hub ({reason}): see that it exists and is reachable, or give local files") from error
