"""One optimizer step; nothing in it waits for the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch.nn.utils import clip_grad_norm_

from infini.data.batch import Batch
from infini.train.loss import LossSums, loss_of


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
) -> StepResult:
    """Learn from several batches as if they were one large batch.

    The two means of the loss are taken over the tokens and the answers of all batches together,
    so a batch with few answers does not weigh more than one with many.

    Args:
        model: called as ``model(tokens)``, see :func:`infini.train.loss.loss_of`.
        optimizer: its parameters are the ones clipped.
        batches: on the CPU, pinned if the copies are not to wait.
        clip: largest norm of the whole gradient.
        device: where the model is.

    Returns:
        The summed losses, the norm before clipping, and the numbers of tokens and answer tokens.
    """
    tokens = sum(batch.predicted_tokens for batch in batches)
    # Counted before the copy to the device, where reading the number would wait for it.
    answers = sum(int(batch.answer[:, 1:].sum()) for batch in batches)
    optimizer.zero_grad()
    total = LossSums(torch.zeros((), device=device), torch.zeros((), device=device))
    for batch in batches:
        sums = loss_of(model, batch.to(device))
        (sums.tokens / tokens + sums.answers / max(1, answers)).backward()
        total = LossSums(*(old + new.detach() for old, new in zip(total, sums, strict=True)))
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = clip_grad_norm_(parameters, clip)
    optimizer.step()
    return StepResult(total, norm, tokens, answers)
