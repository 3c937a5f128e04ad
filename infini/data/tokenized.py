"""Documents as one array of token ids, encoded once and kept on disk."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tqdm import tqdm

from infini.data.documents import COLUMN, HUB, Document, find_files, read_documents
from infini.data.tokenizer import Tokenizer
from infini.errors import InputError

CACHE_VARIABLE = "INFINI_CACHE"
_FORMAT = 1
_INDEX, _TOKENS = "index.json", "tokens.npy"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TokenizedDocuments:
    """Documents one after the other, as token ids.

    Attributes:
        tokens: ids ``[all tokens]`` of a narrow integer dtype; a view into a file where ``folder`` is given.
        sizes: int64 ``[documents]``, tokens of each.
        names, words, bytes: of each document: what it is called, its pieces between blanks, its bytes in UTF-8.
        skipped: rows left out, by reason, see :func:`infini.data.documents.read_documents`.
        folder: where they are kept; None: in memory alone.
    """

    tokens: np.ndarray
    sizes: np.ndarray
    names: tuple[str, ...]
    words: tuple[int, ...]
    bytes: tuple[int, ...]
    skipped: dict[str, int] = field(default_factory=dict)
    folder: Path | None = None

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, i: int) -> np.ndarray:
        """Token ids of document ``i``, a view."""
        begin = int(self.sizes[:i].sum())
        return self.tokens[begin : begin + int(self.sizes[i])]

    def digest(self, kept: Sequence[int] | None = None) -> str:
        """SHA-256 of the ids of the documents (or of those with the indices ``kept``), in their order."""
        digest, begins = hashlib.sha256(), self.sizes.cumsum() - self.sizes
        for i in range(len(self)) if kept is None else kept:
            digest.update(self.tokens[begins[i] : begins[i] + self.sizes[i]].tobytes())
        return digest.hexdigest()

    def __reduce__(self) -> tuple[Callable, tuple]:
        # A worker process opens the file again; the array itself would be copied to each.
        if self.folder is not None:
            return _open, (self.folder,)
        return TokenizedDocuments, (self.tokens, self.sizes, self.names, self.words, self.bytes, self.skipped)


def tokenize(texts: Sequence[str], tokenizer: Tokenizer, column: str = COLUMN) -> TokenizedDocuments:
    """Read documents and encode them, or open what an earlier call left.

    Bytes of local files need no encoding and are held in memory. Everything else is kept in a folder below ``$INFINI_CACHE``
    (``~/.cache/infini`` by default), named after what decides the ids: the content of local files, the addresses of those on the hub,
    the column and the tokenizer. Of several processes that ask at once one encodes and the others wait for it. What changed on the hub
    since is not noticed.

    Args:
        texts: files, see :func:`infini.data.documents.read_documents`.
        tokenizer: of :func:`infini.data.tokenizer.open_tokenizer`.
        column: of tables.

    Raises:
        InputError: no texts, or texts that cannot be read.

    Example:
        >>> from infini.data.tokenizer import ByteTokenizer
        >>> one = tokenize([__file__], ByteTokenizer())
        >>> one.names, one[0].tobytes() == Path(__file__).read_bytes(), int(one.sizes[0]) == one.bytes[0]
        (('tokenized.py',), True, True)
    """
    if not texts:
        raise InputError("texts is empty; name text, Parquet, JSONL or CSV files, or glob patterns of them")
    paths = [path for pattern in texts for path in find_files(pattern)]

    def read(skipped: Counter) -> Iterator[Document]:
        return read_documents(paths, column, skipped)

    if tokenizer.fingerprint is None and not any(path.startswith(HUB) for path in paths):
        return _in_memory(read, tokenizer)
    sources = [[path if path.startswith(HUB) else Path(path).name, _content(path)] for path in paths]
    return _kept([_FORMAT, tokenizer.fingerprint, column, sources], read, tokenizer)


def tokenize_documents(documents: Sequence[Document], tokenizer: Tokenizer) -> TokenizedDocuments:
    """Encode documents that are at hand, or open what an earlier call left; kept as those of :func:`tokenize`.

    Example:
        >>> from infini.data.tokenizer import ByteTokenizer
        >>> tokenize_documents([Document("one", "ab"), Document("two", "c")], ByteTokenizer())[1].tobytes()
        b'c'
    """
    if tokenizer.fingerprint is None:
        return _in_memory(lambda skipped: documents, tokenizer)
    content = hashlib.sha256()
    for document in documents:
        for part in (document.name, document.text):
            content.update(hashlib.sha256(part.encode()).digest())
    return _kept([_FORMAT, tokenizer.fingerprint, content.hexdigest()], lambda skipped: documents, tokenizer)


_Read = Callable[[Counter], Iterable[Document]]


def _in_memory(read: _Read, tokenizer: Tokenizer) -> TokenizedDocuments:
    parts: list[bytes] = []
    index = _encode(read, tokenizer, lambda ids: parts.append(ids.tobytes()))
    return _made(np.frombuffer(b"".join(parts), tokenizer.dtype), index)


def _kept(key: list, read: _Read, tokenizer: Tokenizer) -> TokenizedDocuments:
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]
    folder = _cache() / "tokens" / name
    if not (folder / _INDEX).is_file():
        with _alone(_cache() / "locks" / name):
            if not (folder / _INDEX).is_file():  # else another process has made it while this one waited
                _keep(folder, read, tokenizer)
    return _open(folder)


def _encode(read: _Read, tokenizer: Tokenizer, put: Callable[[np.ndarray], Any]) -> dict[str, Any]:
    """Give the ids of each document to ``put``, and return what else there is to know."""
    skipped: Counter = Counter()
    index: dict[str, Any] = {name: [] for name in ("sizes", "names", "words", "bytes")}
    slow = tokenizer.fingerprint is not None
    with tqdm(unit="B", unit_scale=True, desc="tokenizing", disable=None if slow else True, file=sys.stderr) as bar:
        for document in read(skipped):
            data = document.text.encode()
            ids = tokenizer.encode_bytes(data)
            put(ids)
            row = {"sizes": len(ids), "names": document.name, "words": len(document.text.split()), "bytes": len(data)}
            for name, value in row.items():
                index[name].append(value)
            bar.update(len(data))
    return index | {"skipped": dict(skipped)}


def _keep(folder: Path, read: _Read, tokenizer: Tokenizer) -> None:
    """Encode into a folder that appears whole or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".new-"))
    try:
        with open(temporary / _TOKENS, "wb") as file:
            _header(file, tokenizer.dtype, 0)
            index = _encode(read, tokenizer, lambda ids: file.write(ids.tobytes()))
            file.seek(0)
            _header(file, tokenizer.dtype, sum(index["sizes"]))
        (temporary / _INDEX).write_text(json.dumps(index))
        try:
            temporary.rename(folder)
        except OSError:
            if not (folder / _INDEX).is_file():  # else a process on another machine was first, with the same
                raise
        logger.info("token ids are kept in %s", folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Wait until no other process is inside with the same path; one that dies lets go of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("another process encodes the same texts: waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _header(file: BinaryIO, dtype: type[np.integer], size: int) -> None:
    # Of the same length for every size, so that it can be written again when the size is known.
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": (size,)}
    np.lib.format.write_array_header_1_0(file, header)


def _open(folder: Path) -> TokenizedDocuments:
    try:
        index = json.loads((folder / _INDEX).read_text())
        return _made(np.load(folder / _TOKENS, mmap_mode="r"), index, folder)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{folder} is damaged ({error}): delete it, the texts are encoded again") from None


def _made(tokens: np.ndarray, index: dict[str, Any], folder: Path | None = None) -> TokenizedDocuments:
    if len(tokens) != sum(index["sizes"]):
        raise ValueError(f"{len(tokens)} tokens, not {sum(index['sizes'])}")
    lists = (tuple(index[name]) for name in ("names", "words", "bytes"))
    return TokenizedDocuments(tokens, np.array(index["sizes"], np.int64), *lists, index["skipped"], folder)


def _cache() -> Path:
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get(CACHE_VARIABLE) or home / "infini")


def _content(path: str) -> str | None:
    if path.startswith(HUB):
        return None
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

