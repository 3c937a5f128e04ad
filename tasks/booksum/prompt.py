"""What stands behind a book: the words that ask, and what is to be said."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from infini.data.tokenizer import Tokenizer

SUMMARY_PROMPT = "\n\n### Summary of the book\n\n"
END = "\n###"  # ends a summary and an answer; no book of ours has a line that begins so
BLANK = "____"


class Asked(NamedTuple):
    """Token ids of a prompt and of its target. They are encoded apart, so that no token lies across the border."""

    prompt: np.ndarray
    target: np.ndarray


def ask_summary(tokenizer: Tokenizer, summary: str, most: int | None = None) -> Asked:
    """The prompt of a summary and the summary with its end; without the end where it is cut to ``most`` tokens.

    Example:
        >>> from infini.data.tokenizer import ByteTokenizer
        >>> prompt, target = ask_summary(ByteTokenizer(), "A whale.")
        >>> bytes(target), bytes(ask_summary(ByteTokenizer(), "A whale.", most=4).target)
        (b'A whale.\\n###', b'A wh')
    """
    target = tokenizer.encode_bytes((summary + END).encode())
    return Asked(tokenizer.encode_bytes(SUMMARY_PROMPT.encode()), target if most is None else target[:most])


def cloze_prompt(passage: str) -> str:
    """The words that ask for the blank of a passage.

    Example:
        >>> cloze_prompt("Call me ____.")
        '\\n\\n### Fill the blank\\n\\nCall me ____.\\n\\nAnswer:'
    """
    return f"\n\n### Fill the blank\n\n{passage}\n\nAnswer:"


def ask_blank(tokenizer: Tokenizer, passage: str, answer: str) -> Asked:
    """The prompt of a passage with a blank, and what is missing, with its end."""
    return Asked(tokenizer.encode_bytes(cloze_prompt(passage).encode()), tokenizer.encode_bytes(f" {answer}{END}".encode()))
