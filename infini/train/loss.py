"""What training minimizes: every token, and the answers once more."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from infini.data.batch import Batch


class LossSums(NamedTuple):
    """Summed cross-entropies of one batch, in nats, fp32 scalars on the model's device."""

    tokens: torch.Tensor
    answers: torch.Tensor

    def plus(self, other: LossSums) -> LossSums:
        """Both batches' sums."""
        return LossSums(self.tokens + other.tokens, self.answers + other.answers)

    def detach(self) -> LossSums:
        """The same numbers without their history of gradients."""
        return LossSums(self.tokens.detach(), self.answers.detach())


def loss_of(model: Callable, batch: Batch, state: Any = None) -> LossSums:
    """Run ``model`` on a batch and sum the cross-entropy over all tokens and over answer tokens.

    Training minimizes ``w * sum_all / n_all + a * sum_answers / n_answers``, ``w`` and ``a`` 1 by default. Answers are a few
    digits in thousands of bytes; in the plain mean, ``a = 0``, their gradient is as small a part of the whole.
    Sums, not means, are returned, so that accumulated batches can be weighted as one.

    Args:
        model: called as ``model(tokens, targets=following)`` with int64 ``[rows, T]`` both; returns ``(losses, state)``
            with the cross-entropy of each token of ``following`` in nats, ``[rows, T]`` in fp32.
        batch: on the model's device, int64 tokens ``[rows, T + 1]``.
        state: what the model carries of the text before; None at the start of a text.

    Example:
        A model that knows nothing pays ln(vocab) for each token.

        >>> uniform = lambda tokens, targets: (torch.full(tokens.shape, 4.0).log(), None)
        >>> tokens = torch.tensor([[0, 1, 2]])
        >>> sums = loss_of(uniform, Batch(tokens, tokens == 2, segments=1))
        >>> f"{sums.tokens:.4f} {sums.answers:.4f}"
        '2.7726 1.3863'
    """
    return loss_of_span(model, batch, 0, batch.tokens.shape[1] - 1, state)[0]


def loss_of_span(
    model: Callable, batch: Batch, start: int, stop: int, state: Any = None
) -> tuple[LossSums, Any]:
    """:func:`loss_of` for the tokens ``start`` to ``stop - 1`` of the rows, read after ``state``.

    Args:
        model: called as in :func:`read_span`.
        batch: see :func:`loss_of`. Text before its gap is followed by the gap, not by the text behind it.
        start: first token read.
        stop: last token predicted.
        state: what the model carries of the tokens before; None at the start of a text.

    Returns:
        The sums and the state after the last token, with its gradients.
    """
    following = batch.tokens[:, start + 1 : stop + 1]
    if batch.gap is not None and stop == batch.gap.position * batch.segment_length:
        following = torch.cat([following[:, :-1], batch.gap.piece(0, 1)], dim=1)
    losses, state = read_span(model, batch, start, stop, state, targets=following)
    if batch.reset is not None:
        # Copied whole, then cut: only what lies in one piece of pinned memory is copied without waiting.
        first_ones = batch.reset.to(losses.device, non_blocking=True)[:, start + 1 : stop + 1]
        losses = losses.masked_fill(first_ones, 0)
    # A product, not indexing: the number of answers would have to be read back from the device.
    answers = losses * batch.answer[:, start + 1 : stop + 1]
    return LossSums(losses.sum(), answers.sum()), state


def read_span(model: Callable, batch: Batch, start: int, stop: int, state: Any, **options: Any) -> tuple[Any, Any]:
    """What ``model(tokens, state, reset=..., **options)`` gives for the tokens ``start`` to ``stop - 1``.

    Neither a state nor a reset that is None is passed on, so that a model may do without.
    """
    if batch.reset is not None:
        options["reset"] = batch.reset[:, start:stop]
    return model(batch.tokens[:, start:stop], *(() if state is None else (state,)), **options)
