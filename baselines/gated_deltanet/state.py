"""The state: a matrix and a few inputs for each recurrent layer, a window of keys and values for the others."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from infini.state import LayerTensors, StreamState


@dataclass(frozen=True)
class HybridLayer(LayerTensors):
    """What one layer carries on, of either kind; the other kind's fields are None.

    `matrix` `[batch, heads, key_head_dim, head_dim]`, fp32 (fp64 in a model of fp64), and `inputs`
    `[batch, conv_size - 1, channels]`, the last of the short convolution, zeros before the document's start; or `keys` and
    `values` of the window, as in `baselines.full.state.FullLayer`. All but the matrix are in the dtype of the model's weights.
    """

    matrix: Tensor | None = None
    inputs: Tensor | None = None
    keys: Tensor | None = None
    values: Tensor | None = None


@dataclass(frozen=True)
class GatedDeltaNetState(StreamState):
    """State of a batch of streams; it does not grow once the window is full.

    Attributes:
        layers: one `HybridLayer` per layer.
        tokens_seen: int64 `[batch]`, on the CPU: tokens since the document began.
        shape: the model shape that it belongs to.
    """

    format: ClassVar[str] = "gated-deltanet-state-1"
    layer_class: ClassVar[type[LayerTensors]] = HybridLayer
    counters: ClassVar[dict[str, int | bool]] = {"tokens_seen": 0}

    layers: tuple[HybridLayer, ...]
    tokens_seen: Tensor
    shape: str
