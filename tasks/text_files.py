"""Natural text from files: plain text and Parquet."""

from __future__ import annotations

import glob
from pathlib import Path

from infini.errors import InputError

COLUMN = "text"


def read_texts(pattern: str) -> str:
    """All the text that a path or a glob pattern names, files in order of name.

    Plain UTF-8 files, or ``.parquet`` files with a column ``text`` (one document a row; needs
    pyarrow). Documents are joined with a blank line.

    Args:
        pattern: ``"book.txt"``, ``"books/*.txt"``, ``"books/test-*.parquet"``.

    Raises:
        InputError: no such file, one that cannot be read, or no text in it.
    """
    # A name that exists is meant as it is, whatever its signs.
    paths = [pattern] if Path(pattern).exists() else sorted(glob.glob(pattern, recursive=True))
    if not paths:
        raise InputError(f"text file {pattern} does not exist; give a UTF-8 text or Parquet file")
    return "\n\n".join(map(_read, map(Path, paths)))


def _read(path: Path) -> str:
    try:
        text = _read_parquet(path) if path.suffix == ".parquet" else path.read_text("utf-8")
    except (UnicodeDecodeError, OSError) as error:
        raise InputError(f"{path} is not a UTF-8 text file: {error}") from None
    if not text.strip():
        raise InputError(f"text file {path} holds no text; give a UTF-8 text or Parquet file")
    return text


def _read_parquet(path: Path) -> str:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise InputError(
            f"reading {path} needs pyarrow, which is not installed: pip install pyarrow, "
            "or give plain text files"
        ) from None
    try:
        # ParquetFile reads this very file; read_table would want a data set's partitions.
        with parquet.ParquetFile(path) as file:
            if COLUMN not in file.schema_arrow.names:
                columns = ", ".join(file.schema_arrow.names)
                raise InputError(f"{path} has no column {COLUMN!r}; its columns are {columns}")
            documents = file.read([COLUMN]).column(COLUMN).to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise InputError(f"{path} is not a Parquet file: {error}") from None
    return "\n\n".join(document for document in documents if document)
