"""What training, sessions, tasks and baselines know of a model."""

import os
from typing import Any, NamedTuple, Protocol, Self

import torch
from torch import Tensor


class Carried(NamedTuple):
    """What crosses a segment border in one row: how many numbers, and their bytes.

    This is what arXiv:2404.07143 counts in its table 1: all that the tokens behind a border are computed from, beside themselves,
    without the counters that say where in the text they stand. What is allocated, for the open segment too, is `state_bytes`.
    """

    numbers: int
    bytes: int


class SegmentState(Protocol):
    """State of a batch of streams: a value that goes in and comes out of every call."""

    nbytes: int
    batch_size: int
    tokens_seen: Tensor
    """int64 `[batch]` on the CPU: tokens since each row's document began."""

    def detach(self) -> Self: ...
    def clone(self) -> Self: ...
    def to(self, device: torch.device | str) -> Self: ...
    def select(self, rows: Tensor) -> Self: ...
    def reset(self, where: Tensor) -> Self: ...


class SegmentModel(Protocol):
    """A causal language model that reads a text in pieces of any size; the state is all that it knows of the pieces before.

    Sessions can be saved where the state has `save`; they are restored by the model's `state_class.load`.
    """

    config: Any
    """Has `vocab_size` and `segment_length`."""

    def __call__(
        self,
        tokens: Tensor,
        state: Any = None,
        *,
        reset: Tensor | None = None,
        padding: Tensor | None = None,
        keep: str = "all",
        hidden: bool = False,
    ) -> tuple[Tensor | None, Any]: ...

    def init_state(self, batch_size: int, device: torch.device | str | None = None) -> Any: ...

    def state_bytes(self, tokens: int, batch_size: int = 1) -> int:
        """Bytes of the state after `tokens` tokens of every row."""
        ...

    def carried(self, tokens: int) -> Carried:
        """What crosses the border behind a row's first `tokens` tokens, a multiple of `segment_length`."""
        ...


class TrainableModel(SegmentModel, Protocol):
    """A `SegmentModel` that `infini.train` can train: also a `torch.nn.Module`, called with these keywords too.

    `targets`, the token that is to follow each, asks for their losses `[batch, tokens]` in nats in place of logits, so that the
    model need not hold the logits of a long text. `memory=False` silences every memory, for the knock-out (each model says what
    that is); `trace` receives the statistics of telemetry. `maps`, asked for with batches that have a long gap only, is described
    in `InfiniTransformer.forward`.
    """

    def parameter_groups(self) -> dict[str, list[str]]: ...

    def enable_recompute(self, on: bool = True) -> None: ...

    def enable_compile(self) -> None: ...

    def save_pretrained(self, folder: str | os.PathLike, dtype: torch.dtype | None = None) -> None: ...
