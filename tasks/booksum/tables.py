"""Rows of local tables and of files on the Hugging Face hub, with the columns that are asked for."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from infini.data.documents import HUB, find_files
from infini.errors import InputError

_KINDS = {".parquet": "parquet", ".jsonl": "json", ".csv": "csv"}


def read_rows(files: Sequence[str], columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Rows of tables, one at a time, with at least the columns asked for.

    Args:
        files: paths or patterns of ``.parquet``, ``.jsonl`` and ``.csv`` (the last two also ``.gz``), or
            ``hf://datasets/OWNER/NAME/FILES`` on the hub.
        columns: that every row must have; what else a JSON or CSV row has comes with it.

    Raises:
        InputError: no such file, one that cannot be read or is not UTF-8, or a column that is missing.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "pairs.jsonl"
        >>> _ = path.write_text('{"id": "a", "summary": "short"}')
        >>> [row["summary"] for row in read_rows([str(path)], ["id", "summary"])]
        ['short']
    """
    for pattern in files:
        for path in find_files(pattern):
            kind = _KINDS.get(Path(path.removesuffix(".gz")).suffix)
            if kind is None:
                raise InputError(f"{path} is no table of pairs; give .parquet, .jsonl or .csv files")
            if path.startswith(HUB):
                rows = _hub_rows(path, kind)
            else:
                rows = _parquet_rows(path, columns) if kind == "parquet" else _lines(path, kind)
            for row in rows:
                require(path, columns, list(row))
                yield row


def require(path: str, columns: Sequence[str], there: Sequence[str]) -> None:
    """Refuse a table without a column.

    Raises:
        InputError: it names the column, and those that there are.
    """
    if missing := [column for column in columns if column not in there]:
        raise InputError(f"{path} has no column {missing[0]!r}; its columns are {', '.join(map(str, there))}")


def read_text(path: Path) -> str:
    """A plain text file.

    Raises:
        InputError: it is not UTF-8.
    """
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not a UTF-8 text file ({error}): convert it, for example with iconv") from None


def _parquet_rows(path: str, columns: Sequence[str]) -> Iterator[dict]:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise InputError(f"reading {path} needs pyarrow, which is not installed: pip install pyarrow, or give .jsonl files") from None
    try:
        with parquet.ParquetFile(path) as file:
            require(path, columns, file.schema_arrow.names)
            for batch in file.iter_batches(8, columns=sorted(set(columns))):
                yield from batch.to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise InputError(f"{path} is not a Parquet file: {error}") from None


def _lines(path: str, kind: str) -> Iterator[dict]:
    opened = gzip.open if path.endswith(".gz") else open
    limit = csv.field_size_limit(2**31 - 1)  # a book is one field
    try:
        with opened(path, "rt", encoding="utf-8", newline="") as lines:
            if kind == "csv":
                yield from csv.DictReader(lines)
                return
            for i, line in enumerate(lines):
                if line.strip():
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise InputError(f"{path}: line {i + 1} is no object; a JSONL file has an object a line")
                    yield row
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not a UTF-8 text file ({error}): convert it, for example with iconv") from None
    except (json.JSONDecodeError, csv.Error, gzip.BadGzipFile, EOFError) as error:
        raise InputError(f"{path} cannot be read as {kind} ({error}): see that the file is whole") from None
    finally:
        csv.field_size_limit(limit)


def _hub_rows(path: str, kind: str) -> Iterator[dict]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise InputError(f"reading {path} needs the package datasets: pip install 'infini-attention[data]'") from None
    try:
        yield from load_dataset(kind, data_files=path, split="train", streaming=True)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise InputError(f"{path} cannot be read from the hub ({reason}): see that it exists and is reachable, or give local files") from error
