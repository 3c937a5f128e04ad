"""Natural text from files: plain text and Parquet."""

from __future__ import annotations

import glob
from pathlib import Path

from infini.errors import InputError

COLUMN = "text"


def read_texts(pattern: str) -> str:
    """The documents of :func:`read_documents`, joined with a blank line."""
    return "\n\n".join(read_documents(pattern))


def read_documents(pattern: str) -> list[str]:
    """All documents that a path or a glob pattern names, files in order of name.

    Plain UTF-8 files, a document each, or ``.parquet`` files with a column ``text``, a document a row (needs pyarrow).

    Args:
        pattern: ``"book.txt"``, ``"books/*.txt"``, ``"books/test-*.parquet"``.

    Raises:
        InputError: no such file, one that cannot be read, or no text in it.
    """
    # A name that exists is meant as it is, whatever its signs.
    paths = [pattern] if Path(pattern).exists() else sorted(glob.glob(pattern, recursive=True))
    if not paths:
        raise InputError(f"text file {pattern} does not exist; give a UTF-8 text or Parquet file")
    return [document for path in paths for document in _read(Path(path))]


def _read(path: Path) -> list[str]:
    try:
        documents = _read_parquet(path) if path.suffix == ".parquet" else [path.read_text("utf-8")]
    except (UnicodeDecodeError, OSError) as error:
        raise InputError(f"{path} is not a UTF-8 text file: {error}") from None
    if not any(document.strip() for document in documents):
        raise InputError(f"text file {path} holds no text; give a UTF-8 text or Parquet file")
    return documents


def _read_parquet(path: Path) -> list[str]:
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
    return [document for document in documents if document]
