"""One optimizer step; nothing in it waits for the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch.nn.utils import clip_grad_norm_

from infini.data.batch import Batch
from infini.train.long_gap import gap_loss_of
from infini.train.loss import LossSums, loss_of_span
from infini.train.streams import Streams


class Schedule(Protocol):
    """How the segments of a batch are read and back-propagated through."""

    def loss(self, model: Callable, batch: Batch, state: Any = None) -> LossSums:
        """The loss of a batch that is read after ``state``, for a probe."""

    def learn(
        self, model: Callable, batch: Batch, weigh: Callable[[LossSums], torch.Tensor], state: Any = None
    ) -> tuple[LossSums, Any]:
        """Add the gradient of ``weigh(sums)``, linear in the sums, to the parameters.

        Returns:
            The detached sums and the state behind the batch (None behind one with a gap).
        """


@dataclass(frozen=True)
class Parallel:
    """All segments of a row at once; where the batch has a gap, all before it and then all behind it.

    Attributes:
        gap_read_segments, gap_gradient_segments: most segments of a gap that are read, and with gradient, see
            :func:`infini.train.long_gap.cross`.
    """

    gap_read_segments: int | None = None
    gap_gradient_segments: int | None = None

    def loss(self, model: Callable, batch: Batch, state: Any = None) -> LossSums:
        return self._read(model, batch, state)[0]

    def learn(
        self, model: Callable, batch: Batch, weigh: Callable[[LossSums], torch.Tensor], state: Any = None
    ) -> tuple[LossSums, Any]:
        sums, end = self._read(model, batch, state)
        weigh(sums).backward()
        return sums.detach(), end

    def _read(self, model: Callable, batch: Batch, state: Any) -> tuple[LossSums, Any]:
        if batch.gap is not None:
            return gap_loss_of(model, batch, self.gap_read_segments, self.gap_gradient_segments), None
        return loss_of_span(model, batch, 0, batch.tokens.shape[1] - 1, state)


class StepResult(NamedTuple):
    """What one step measured; the tensors are scalars on the device."""

    sums: LossSums
    gradient_norm: torch.Tensor
    tokens: int
    answers: int


def take_step(
    model: Callable,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[Batch],
    clip: float,
    device: torch.device,
    schedule: Schedule = Parallel(),
    token_weight: float = 1.0,
    streams: Streams | None = None,
    answer_weight: float = 1.0,
) -> StepResult:
    """Learn from several batches as if they were one large batch.

    The two means of the loss are taken over the tokens and the answers of all batches together,
    so a batch with few answers does not weigh more than one with many.

    Args:
        model: called as ``model(tokens, targets=...)``, see :func:`infini.train.loss.loss_of`; by other schedules, and for
            batches with a gap or of a stream, also with a state, see :func:`infini.train.long_gap.gap_loss_of`.
        optimizer: its parameters are the ones clipped.
        batches: on the CPU, pinned if the copies are not to wait.
        clip: largest norm of the whole gradient.
        device: where the model is.
        schedule: how gradients are computed; every schedule but a truncated one gives the same.
        token_weight: of the mean over all tokens.
        streams: where batches of a stream begin; moved on. None: all begin anew.
        answer_weight: of the mean over answers.

    Returns:
        The summed losses, the norm before clipping, and the numbers of tokens and answer tokens.
    """
    tokens = sum(batch.predicted_tokens for batch in batches)
    # Counted before the copy to the device, where reading the number would wait for it.
    answers = sum(int(batch.answer[:, 1:].sum()) for batch in batches)

    def weigh(sums: LossSums) -> torch.Tensor:
        return token_weight * sums.tokens / tokens + answer_weight * sums.answers / max(1, answers)

    streams = Streams() if streams is None else streams
    optimizer.zero_grad()
    total = LossSums(torch.zeros((), device=device), torch.zeros((), device=device))
    for batch in batches:
        sums, end = schedule.learn(model, batch.to(device), weigh, streams.begin(batch))
        streams.end(batch, end)
        total = total.plus(sums)
        del end  # views into the activations of this batch, which the next one needs the room of
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = clip_grad_norm_(parameters, clip)
    optimizer.step()
    return StepResult(total, norm, tokens, answers)
