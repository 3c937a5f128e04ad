"""What training minimizes: every token, and the answers once more."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn import functional as F

from infini.data.batch import Batch


class LossSums(NamedTuple):
    """Summed cross-entropies of one batch, in nats, fp32 scalars on the model's device."""

    tokens: torch.Tensor
    answers: torch.Tensor


def loss_of(model: Callable, batch: Batch) -> LossSums:
    """Run ``model`` on a batch and sum the cross-entropy over all tokens and over answer tokens.

    Training minimizes ``sum_all / n_all + sum_answers / n_answers``. Answers are a few digits in
    thousands of bytes; in the plain mean their gradient would drown, and retrieval is not learned.
    Sums, not means, are returned, so that accumulated batches can be weighted as one.

    Args:
        model: called as ``model(tokens)`` with int64 ``[rows, T]``; returns ``(logits, state)``
            with logits ``[rows, T, vocab]`` in any float dtype (the loss is taken in fp32).
        batch: on the model's device, int64 tokens ``[rows, T + 1]``.

    Example:
        A model that knows nothing pays ln(vocab) for each token.

        >>> uniform = lambda tokens: (torch.zeros(*tokens.shape, 4), None)
        >>> tokens = torch.tensor([[0, 1, 2]])
        >>> sums = loss_of(uniform, Batch(tokens, tokens == 2, segments=1))
        >>> f"{sums.tokens:.4f} {sums.answers:.4f}"
        '2.7726 1.3863'
    """
    logits, _ = model(batch.tokens[:, :-1])
    losses = F.cross_entropy(
        logits.flatten(0, 1).float(), batch.tokens[:, 1:].flatten(), reduction="none"
    )
    # A product, not indexing: the number of answers would have to be read back from the device.
    return LossSums(losses.sum(), (losses * batch.answer[:, 1:].flatten()).sum())
