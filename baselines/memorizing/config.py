"""Every choice of a Memorizing Transformer."""

from dataclasses import dataclass
from typing import ClassVar

from baselines.config import DecoderConfig


@dataclass(frozen=True, kw_only=True)
class MemorizingConfig(DecoderConfig):
    """Shape and choices of a `MemorizingTransformer`.

    Example:
        >>> MemorizingConfig(num_hidden_layers=12, hidden_size=1024).memory_layer  # the ninth of twelve, as published
        8
    """

    model_type: ClassVar[str] = "memorizing"

    memory_length: int | None = None
    """Tokens of every layer's cache, any number from 0; None: segment_length."""
    memory_size: int = 8192
    """Most keys and values, one of each a head, that the memory holds; the oldest leave first. No parameter depends on it."""
    memory_layer: int | None = None
    """The layer that has the memory; None: the one at three quarters of the depth."""
    top_k: int = 32
    """Pairs that a query and head retrieves."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.memory_length is None:
            self._set("memory_length", self.segment_length)
        if self.memory_layer is None:
            self._set("memory_layer", -(-3 * self.num_hidden_layers // 4) - 1)
        self._require("memory_length", self.memory_length >= 0, "at least 0")
        self._require("memory_size", self.memory_size >= 1, "at least 1")
        self._require("top_k", self.top_k >= 1, "at least 1")
        last = self.num_hidden_layers - 1
        self._require("memory_layer", 0 <= self.memory_layer <= last, f"a layer's index, from 0 to {last}")
