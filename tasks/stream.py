"""Language modeling on whole documents: rows that read on from batch to batch."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from infini.tasks.text_files import read_documents

from infini.data.batch import Batch
from infini.errors import InputError


@dataclass(frozen=True, kw_only=True)
class DocumentStream:
    """A map-style dataset of byte batches, each going on where the one of the same stream before it ended.

    The documents, in an order drawn for each epoch, make one text; it is cut into ``streams * rows`` lanes of equal
    length, and row after row reads its lane in windows of ``segments`` segments. So a document is read from its first to its
    last byte, by one row, over as many steps as it takes; only one that a lane's border cuts is read by two. Each
    byte of an epoch is predicted once, but for the first ones of documents and of lanes, and the last of the order, too few
    for a byte in every lane, which are left out.

    ``source[step]`` depends on ``seed`` and ``step`` alone: a resumed run sees what an uninterrupted one would have seen.

    Attributes:
        steps: number of batches.
        texts: files, see :func:`infini.tasks.text_files.read_documents`; all are read when the source is made.
        seed: not negative; of the order of documents.
        segment_length: bytes per segment, ``n``.
        segments: segments of a row, which gradients go through; state goes on without gradient.
        rows: rows of a batch.
        streams: batches that take turns, ``source[step]`` being of stream ``step % streams``. As many as batches make a step
            of the optimizer give it different texts.
        shortest: documents of fewer bytes are left out. A memory is of no use in one that fits a segment.

    Example:
        >>> source = DocumentStream(steps=9, texts=(__file__,), segment_length=16, segments=2, rows=3)
        >>> first, second = source[0], source[1]
        >>> torch.equal(first.tokens[:, -1], second.tokens[:, 0])  # read last there, read on from here
        True
    """

    steps: int
    texts: tuple[str, ...]
    seed: int = 0
    segment_length: int = 256
    segments: int = 32
    rows: int = 4
    streams: int = 1
    shortest: int = 0

    def __post_init__(self):
        for name in ("steps", "segment_length", "segments", "rows", "streams"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("seed", "shortest"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} is {getattr(self, name)}; it must not be negative")
        if not self.texts:
            raise InputError("texts is empty; name text files, Parquet files or glob patterns of them")
        documents = [document.encode() for pattern in self.texts for document in read_documents(pattern)]
        kept = [document for document in documents if len(document) >= max(1, self.shortest)]
        size, lanes = sum(map(len, kept)), self.rows * self.streams
        if size < 2 * lanes:
            raise InputError(
                f"{len(kept)} of {len(documents)} documents have {self.shortest} bytes or more, {size} bytes in all, "
                f"for {lanes} lanes (rows * streams) of at least 2; give more text or lower shortest"
            )
        object.__setattr__(self, "_text", np.frombuffer(b"".join(kept), np.uint8))
        sizes = np.array([len(document) for document in kept])
        object.__setattr__(self, "_sizes", sizes)
        object.__setattr__(self, "_begins", sizes.cumsum() - sizes)
        object.__setattr__(self, "_orders", {})

    @property
    def digests(self) -> dict[str, str]:
        """SHA-256 of the documents that are read, in the order of their files."""
        return {"texts_sha256": hashlib.sha256(self._text).hexdigest()}

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> Batch:
        if not 0 <= step < self.steps:
            raise IndexError(f"step {step} of {self.steps}")
        turn, stream = divmod(step, self.streams)
        length = self.segments * self.segment_length
        tokens = np.empty((self.rows, length + 1), np.uint8)
        reset = np.zeros(tokens.shape, bool)
        for row in range(self.rows):
            self._read(stream * self.rows + row, turn * length, tokens[row], reset[row])
        return Batch(
            torch.from_numpy(tokens),
            torch.zeros(tokens.shape, dtype=torch.bool),
            self.segments,
            stream=stream,
            reset=torch.from_numpy(reset),
        )

    def _read(self, lane: int, start: int, tokens: np.ndarray, reset: np.ndarray) -> None:
        """Fill a window with what the lane holds from byte ``start`` of all its epochs on."""
        length, done = len(self._text) // (self.rows * self.streams), 0
        while done < len(tokens):
            epoch, place = divmod(start + done, length)
            count = min(len(tokens) - done, length - place)
            self._read_epoch(epoch, lane * length + place, tokens[done : done + count], reset[done : done + count])
            # What stands before a lane was read by another row.
            reset[done] |= place == 0
            done += count

    def _read_epoch(self, epoch: int, start: int, tokens: np.ndarray, reset: np.ndarray) -> None:
        """Fill a window with an epoch's text from byte ``start`` on."""
        order, ends = self._order(epoch)
        i, done = int(np.searchsorted(ends, start, side="right")), 0
        while done < len(tokens):
            document, left = order[i], int(ends[i]) - start - done
            inside, count = int(self._sizes[document]) - left, min(left, len(tokens) - done)
            begin = int(self._begins[document]) + inside
            tokens[done : done + count] = self._text[begin : begin + count]
            reset[done] = inside == 0
            i, done = i + 1, done + count

    def _order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The documents of an epoch in their order, and where in its text each of them ends."""
        if epoch not in self._orders:
            while len(self._orders) > 1:  # a window lies in two epochs at most, or in many short ones
                self._orders.pop(min(self._orders))
            order = np.random.default_rng((self.seed, epoch)).permutation(len(self._sizes))
            self._orders[epoch] = order, self._sizes[order].cumsum()
        return self._orders[epoch]
