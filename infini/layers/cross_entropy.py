"""The loss of every token without the logits of every token."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recompute

from infini.errors import InputError

# Logits that are held at a time unless a model says otherwise: 256 MiB in fp32.
HELD_LOGITS = 2**26


def losses_of(head: Callable[[Tensor], Tensor], states: Tensor, targets: Tensor) -> Tensor:
    """-log softmax(head(state))[target] of tokens `[n]`, in fp32, or fp64 where the logits are."""
    logits = head(states)
    return F.cross_entropy(logits.to(torch.promote_types(torch.float32, logits.dtype)), targets, reduction="none")


def token_losses(
    states: Tensor, targets: Tensor, head: Callable[[Tensor], Tensor], at_once: int, losses: Callable[..., Tensor] = losses_of
) -> Tensor:
    """-log softmax(head(state))[target] of every token, in nats.

    The head is applied to `at_once` tokens at a time, and to them again in the backward pass: for one more product of the head
    than a loss over all logits, no more than `at_once` x vocabulary of them exist at any time. The numbers are the same.

    Args:
        states: `[batch, tokens, hidden]`, what the head reads.
        targets: int64 `[batch, tokens]`, the token that is to follow each.
        head: gives logits `[n, vocabulary]` for states `[n, hidden]`.
        at_once: tokens, of all rows together, at least 1.
        losses: `losses_of`, or the same in another form.

    Returns:
        `[batch, tokens]` in fp32, or fp64 where the logits are.

    Raises:
        InputError: `at_once` is less.

    Example:
        >>> states, targets = torch.randn(1, 5, 3), torch.tensor([[0, 1, 2, 3, 0]])
        >>> whole, pieces = (token_losses(states, targets, torch.nn.Linear(3, 4), n) for n in (5, 2))
        >>> whole.shape == pieces.shape == targets.shape
        True
    """

    if at_once < 1:
        raise InputError(f"logits of {at_once} tokens at a time (loss_tokens) cannot give a loss; at least 1, or None")
    flat, wanted = states.flatten(0, 1), targets.flatten()
    if len(flat) <= at_once:
        return losses(head, flat, wanted).view_as(targets)
    pieces = zip(flat.split(at_once), wanted.split(at_once), strict=True)
    found = [recompute(losses, head, *piece, use_reentrant=False, preserve_rng_state=False) for piece in pieces]
    return torch.cat(found).view_as(targets)
