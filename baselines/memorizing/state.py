"""The state of a Memorizing Transformer: a cache in every layer, and one memory that fills up to its size."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from baselines.transformer_xl.state import CacheState
from infini.state import LayerTensors


@dataclass(frozen=True)
class MemorizingLayer(LayerTensors):
    """What one layer carries on, all in the dtype of the model's weights.

    `hidden` is the cache and the open segment, as in `CacheLayer`. `keys` and `values` `[batch, entries, heads, head_dim]` are
    the memory (None in the layers without one): unit keys and values of the last full segments' tokens, the newest at the end,
    at most `memory_size` of them. A row with fewer than the batch's longest has others in front that nothing retrieves.
    """

    hidden: Tensor
    keys: Tensor | None = None
    values: Tensor | None = None


class MemorizingState(CacheState):
    """State of a batch of streams; it grows until the memory is full. The counters are those of `CacheState`."""

    format: ClassVar[str] = "memorizing-state-1"
    layer_class: ClassVar[type[LayerTensors]] = MemorizingLayer
