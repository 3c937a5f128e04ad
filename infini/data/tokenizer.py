"""Text to token ids and back."""

from infini.config import InfiniConfig
from infini.errors import InputError


class ByteTokenizer:
    """UTF-8 bytes as tokens, 256 of them: nothing to train, nothing to load.

    Example:
        >>> tokenizer = ByteTokenizer()
        >>> tokenizer.decode(tokenizer.encode("naïve"))
        'naïve'
    """

    vocab_size = 256

    def encode(self, text: str) -> list[int]:
        """The bytes of `text`."""
        return list(text.encode("utf-8"))

    def decode(self, ids: list[int]) -> str:
        """Text of the bytes `ids`; what is not valid UTF-8 becomes U+FFFD."""
        return bytes(ids).decode("utf-8", errors="replace")


def load_tokenizer(config: InfiniConfig) -> ByteTokenizer:
    """The tokenizer that a model's configuration names."""
    if config.tokenizer != "bytes":
        raise InputError(f"the tokenizer is {config.tokenizer!r}; this version knows 'bytes'")
    return ByteTokenizer()
