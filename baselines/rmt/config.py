"""Every choice of a Recurrent Memory Transformer."""

from dataclasses import dataclass
from typing import ClassVar

from baselines.config import DecoderConfig


@dataclass(frozen=True, kw_only=True)
class RMTConfig(DecoderConfig):
    """Shape and choices of a `RecurrentMemoryTransformer`.

    Example:
        >>> RMTConfig().num_memory_tokens
        16
    """

    model_type: ClassVar[str] = "rmt"

    num_memory_tokens: int = 16
    """Vectors that go from segment to segment."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("num_memory_tokens", self.num_memory_tokens >= 1, "at least 1")
