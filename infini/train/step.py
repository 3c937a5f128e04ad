"""One optimizer step; nothing in it waits for the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch.nn.utils import clip_grad_norm_

from infini.data.batch import Batch
from infini.train.long_gap import gap_loss_of
from infini.train.loss import LossSums, loss_of


class Schedule(Protocol):
    """How the segments of a batch are read and back-propagated through."""

    def loss(self, model: Callable, batch: Batch) -> LossSums:
        """The batch's loss, for a probe."""

    def learn(self, model: Callable, batch: Batch, weigh: Callable[[LossSums], torch.Tensor]) -> LossSums:
        """Add the gradient of ``weigh(sums)``, linear in the sums, to the parameters; the detached sums."""


class Parallel:
    """All segments of a row at once; where the batch has a gap, all before it and then all behind it."""

    def loss(self, model: Callable, batch: Batch) -> LossSums:
        return loss_of(model, batch) if batch.gap is None else gap_loss_of(model, batch)

    def learn(self, model: Callable, batch: Batch, weigh: Callable[[LossSums], torch.Tensor]) -> LossSums:
        sums = self.loss(model, batch)
        weigh(sums).backward()
        return sums.detach()


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
) -> StepResult:
    """Learn from several batches as if they were one large batch.

    The two means of the loss are taken over the tokens and the answers of all batches together,
    so a batch with few answers does not weigh more than one with many.

    Args:
        model: called as ``model(tokens)``, see :func:`infini.train.loss.loss_of`; by other schedules, and for
            batches with a gap, also with a state, see :func:`infini.train.long_gap.gap_loss_of`.
        optimizer: its parameters are the ones clipped.
        batches: on the CPU, pinned if the copies are not to wait.
        clip: largest norm of the whole gradient.
        device: where the model is.
        schedule: how gradients are computed; every schedule but a truncated one gives the same.
        token_weight: of the mean over all tokens, beside 1 for the mean over answers.

    Returns:
        The summed losses, the norm before clipping, and the numbers of tokens and answer tokens.
    """
    tokens = sum(batch.predicted_tokens for batch in batches)
    # Counted before the copy to the device, where reading the number would wait for it.
    answers = sum(int(batch.answer[:, 1:].sum()) for batch in batches)

    def weigh(sums: LossSums) -> torch.Tensor:
        return token_weight * sums.tokens / tokens + sums.answers / max(1, answers)

    optimizer.zero_grad()
    total = LossSums(torch.zeros((), device=device), torch.zeros((), device=device))
    for batch in batches:
        total = total.plus(schedule.learn(model, batch.to(device), weigh))
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = clip_grad_norm_(parameters, clip)
    optimizer.step()
    return StepResult(total, norm, tokens, answers)
