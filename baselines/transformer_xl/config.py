"""Every choice of Transformer-XL."""

from dataclasses import dataclass
from typing import Any, ClassVar, Self

from baselines.config import DecoderConfig

POSITIONS, NORMS = ("relative", "rotary"), ("pre", "post")


@dataclass(frozen=True, kw_only=True)
class TransformerXLConfig(DecoderConfig):
    """Shape and choices of a `TransformerXL`.

    Example:
        >>> TransformerXLConfig.modern(segment_length=64).memory_length
        64
    """

    model_type: ClassVar[str] = "transformer_xl"

    memory_length: int | None = None
    """Tokens of the cache, any number from 0; None: segment_length. No parameter depends on it."""
    positions: str = "relative"
    """`relative`: content and position terms with the biases u and v, as published. `rotary`: rotations of the same distances."""
    norm: str = "pre"
    """`pre`: RMSNorm before each branch, as in the other models. `post`: after it, as published."""
    clamp_length: int | None = None
    """Distances beyond this one count as it, for caches longer than in training; None: never. `relative` only."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.memory_length is None:
            self._set("memory_length", self.segment_length)
        self._require("memory_length", self.memory_length >= 0, "at least 0")
        self._require("positions", self.positions in POSITIONS, f"one of {', '.join(POSITIONS)}")
        self._require("norm", self.norm in NORMS, f"one of {', '.join(NORMS)}")
        if self.clamp_length is not None:
            self._require("clamp_length", self.positions == "relative", "None for rotary positions, which cannot be clamped")
            self._require("clamp_length", self.clamp_length >= 1, "at least 1")

    @classmethod
    def paper(cls, **changes: Any) -> Self:
        """The published layer: relative positions, norms after the branches."""
        return cls(**{"positions": "relative", "norm": "post"} | changes)

    @classmethod
    def modern(cls, **changes: Any) -> Self:
        """The same recurrence with today's parts: rotary positions, norms before the branches."""
        return cls(**{"positions": "rotary", "norm": "pre"} | changes)
