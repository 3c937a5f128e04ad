"""What training, sessions, tasks and baselines know of a model."""

from typing import Any, Protocol, Self

import torch
from torch import Tensor


class SegmentState(Protocol):
    """State of a batch of streams: a value that goes in and comes out of every call."""

    nbytes: int
    batch_size: int

    def detach(self) -> Self: ...
    def clone(self) -> Self: ...
    def to(self, device: torch.device | str) -> Self: ...
    def select(self, rows: Tensor) -> Self: ...
    def reset(self, where: Tensor) -> Self: ...


class SegmentModel(Protocol):
    """A causal language model that reads a text in pieces of any size; the state is all that it knows of the pieces before."""

    config: Any

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

    def state_bytes(self, tokens: int, batch_size: int = 1) -> int: ...
