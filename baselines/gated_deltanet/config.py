"""Every choice of a Gated DeltaNet with sliding-window attention."""

from dataclasses import dataclass
from typing import ClassVar

from baselines.config import DecoderConfig


@dataclass(frozen=True, kw_only=True)
class GatedDeltaNetConfig(DecoderConfig):
    """Shape and choices of a `GatedDeltaNet`. The layers 0, 2, 4, ... are recurrent, the others attend to a window.

    Values of a recurrent head are `head_dim` wide, keys half of that, so that such a layer has as many parameters as attention,
    4 hidden_size^2, with the paper's ratio of the two. `segment_length` is that of training rows, and where the knock-out cuts.

    Example:
        >>> GatedDeltaNetConfig(segment_length=256).window, GatedDeltaNetConfig().key_head_dim
        (256, 64)
    """

    model_type: ClassVar[str] = "gated_deltanet"

    window: int | None = None
    """Tokens that a token of an attention layer sees, itself included; None: segment_length."""
    key_head_dim: int | None = None
    """Width of a recurrent head's queries and keys; None: head_dim / 2."""
    conv_size: int = 4
    """Tokens that the short convolution of queries, keys and values covers, the present one included."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window is None:
            self._set("window", self.segment_length)
        if self.key_head_dim is None:
            self._set("key_head_dim", self.head_dim // 2)
        for name in ("window", "key_head_dim", "conv_size"):
            self._require(name, getattr(self, name) >= 1, "at least 1")
