"""Text to token ids and back."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from infini.config import ModelConfig
from infini.errors import InputError
from infini.tokenizer_file import BYTES, locate


class Tokenizer(Protocol):
    """What this library knows of a tokenizer that its own models are trained with."""

    vocab_size: int
    dtype: type[np.integer]
    """A narrow integer type that holds every id."""
    fingerprint: str | None
    """SHA-256 of what it does; None where there is nothing to tell apart."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: list[int]) -> str: ...

    def encode_bytes(self, data: bytes) -> np.ndarray: ...

    def cut(self, data: bytes) -> int: ...


class ByteTokenizer:
    """UTF-8 bytes as tokens, 256 of them: nothing to train, nothing to load.

    Example:
        >>> tokenizer = ByteTokenizer()
        >>> tokenizer.decode(tokenizer.encode("naïve"))
        'naïve'
    """

    vocab_size = 256
    dtype = np.uint8
    fingerprint = None

    def encode(self, text: str) -> list[int]:
        """The bytes of `text`."""
        return list(text.encode("utf-8"))

    def decode(self, ids: list[int]) -> str:
        """Text of the bytes `ids`; what is not valid UTF-8 becomes U+FFFD."""
        return bytes(ids).decode("utf-8", errors="replace")

    def encode_bytes(self, data: bytes) -> np.ndarray:
        """The bytes themselves, uint8."""
        return np.frombuffer(data, np.uint8)

    def cut(self, data: bytes) -> int:
        """How many bytes have ids that no byte after `data` can change: all of them."""
        return len(data)


def load_tokenizer(config: ModelConfig) -> Tokenizer:
    """The tokenizer that a model's configuration names.

    Raises:
        InputError: there is no such file, it is damaged, its vocabulary is not the model's, or `tokenizers` is not installed.
    """
    tokenizer = open_tokenizer(config.tokenizer)
    if config.tokenizer != BYTES and tokenizer.vocab_size != config.vocab_size:
        raise InputError(
            f"the tokenizer {config.tokenizer} has {tokenizer.vocab_size} entries, the model's vocabulary {config.vocab_size}: "
            f"use the tokenizer that the model was trained with, or train with model.vocab_size={tokenizer.vocab_size}"
        )
    return tokenizer


def open_tokenizer(name: str) -> Tokenizer:
    """The tokenizer called `bytes`, or the one in a `tokenizer.json` or its folder.

    Raises:
        InputError: as `load_tokenizer`.
    """
    if name == BYTES:
        return ByteTokenizer()
    path = locate(name)
    from infini.data.bpe import BPETokenizer

    return BPETokenizer(path)
