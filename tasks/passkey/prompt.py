"""Prompts of exactly the asked number of tokens, in any tokenizer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from infini.tasks.passkey.needles import FILLER, NEEDLE, Quiz
from infini.tasks.text_files import read_texts

from infini.errors import InputError


@dataclass(frozen=True)
class Haystack:
    """The irrelevant text as one period of token ids; a prompt runs through it in a circle.

    Attributes:
        ids: int64 ``[period]``.
    """

    ids: torch.Tensor

    @classmethod
    def load(cls, source: str, tokenizer, filler: str = FILLER) -> Haystack:
        """The text named by ``source``, encoded once.

        Args:
            source: ``"repeat"`` for ``filler``; ``"text:FILES"`` for text files, see
                :func:`infini.tasks.text_files.read_texts`.
            tokenizer: anything with ``encode(str) -> list[int]``.
            filler: the sentences that ``"repeat"`` repeats; the paper's five.

        Raises:
            InputError: another source, or a file that is missing, not UTF-8 or without text.

        Example:
            >>> class Bytes:
            ...     encode = staticmethod(lambda text: list(text.encode()))
            >>> len(Haystack.load("repeat", Bytes).ids)
            90
        """
        if source == "repeat":
            text = filler
        elif source.startswith("text:"):
            text = read_texts(source.removeprefix("text:"))
        else:
            raise InputError(
                f'haystack is {source!r}; use "repeat" or "text:FILE" '
                "(a text file, a Parquet file, or a glob pattern of them)"
            )
        return cls(torch.tensor(tokenizer.encode(text), dtype=torch.int64))

    def run(self, start: int, count: int) -> torch.Tensor:
        """``count`` ids from position ``start`` on, int64, wrapping round at the period's end."""
        first = self.ids[start % len(self.ids) :][:count]
        turns, rest = divmod(count - len(first), len(self.ids))
        return torch.cat([first, self.ids.repeat(turns), self.ids[:rest]])


@dataclass(frozen=True)
class Prompt:
    """One question to a model.

    Attributes:
        ids: int64 ``[length]``; ends with the question, so the next tokens are the answer.
        key: the number to be found.
        needle_start: position of the first token of the sentence that holds the key.
        needle_end: position after its last token.
        decoys: ``(start, end)`` of each statement that is not asked for, in the quiz's order.
    """

    ids: torch.Tensor
    key: int
    needle_start: int
    needle_end: int
    decoys: tuple[tuple[int, int], ...] = ()

    def cut_by_border(self, segment_length: int) -> bool:
        """Whether the needle's tokens lie in more than one segment of ``segment_length`` tokens."""
        return self.needle_start // segment_length != (self.needle_end - 1) // segment_length


def build_prompt(
    tokenizer,
    length: int,
    depth: float,
    key: int,
    haystack: Haystack,
    phase: int = 0,
    quiz: Quiz | None = None,
) -> Prompt:
    """A prompt of exactly ``length`` tokens.

    ``prefix | TASK \\n | filler | \\n NEEDLE \\n | filler | \\n QUESTION``: the parts are encoded
    one by one and only the filler is cut, in the middle of a sentence or word if need be (as in
    the Landmark code). The prefix is ``tokenizer.prefix_ids`` where a tokenizer has one, such as a
    begin-of-text token. A quiz's decoys stand like the needle, each at its own place of the filler.

    Args:
        tokenizer: anything with ``encode(str) -> list[int]``.
        length: tokens of the whole prompt.
        depth: 0..1, the share of the filler that stands before the needle.
        key: the number to hide.
        haystack: the filler.
        phase: position in the haystack's period at which the filler begins.
        quiz: the other texts, with ``key`` in them; None: those of the passkey.

    Raises:
        InputError: depth outside 0..1, or a length that cannot hold the text around the filler.

    Example:
        >>> class Bytes:
        ...     encode = staticmethod(lambda text: list(text.encode()))
        >>> prompt = build_prompt(Bytes, 1000, 1.0, 54321, Haystack.load("repeat", Bytes))
        >>> len(prompt.ids), bytes(prompt.ids.tolist())[-38:]
        (1000, b'\\nWhat is the pass key? The pass key is')
    """
    if not 0 <= depth <= 1:
        raise InputError(f"depth is {depth}; it is a share of the text, from 0 to 1")
    texts = _Encoded.of(tokenizer, quiz or Quiz(NEEDLE.format(key=key)))
    texts.check(length)
    filler = length - texts.fixed
    before = round(depth * filler)
    # In order of place; at the same place decoys come first, so that a needle which overrules them is later.
    offsets = [decoy.offset(before, filler) for decoy in texts.quiz.decoys] + [before]
    order = sorted(range(len(offsets)), key=offsets.__getitem__)

    pieces, at, done, spans = [texts.head], len(texts.head), 0, {}
    for i in order:
        pieces += [haystack.run(phase + done, offsets[i] - done), texts.newline]
        start = at + offsets[i] - done + len(texts.newline)
        spans[i] = (start, start + len(texts.statements[i]))
        pieces += [texts.statements[i], texts.newline]
        at, done = spans[i][1] + len(texts.newline), offsets[i]
    pieces += [haystack.run(phase + done, filler - done), texts.question]
    decoys = tuple(spans[i] for i in range(len(offsets) - 1))
    return Prompt(torch.cat(pieces), key, *spans[len(offsets) - 1], decoys)


def check_length(tokenizer, length: int, quiz: Quiz) -> None:
    """Refuses a length that cannot hold a quiz.

    Raises:
        InputError: naming the shortest that can.
    """
    _Encoded.of(tokenizer, quiz).check(length)


@dataclass(frozen=True)
class _Encoded:
    """A quiz in tokens; the needle is the last of the statements."""

    quiz: Quiz
    head: torch.Tensor
    newline: torch.Tensor
    statements: list[torch.Tensor]
    question: torch.Tensor

    @classmethod
    def of(cls, tokenizer, quiz: Quiz) -> _Encoded:
        def encode(text: str) -> torch.Tensor:
            return torch.tensor(tokenizer.encode(text), dtype=torch.int64)

        prefix = torch.tensor(getattr(tokenizer, "prefix_ids", []), dtype=torch.int64)
        statements = [encode(text) for text in (*(decoy.text for decoy in quiz.decoys), quiz.needle)]
        return cls(
            quiz,
            torch.cat([prefix, encode(quiz.task + "\n")]),
            encode("\n"),
            statements,
            encode("\n" + quiz.question),
        )

    @property
    def fixed(self) -> int:
        """Tokens of all that is not filler."""
        said = sum(len(statement) + 2 * len(self.newline) for statement in self.statements)
        return len(self.head) + said + len(self.question)

    def check(self, length: int) -> None:
        if length < self.fixed:
            raise InputError(
                f"length is {length} tokens, but the passkey text alone takes {self.fixed} "
                f"in this tokenizer; ask for at least {self.fixed}"
            )
