"""A Hugging Face tokenizer with the three names that this library uses."""

from __future__ import annotations


class HuggingFaceTokenizer:
    """Wraps a transformers tokenizer.

    Args:
        tokenizer: a ``PreTrainedTokenizerBase``.

    Attributes:
        vocab_size: number of token ids, added ones included.
        prefix_ids: what the tokenizer puts before every text (a begin-of-text token), or nothing.
    """

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        self.vocab_size = len(tokenizer)
        # Seen from outside, since not every tokenizer that adds such a token says so in a field.
        plain, full = self.encode("a"), tokenizer("a")["input_ids"]
        at = next((i for i in range(len(full)) if full[i : i + len(plain)] == plain), 0)
        self.prefix_ids = full[:at]

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without special tokens."""
        return self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def decode(self, ids: list[int]) -> str:
        """The text of token ids, special tokens left out."""
        return self._tokenizer.decode(ids, skip_special_tokens=True)
