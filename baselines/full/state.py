"""The state of plain attention: the keys and values of all tokens that can still be seen."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from infini.state import LayerTensors, StreamState


@dataclass(frozen=True)
class FullLayer(LayerTensors):
    """What one layer carries on, in the dtype of the model's weights.

    `keys` and `values` `[batch, kept, heads, head_dim]`, keys with their rotary positions, the newest token at the end. A row
    that has read less than the longest one has others in front that nothing sees.
    """

    keys: Tensor
    values: Tensor


@dataclass(frozen=True)
class FullState(StreamState):
    """State of a batch of streams; it grows with the text, with a window until that is full.

    Attributes:
        layers: one `FullLayer` per layer.
        tokens_seen: int64 `[batch]`, on the CPU: tokens since the document began.
        shape: the model shape that it belongs to.
    """

    format: ClassVar[str] = "full-state-1"
    layer_class: ClassVar[type[LayerTensors]] = FullLayer
    counters: ClassVar[dict[str, int | bool]] = {"tokens_seen": 0}

    layers: tuple[FullLayer, ...]
    tokens_seen: Tensor
    shape: str
