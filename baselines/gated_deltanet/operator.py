"""The one door to flash-linear-attention, and which calls go through it.

`torch` is the plain code of `rule.py`, `fla` the library's Triton operator, `auto` the operator wherever it can run.
"""

import functools
import importlib.metadata
import importlib.util
import logging
import re

import torch
from torch import Tensor

from baselines.gated_deltanet.rule import gated_delta_rule
from infini.errors import InputError

BACKENDS = ("auto", "fla", "torch")
HALF = (torch.float16, torch.bfloat16)
LARGEST_KEY = 256

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


def why_not(device: torch.device, dtype: torch.dtype, key_head_dim: int, gradients: bool) -> str | None:
    """Why the operator of flash-linear-attention cannot run, or None.

    Example:
        >>> why_not(torch.device("cpu"), torch.bfloat16, 64, gradients=False)
        'flash-linear-attention needs a CUDA device, not cpu'
    """
    if device.type != "cuda":
        return f"flash-linear-attention needs a CUDA device, not {device.type}"
    if not _installed("fla"):
        return "the package flash-linear-attention is not installed (pip install 'infini-attention[fla]')"
    if dtype not in HALF:
        return f"flash-linear-attention needs float16 or bfloat16, not {dtype}"
    if key_head_dim > LARGEST_KEY:
        return f"flash-linear-attention takes keys of at most {LARGEST_KEY}, not {key_head_dim}"
    if gradients and torch.cuda.get_device_capability(device)[0] == 9 and not _installed("tilelang"):
        # github.com/fla-org/flash-linear-attention/issues/640
        triton = _triton_version()
        if (3, 4) <= triton < (3, 7, 1):
            found = ".".join(map(str, triton))
            return f"its gradients are wrong on Hopper with Triton {found}; they need Triton 3.7.1, or the package tilelang"
    return None


@functools.cache
def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


@functools.cache
def _triton_version() -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in re.findall(r"\d+", importlib.metadata.version("triton"))[:3])
    except importlib.metadata.PackageNotFoundError:
        return ()


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
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule  # here, because it imports transformers: seconds

    batch, tokens = q.shape[:2]
    inputs, sequences, last = (q, k, v, log_decay, strength), {}, slice(None)
    if begins is not None:
        if initial is None:
            initial = v.new_zeros(batch, *k.shape[2:], v.shape[-1], dtype=torch.promote_types(torch.float32, v.dtype))
        initial, borders, last = _apart(begins, initial)
        inputs = (x.flatten(0, 1).unsqueeze(0) for x in inputs)
        sequences = {"cu_seqlens": borders.to(q.device)}
    q, k, v, log_decay, strength = (x.contiguous() for x in inputs)
    o, after = chunk_gated_delta_rule(
        q,
        k,
        v,
        g=log_decay,
        beta=strength,
        scale=1.0,
        initial_state=initial,
        output_final_state=True,
        use_qk_l2norm_in_kernel=True,
        **sequences,
    )
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
