"""States that hold a cache of hidden states."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from infini.state import LayerTensors, StreamState


@dataclass(frozen=True)
class CacheLayer(LayerTensors):
    """What a layer with a cache carries on.

    `hidden` `[batch, memory_length + segment_length - 1, hidden_size]`, in the model's dtype: what the layer read at the last
    tokens, the newest at the end. The open segment is among them, the cache before it.
    """

    hidden: Tensor


@dataclass(frozen=True)
class CacheState(StreamState):
    """State of a batch of streams; it does not grow with the text.

    Attributes:
        layers: one `CacheLayer` per layer.
        open_length: int64 `[batch]`, on the CPU: tokens of the segment that is not full yet.
        tokens_seen: int64 `[batch]`, on the CPU: tokens since the document began.
        shape: the model shape that it belongs to.
    """

    format: ClassVar[str] = "cache-state-1"
    layer_class: ClassVar[type[LayerTensors]] = CacheLayer
    counters: ClassVar[dict[str, int | bool]] = {"open_length": 0, "tokens_seen": 0}

    layers: tuple[CacheLayer, ...]
    open_length: Tensor
    tokens_seen: Tensor
    shape: str
