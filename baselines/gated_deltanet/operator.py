"""Which calls go to the operator of flash-linear-attention, and how rows become its sequences.

`torch` is the plain code of `rule.py`, `fla` the library's Triton operator, `auto` the operator wherever it can run.
"""

import functools
import logging

import torch
from torch import Tensor

from baselines.gated_deltanet.rule import gated_delta_rule
from infini.errors import InputError
from infini.gated_delta import gated_delta_by_fla, why_not

BACKENDS = ("auto", "fla", "torch")

log = logging.getLogger(__name__)


def choose_recurrence(backend: str, device: torch.device, dtype: torch.dtype, key_head_dim: int, gradients: bool) -> str:
    """Resolve `auto` for one call of a model, and refuse a backend that cannot run it.

    Args:
        backend: one of `BACKENDS`.
        device, dtype: of the activations.
        key_head_dim: width of queries and keys.
        gradients: there may be a backward pass.

    Raises:
        InputError: the backend is unknown, or it is `fla` and cannot run.

    Example:
        >>> choose_recurrence("auto", torch.device("cpu"), torch.float32, 64, gradients=True)
        'torch'
    """
    if backend not in BACKENDS:
        raise InputError(f"the recurrence backend is {backend!r}; choose one of {', '.join(BACKENDS)}")
    why = None if backend == "torch" else why_not(device, dtype, key_head_dim, gradients)
    if backend == "fla" and why:
        raise InputError(f"the recurrence backend 'fla' cannot run: {why}. Use 'auto' or 'torch'")
    chosen = "torch" if backend == "torch" or why else "fla"
    _announce(device.type, dtype, chosen, why if device.type == "cuda" else None)
    return chosen


@functools.cache
def _announce(device: str, dtype: torch.dtype, backend: str, why: str | None) -> None:
    """Log, once for each combination, which backend runs and why."""
    log.info("gated delta rule on %s in %s: %s%s", device, dtype, backend, f" ({why})" if why else "")


def recur(
    backend: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    strength: Tensor,
    initial: Tensor | None,
    begins: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`gated_delta_rule` by the backend that `choose_recurrence` found.

    Args:
        backend: `fla` or `torch`.
        q, k, v, log_decay, strength, initial: as in `gated_delta_rule`; log_decay, strength and initial in fp32 or fp64.
        begins: the same, on the CPU.
    """
    rule = _by_fla if backend == "fla" else gated_delta_rule
    return rule(q, k, v, log_decay, strength, initial, begins)


def _by_fla(q, k, v, log_decay, strength, initial, begins) -> tuple[Tensor, Tensor]:
    """The library's operator; documents inside rows become sequences of their own, each after its own matrix."""
    batch, tokens = q.shape[:2]
    inputs, borders, last = (q, k, v, log_decay, strength), None, slice(None)
    if begins is not None:
        if initial is None:
            initial = v.new_zeros(batch, *k.shape[2:], v.shape[-1], dtype=torch.promote_types(torch.float32, v.dtype))
        initial, borders, last = _apart(begins, initial)
        inputs, borders = (x.flatten(0, 1).unsqueeze(0) for x in inputs), borders.to(q.device)
    o, after = gated_delta_by_fla(*inputs, initial, borders)
    return o.reshape(batch, tokens, *o.shape[2:]), after[last]


def _apart(begins: Tensor, initial: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows cut where documents begin: the sequences' first matrices, their borders, and each row's last sequence."""
    starts = begins.clone()
    starts[:, 0] = True
    borders = torch.cat([starts.flatten().nonzero().flatten(), torch.tensor([begins.numel()])])
    until = starts.sum(dim=1).cumsum(dim=0)
    first = (until - starts.sum(dim=1)).to(initial.device)
    kept = torch.where(begins[:, 0].to(initial.device)[:, None, None, None], torch.zeros_like(initial), initial)
    matrices = initial.new_zeros(len(borders) - 1, *initial.shape[1:]).index_copy(0, first, kept)
    return matrices, borders, (until - 1).to(initial.device)
