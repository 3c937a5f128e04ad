"""Every choice of plain attention."""

from dataclasses import dataclass
from typing import ClassVar

from baselines.config import DecoderConfig


@dataclass(frozen=True, kw_only=True)
class FullConfig(DecoderConfig):
    """Shape and choices of a `FullTransformer`. Its attention knows no segments: `segment_length` is that of training rows, and
    where the knock-out cuts.

    Example:
        >>> FullConfig(window=512) == FullConfig(window=512)
        True
    """

    model_type: ClassVar[str] = "full"

    window: int | None = None
    """Tokens that a token sees, itself included; None: all of its document."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("window", self.window is None or self.window >= 1, "at least 1, or None for the whole text")
