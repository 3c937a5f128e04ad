"""Passkey prompts of exactly the asked number of tokens, in any tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from infini.errors import InputError

# The wording of the Landmark attention code (arXiv 2305.16300), which the Infini-attention paper
# prints too. The parts are joined with newlines.
TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there."
)
FILLER = (
    " The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
)
NEEDLE = "The pass key is {key}. Remember it. {key} is the pass key."
QUESTION = "What is the pass key? The pass key is"


@dataclass(frozen=True)
class Haystack:
    """The irrelevant text as one period of token ids; a prompt runs through it in a circle.

    Attributes:
        ids: int64 ``[period]``.
    """

    ids: torch.Tensor

    @classmethod
    def load(cls, source: str, tokenizer) -> Haystack:
        """The text named by ``source``, encoded once.

        Args:
            source: ``"repeat"`` for the paper's five sentences, ``"text:FILE"`` for a UTF-8 file.
            tokenizer: anything with ``encode(str) -> list[int]``.

        Raises:
            InputError: another source, or a file that is missing, not UTF-8 or without text.

        Example:
            >>> class Bytes:
            ...     encode = staticmethod(lambda text: list(text.encode()))
            >>> len(Haystack.load("repeat", Bytes).ids)
            90
        """
        if source == "repeat":
            text = FILLER
        elif source.startswith("text:"):
            text = _read_text(Path(source.removeprefix("text:")))
        else:
            raise InputError(f'haystack is {source!r}; use "repeat" or "text:FILE"')
        return cls(torch.tensor(tokenizer.encode(text), dtype=torch.int64))

    def run(self, start: int, count: int) -> torch.Tensor:
        """``count`` ids from position ``start`` on, int64, wrapping round at the period's end."""
        start %= len(self.ids)
        laps = -(-(start + count) // len(self.ids))
        return self.ids.repeat(laps)[start : start + count]


@dataclass(frozen=True)
class Prompt:
    """One question to a model.

    Attributes:
        ids: int64 ``[length]``; ends with the question, so the next tokens are the answer.
        key: the number to be found.
        needle_start: position of the first token of the sentence that holds the key.
        needle_end: position after its last token.
    """

    ids: torch.Tensor
    key: int
    needle_start: int
    needle_end: int

    def cut_by_border(self, segment_length: int) -> bool:
        """Whether the needle's tokens lie in more than one segment of ``segment_length`` tokens."""
        return self.needle_start // segment_length != (self.needle_end - 1) // segment_length


def build_prompt(
    tokenizer, length: int, depth: float, key: int, haystack: Haystack, phase: int = 0
) -> Prompt:
    """A passkey prompt of exactly ``length`` tokens.

    ``prefix | TASK \\n | filler | \\n NEEDLE \\n | filler | \\n QUESTION``: the parts are encoded
    one by one and only the filler is cut, in the middle of a sentence or word if need be (as in
    the Landmark code). The prefix is ``tokenizer.prefix_ids`` where a tokenizer has one, such as a
    begin-of-text token.

    Args:
        tokenizer: anything with ``encode(str) -> list[int]``.
        length: tokens of the whole prompt.
        depth: 0..1, the share of the filler that stands before the needle.
        key: the number to hide.
        haystack: the filler.
        phase: position in the haystack's period at which the filler begins.

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

    def encode(text: str) -> torch.Tensor:
        return torch.tensor(tokenizer.encode(text), dtype=torch.int64)

    prefix = torch.tensor(getattr(tokenizer, "prefix_ids", []), dtype=torch.int64)
    task, newline = encode(TASK + "\n"), encode("\n")
    needle, question = encode(NEEDLE.format(key=key)), encode("\n" + QUESTION)
    fixed = sum(map(len, (prefix, task, newline, needle, newline, question)))
    filler = length - fixed
    if filler < 0:
        raise InputError(
            f"length is {length} tokens, but the passkey text alone takes {fixed} "
            f"in this tokenizer; ask for at least {fixed}"
        )
    before = round(depth * filler)
    needle_start = len(prefix) + len(task) + before + len(newline)
    ids = torch.cat(
        [
            prefix,
            task,
            haystack.run(phase, before),
            newline,
            needle,
            newline,
            haystack.run(phase + before, filler - before),
            question,
        ]
    )
    return Prompt(ids, key, needle_start, needle_start + len(needle))


def _read_text(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"haystack file {path} does not exist; give a UTF-8 text file") from None
    except (UnicodeDecodeError, OSError) as error:
        raise InputError(f"haystack {path} is not a UTF-8 text file: {error}") from None
    if not text.strip():
        raise InputError(f"haystack file {path} holds no text; give a UTF-8 text file")
    return text
