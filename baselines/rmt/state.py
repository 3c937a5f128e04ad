"""The state of a Recurrent Memory Transformer: the memory's vectors, and the open segment as it was read."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from infini.state import LayerTensors, StreamState


@dataclass(frozen=True)
class RMTLayer(LayerTensors):
    """What the model, not a layer of it, carries on.

    `memory` `[batch, memory tokens, hidden_size]`, in the dtype of the model's weights: what the last full segment wrote; zeros
    where the row is empty. `tokens` int64 `[batch, segment_length - 1]`: the last tokens, the newest at the end; the open
    segment is among them and is read again.
    """

    memory: Tensor
    tokens: Tensor


@dataclass(frozen=True)
class RMTState(StreamState):
    """State of a batch of streams; it does not grow with the text.

    Attributes:
        layers: one `RMTLayer`, whatever the number of layers.
        open_length: int64 `[batch]`, on the CPU: tokens of the segment that is not full yet.
        tokens_seen: int64 `[batch]`, on the CPU: tokens since the document began.
        empty: bool `[batch]`, on the CPU: nothing has been written since the document began.
        shape: the model shape that it belongs to.
    """

    format: ClassVar[str] = "rmt-state-1"
    layer_class: ClassVar[type[LayerTensors]] = RMTLayer
    counters: ClassVar[dict[str, int | bool]] = {"open_length": 0, "tokens_seen": 0, "empty": True}

    layers: tuple[RMTLayer, ...]
    open_length: Tensor
    tokens_seen: Tensor
    empty: Tensor
    shape: str
