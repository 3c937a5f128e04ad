"""Is the memory used? Gate distribution, memory share, knock-out, and warnings about dead gates."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from infini.data.batch import Batch

logger = logging.getLogger(__name__)

# Nearer than this to 0 or 1, bf16 rounds memory_weight or 1 - memory_weight away: one side of the
# mix is lost, and with it the gradient w (1 - w) that could bring it back.
SATURATED = 2.0**-9


def knock_out(loss_of: Callable, model: Callable, batch: Batch) -> dict:
    """What the memory is worth: the loss with the memory silenced minus the loss.

    A positive number means that the memory carries something; 0 that nobody listens to it.

    Args:
        loss_of: :func:`infini.train.loss.loss_of` or its like.
        model: called as ``model(tokens, targets=..., memory=..., trace=...)``.
        batch: on the model's device.

    Returns:
        ``knockout_token_loss`` (nats per token), ``knockout_answer_loss`` (nats per answer token;
        None without answers) and ``layers``: one dict per layer as the model traced it in the last call, or None. A batch is one
        call but for a gap, behind which the last one begins, and for a replay, where it is that of the last group.
    """
    trace: dict = {}
    with torch.no_grad():
        with_memory = loss_of(partial(model, trace=trace), batch)
        without = loss_of(partial(model, memory=False), batch)
    answers = int(batch.answer[:, 1:].sum())
    token_gain = (without.tokens - with_memory.tokens).item()
    answer_gain = (without.answers - with_memory.answers).item()
    return {
        "knockout_token_loss": token_gain / batch.predicted_tokens,
        "knockout_answer_loss": answer_gain / answers if answers else None,
        "layers": [_numbers(layer) for layer in trace.get("layers", [])],
    }


def _numbers(layer: dict | None) -> dict | None:
    return layer and {name: value.tolist() for name, value in layer.items()}


class GateWatch:
    """Warns, once for each gate, when a gate is saturated or receives no gradient.

    A gate is any parameter named ``beta`` of the group "memory": a logit per head, with
    ``memory_weight = sigmoid(beta)``. Ask after a backward pass and before the gradients are
    cleared; an exact zero is what a gate receives that its dtype has rounded away, or that
    nothing depends on.
    """

    def __init__(self, model: nn.Module):
        parameters = dict(model.named_parameters())
        self._gates = {
            name: parameters[name]
            for name in model.parameter_groups().get("memory", [])
            if name.rpartition(".")[2] == "beta"
        }
        self._warned: set[tuple[str, str]] = set()

    def check(self) -> None:
        for name, beta in self._gates.items():
            weight = beta.detach().float().sigmoid()
            saturated = torch.minimum(weight, 1 - weight) < SATURATED
            if saturated.any():
                self._warn(
                    name,
                    "saturated",
                    f"heads {_heads(saturated)} are saturated (memory_weight within 2^-9 of 0 or 1): "
                    "bf16 keeps one side of the mix only; start beta nearer to 0 or lower "
                    "memory_learning_rate_scale",
                )
            idle = torch.ones_like(saturated) if beta.grad is None else beta.grad == 0
            if idle.any():
                self._warn(
                    name,
                    "idle",
                    f"heads {_heads(idle)} received no gradient in {beta.dtype}: they cannot learn; "
                    "look for a frozen or saturated beta, or a memory that nothing reads",
                )

    def _warn(self, name: str, kind: str, message: str) -> None:
        if (name, kind) not in self._warned:
            self._warned.add((name, kind))
            logger.warning("gate %s: %s", name, message)


def _heads(mask: torch.Tensor) -> str:
    return ", ".join(str(head) for head in mask.flatten().nonzero().flatten().tolist())
