"""Training on whole books: read one to its last page over as many steps as it takes, then write its summary or answer about it."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from infini.tasks.booksum.asking import NEAREST, Course, Parts, ask_on_the_way, on_the_way, passages_of
from infini.tasks.booksum.pairs import PairFiles, digest, read_pairs
from infini.tasks.booksum.prompt import ask_summary

from infini.data.batch import Batch
from infini.data.documents import Document
from infini.data.tokenized import tokenize_documents
from infini.data.tokenizer import open_tokenizer
from infini.errors import InputError


class _Text(NamedTuple):
    """Everything of one visit to a book: whole windows, without the token before the first."""

    tokens: np.ndarray
    answer: np.ndarray
    reset: np.ndarray


@dataclass(frozen=True, kw_only=True)
class BookSummaries(PairFiles):
    """A map-style dataset of token batches: books with what is asked behind them, read on from batch to batch.

    Row after row reads, in an order of its own drawn for each epoch, every pair: the book, the prompt, the summary. What is read ends
    where a window of ``segments`` segments ends, so a gradient goes through the summary and the last segments of the book, at least
    ``book_segments``; the state of what was read before is carried without gradient. ``segments`` as long as a book, with
    ``train.replay_segments``, gives the exact gradient of all of it. What is left of a book's first window is a passage from another
    book, read before it as a text of its own: no token is padding.

    Answers (:class:`infini.data.batch.Batch`) are the summaries with their end, and no other token: ``train.token_weight=0`` learns
    from them alone, a weight above it from the books too.

    In ``cloze_share`` of the visits questions stand behind the book in place of the summary, as many as fit, see
    :mod:`infini.tasks.booksum.cloze`; there, where only ``book_tokens`` of a book are read, they begin anywhere in it, and of a
    summary's book the first are read. A part of a book that no question can be made of is asked for its summary. With
    ``question_share`` questions are asked on the way too, a few after every some hundred tokens. The distance between a passage and its
    question is log-uniform; the largest grows geometrically from ``farthest_start`` to the whole book over ``growth`` of training.

    ``source[step]`` depends on ``seed`` and ``step`` alone: a resumed run sees what an uninterrupted one would have seen.

    Attributes:
        steps: number of batches.
        seed: not negative; of orders, parts and questions.
        segment_length: tokens per segment, ``n``.
        segments: segments of a row, which gradients go through.
        book_segments: segments at the end of a book that are in the window of its summary at least.
        rows: rows of a batch.
        streams: batches that take turns, see :class:`infini.tasks.stream.DocumentStream`.
        book_tokens: most tokens of a book; None: the whole book.
        summary_tokens: most tokens of a summary with its end.
        cloze_share: 0..1.
        question_share: 0..1, of what is read in such a visit: questions on the way.
        farthest_start: tokens between a passage and its question, at most, at the start of training; None: as at its end.
        recital_share_start, recital_share_end: share of the questions that ask to recite a sentence from its first words, at the start
            of training and from ``growth`` of it on. Any sentence will do and most of it is an answer, so retrieval is learned sooner.
        growth: share of training after which there is no such limit.
        tokenizer: the model's, ``"bytes"`` or a ``tokenizer.json``.
        rank: which of ``world_size`` processes this is; each has rows of its own.
        world_size: processes.

    Raises:
        InputError: pairs that cannot be read, a book shorter than a segment, a window without room for the longest summary.
    """

    steps: int
    seed: int = 0
    segment_length: int = 256
    segments: int = 16
    book_segments: int = 1
    rows: int = 4
    streams: int = 1
    book_tokens: int | None = None
    summary_tokens: int = 1024
    cloze_share: float = 0.0
    question_share: float = 0.0
    recital_share_start: float = 0.0
    recital_share_end: float = 0.0
    farthest_start: int | None = None
    growth: float = 0.5
    tokenizer: str = "bytes"
    rank: int = 0
    world_size: int = 1

    def __post_init__(self):
        for name in ("steps", "segment_length", "segments", "book_segments", "rows", "streams", "summary_tokens", "world_size"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.seed < 0:
            raise InputError(f"seed is {self.seed}; it must not be negative")
        for name in ("cloze_share", "recital_share_start", "recital_share_end", "growth"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} is {getattr(self, name)}; it is a share, from 0 to 1")
        if not 0 <= self.question_share <= 0.9:
            raise InputError(f"question_share is {self.question_share}; it is a share of what is read, from 0 to 0.9")
        if self.farthest_start is not None and self.farthest_start <= NEAREST:
            raise InputError(f"farthest_start is {self.farthest_start}; no question is nearer than {NEAREST} tokens: raise it")
        if not 0 <= self.rank < self.world_size:
            raise InputError(f"rank is {self.rank} of {self.world_size} processes; it must be 0 to {self.world_size - 1}")
        if self.book_tokens is not None and self.book_tokens < self.segment_length:
            raise InputError(f"book_tokens is {self.book_tokens}; a memory is of no use in less than a segment ({self.segment_length})")
        tokenizer = open_tokenizer(self.tokenizer)
        pairs, skipped = read_pairs(self)
        books = encode_books(pairs, tokenizer, self.segment_length)
        asked = [ask_summary(tokenizer, pair.summary, self.summary_tokens) for pair in pairs]
        longest = max(len(one.prompt) + len(one.target) for one in asked)
        if longest > self._room:
            needed = self.book_segments - (-longest // self.segment_length)
            raise InputError(
                f"the longest summary has {longest} tokens with its prompt, a window of {self.segments} segments {self._room} beside "
                f"book_segments={self.book_segments}; use segments={needed} or more, or fewer summary_tokens"
            )
        for name, value in {
            "_tokenizer": tokenizer, "_books": [books[pair.book] for pair in pairs], "_asked": asked, "_skipped": skipped,
            "_digest": digest(pairs), "_epochs": {}, "_visits": OrderedDict(), "_passages": {},
        }.items():  # fmt: skip
            object.__setattr__(self, name, value)

    @property
    def _window(self) -> int:
        return self.segments * self.segment_length

    @property
    def _room(self) -> int:
        """Tokens of a window that prompt and target may take."""
        return self._window - self.book_segments * self.segment_length

    @property
    def digests(self) -> dict:
        """SHA-256 of the pairs and of the tokenizer, and how many pairs were left out, by reason."""
        tokenizer = {} if self._tokenizer.fingerprint is None else {"tokenizer_sha256": self._tokenizer.fingerprint}
        skipped = {"skipped": self._skipped} if self._skipped else {}
        return {"pairs_sha256": self._digest, "pairs_read": len(self._books)} | tokenizer | skipped

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> Batch:
        if not 0 <= step < self.steps:
            raise IndexError(f"step {step} of {self.steps}")
        turn, stream = divmod(step, self.streams)
        tokens = np.zeros((self.rows, self._window + 1), self._tokenizer.dtype)
        answer, reset = np.zeros(tokens.shape, bool), np.zeros(tokens.shape, bool)
        for row in range(self.rows):
            lane = (stream * self.world_size + self.rank) * self.rows + row
            text, start = self._at(lane, turn)
            for whole, part in zip((tokens, answer, reset), text, strict=True):
                whole[row, 1:] = part[start : start + self._window]
            # The token before the window is the last of the one before: of another book or of this one.
            before, end = (text, start) if start else (self._at(lane, turn - 1)[0], None) if turn else (None, None)
            if before is None:
                reset[row, 0] = True
            else:
                tokens[row, 0] = before.tokens[:end][-1]
        answer[:, 0] = False
        return Batch(torch.from_numpy(tokens), torch.from_numpy(answer), self.segments, stream=stream, reset=torch.from_numpy(reset))

    def _at(self, lane: int, turn: int) -> tuple[_Text, int]:
        """The visit that a lane is at, and how far into it."""
        epoch, begin = 0, 0
        while turn >= begin + (ends := self._epoch(lane, epoch)[2])[-1]:
            begin, epoch = begin + int(ends[-1]), epoch + 1
        place = int(np.searchsorted(ends, turn - begin, side="right"))
        begin += int(ends[place - 1]) if place else 0
        return self._visit(lane, epoch, place, begin), (turn - begin) * self._window

    def _epoch(self, lane: int, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Which pair each visit of an epoch is to, which of them are asked questions, and the window behind each."""
        if (lane, epoch) not in self._epochs:
            random = np.random.default_rng((self.seed, lane, epoch))
            order = random.permutation(len(self._books))
            cloze = random.random(len(order)) < self.cloze_share
            read = [min(len(self._books[i]), self.book_tokens or len(self._books[i])) for i in order]
            # Room is kept for as many questions as there may be: how many there are is known when they are made.
            tails = [self._room if ask else sum(map(len, self._asked[i])) for i, ask in zip(order, cloze, strict=True)]
            ways = [on_the_way(count, self.question_share) if ask else 0 for count, ask in zip(read, cloze, strict=True)]
            windows = [-(-sum(parts) // self._window) for parts in zip(read, ways, tails, strict=True)]
            self._epochs[lane, epoch] = order, cloze, np.cumsum(windows)
        return self._epochs[lane, epoch]

    def _visit(self, lane: int, epoch: int, place: int, begin: int) -> _Text:
        key = (lane, epoch, place)
        if key not in self._visits:
            while len(self._visits) >= 2 * self.rows * self.streams:  # each lane is at one, or between two
                self._visits.popitem(last=False)
            self._visits[key] = self._make(*key, begin)
        self._visits.move_to_end(key)
        return self._visits[key]

    def _make(self, lane: int, epoch: int, place: int, begin: int) -> _Text:
        order, cloze, ends = self._epoch(lane, epoch)
        random = np.random.default_rng((self.seed, lane, epoch, place))
        which = int(order[place])
        book = self._books[which]
        count = min(len(book), self.book_tokens or len(book))
        parts, first = [], int(random.integers(len(book) - count + 1))
        if cloze[place]:
            grown = 1.0 if self.growth == 0 else min(1.0, begin * self.streams / (self.growth * self.steps))
            parts = self._questions(which, first, count, grown, random)
        if not parts:
            parts = [(book[:count], False), *zip(self._asked[which], (False, True), strict=True)]
        size = int(ends[place] - (ends[place - 1] if place else 0)) * self._window
        before = self._passage(size - sum(len(ids) for ids, _ in parts), random)
        tokens = np.concatenate([before, *(ids for ids, _ in parts)])
        answer = np.concatenate([np.zeros(len(before), bool), *(np.full(len(ids), said) for ids, said in parts)])
        reset = np.zeros(size, bool)
        reset[[0, len(before)]] = True
        return _Text(tokens, answer, reset)

    def _questions(self, which: int, first: int, count: int, grown: float, random: np.random.Generator) -> Parts:
        """A part of a book with questions on the way and behind it, as many as fit, when ``grown`` (0..1) of the curriculum is done."""
        book = self._books[which]
        if which not in self._passages:
            self._passages[which] = passages_of(book, self._tokenizer)
        farthest = count
        if self.farthest_start is not None and self.farthest_start < count:
            farthest = round(self.farthest_start * (count / self.farthest_start) ** grown)
        course = Course(
            share=self.question_share, recital_share=self.recital_share_start + grown * (self.recital_share_end - self.recital_share_start),
            farthest=farthest, room=self._room,
        )  # fmt: skip
        here = [passages.between(first, first + count) for passages in self._passages[which]]
        return ask_on_the_way(book[first : first + count], here, course, self._tokenizer, random)

    def _passage(self, count: int, random: np.random.Generator) -> np.ndarray:
        """So many tokens from somewhere in the books; more than one passage where the book is too short."""
        parts = []
        while count:
            book = self._books[random.integers(len(self._books))]
            first = int(random.integers(max(1, len(book) - count)))
            parts.append(book[first : first + count])
            count -= len(parts[-1])
        return np.concatenate(parts) if parts else np.zeros(0, self._tokenizer.dtype)


def encode_books(pairs, tokenizer, segment_length: int) -> dict[str, np.ndarray]:
    """Token ids of each book, by its name; kept on disk, see :func:`infini.data.tokenized.tokenize_documents`.

    Raises:
        InputError: one is shorter than a segment: no memory would ever be written.
    """
    texts = {pair.book: pair.text for pair in pairs}
    kept = tokenize_documents([Document(book, text) for book, text in texts.items()], tokenizer)
    books = {book: kept[i] for i, book in enumerate(texts)}
    for book, ids in books.items():
        if len(ids) < segment_length:
            raise InputError(
                f"the book {book!r} has {len(ids)} tokens, less than a segment ({segment_length}), so it would never "
                "reach a memory; leave it out, or use a model of shorter segments"
            )
    return books
