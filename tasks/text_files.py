"""Natural text from files, as one text."""

from __future__ import annotations

from infini.data.documents import read_documents


def read_texts(pattern: str) -> str:
    """The documents of :func:`infini.data.documents.read_documents`, joined with a blank line.

    Args:
        pattern: ``"book.txt"``, ``"books/*.txt"``, ``"books/test-*.parquet"``.

    Raises:
        InputError: no such file, one that cannot be read, or no text in it.
    """
    return "\n\n".join(document.text for document in read_documents(pattern))
