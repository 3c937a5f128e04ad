"""Causal attention near a token: inside its segment, or over the last `window` tokens; backends behind one signature.

`sdpa` is torch's own fused attention, `eager` softmax written out, in any dtype, `triton` the kernel of `infini.kernels.local`; the
others are named in `infini.causal`. `auto` takes flash-attn where it is installed and can run, and `sdpa` otherwise; `sdpa` on Hopper and
later for whole segments too, where torch takes cuDNN (results/benchmarks/h200/local: 0.53 to 0.76 of the time of flash-attn 2's algorithm).

These attend whole segments, and flash-attn windows of rows that are alike. For every other reach (windows without flash-attn,
packed documents, padded rows, open segments) they all but `eager` and the kernels asked for by name take `triton` in 16 bits on a
CUDA device, or else bands of queries under a mask; `triton` takes it for everything. Each choice is logged once.
"""

import functools
import logging

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from infini.causal import HALF, WINDOWED, attend, installed, torch_varlen, why_not
from infini.errors import InputError
from infini.kernels.choice import LARGEST_LOCAL_HEAD, why_not_local
from infini.segments import SegmentPlan

BACKENDS = ("auto", "flash4", "flash3", "flash", "cudnn", "torch_flash", "triton", "sdpa", "eager")

# Queries of a band that share one piece of keys. Smaller wastes less on masked scores, larger makes fewer, fuller products.
BAND = 128

HAS_FLASH_ATTN = installed("flash")

log = logging.getLogger(__name__)


def local_attention(q: Tensor, k: Tensor, v: Tensor, plan: SegmentPlan, backend: str = "auto") -> Tensor:
    """Attend causally to the local context: softmax(q k^T / sqrt(d)) v over the tokens that the plan lets each token see.

    Equation (2) of arXiv:2404.07143 for `segment`; for `sliding` the same over the last `window` tokens of the document.

    Args:
        q: queries of the new tokens, rotary positions applied, `[batch, tokens, heads, d]`.
        k, v: `[batch, history + tokens, kv_heads, d]`, the plan's line; keys with rotary positions.
        plan: the places of the tokens.
        backend: one of `BACKENDS`.

    Returns:
        `[batch, tokens, heads, d]` in the dtype of `q`.

    Raises:
        InputError: the backend is unknown, or cannot run here.
    """
    backend = choose_backend(backend, q.device.type, q.dtype, plan.sliding)
    if backend == "triton":
        return _in_reach(q, k, v, plan, backend)
    if plan.uniform and not plan.sliding and (plan.segments > 1 or plan.opened == 0):
        # All segments at once: they fold into the batch and need no mask.
        q, k, v = (rearrange(plan.line_to_grid(x), "b s n h d -> (b s) n h d") for x in (q, k, v))
        attended = _causal(q, k, v, backend)
        return plan.grid_to_line(attended.unflatten(0, (plan.batch, plan.segments)))
    if plan.uniform and plan.sliding and backend != "eager" and q.is_cuda and q.dtype in HALF:
        start = plan.history - plan.visible
        kernel = _window_kernel(backend)
        if kernel is not None:
            return attend(kernel, q, k[:, start:].to(q.dtype), v[:, start:].to(q.dtype), plan.span)
    return _in_reach(q, k, v, plan, backend)


def choose_backend(backend: str, device: str, dtype: torch.dtype, windows: bool = False) -> str:
    """Resolve `auto`, for windows or for whole segments, and refuse a backend that cannot run.

    Example:
        >>> choose_backend("auto", "cpu", torch.float32)
        'sdpa'
    """
    if backend not in BACKENDS:
        raise InputError(f"the attention backend is {backend!r}; choose one of {', '.join(BACKENDS)}")
    missing = None
    if not HAS_FLASH_ATTN:
        missing = "the package flash-attn is not installed"
    elif device != "cuda":
        missing = f"flash-attn needs a CUDA device, not {device}"
    elif dtype not in HALF:
        missing = f"flash-attn needs float16 or bfloat16, not {dtype}"
    if backend == "triton":
        missing = why_not_local(torch.device(device), dtype)
    elif backend not in ("auto", "flash", "sdpa", "eager"):
        missing = why_not(backend, torch.device(device), dtype, head_dim=64)
    if backend not in ("auto", "sdpa", "eager") and missing:
        raise InputError(f"the attention backend {backend!r} cannot run: {missing}. Use 'auto', 'sdpa' or 'eager'")
    if backend == "auto":
        return "sdpa" if missing or (not windows and _on_hopper()) else "flash"
    return backend


@functools.cache
def _on_hopper() -> bool:
    """Whether the GPU is a Hopper or newer."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)


@functools.cache
def announce_backend(backend: str, device: str, dtype: torch.dtype) -> None:
    """Log, once for each combination, which backend runs and why."""
    log.info("local attention on %s in %s: %s", device, dtype, backend)
    if backend != "flash" and device == "cuda" and dtype in HALF:
        kernel = _window_kernel(backend)
        log.info("flash-attn is %s%s", "installed but not asked for" if HAS_FLASH_ATTN else "not installed",
                 f"; windows of rows that are alike run in {kernel}" if kernel else "")


def _window_kernel(backend: str) -> str | None:
    """The kernel of sliding attention on a CUDA device: the backend's own, otherwise torch's; None where bands must do."""
    if backend in WINDOWED:
        return backend
    return "varlen" if torch_varlen() is not None else None


def _causal(q: Tensor, k: Tensor, v: Tensor, backend: str) -> Tensor:
    """Causal attention inside segments that stand in the batch."""
    if backend not in ("sdpa", "eager"):
        return attend(backend, q, k.to(q.dtype), v.to(q.dtype))
    q, k, v = _heads_first(q, k, v)
    if backend == "eager":
        tokens = q.shape[-2]
        seen = torch.ones(tokens, tokens, dtype=torch.bool, device=q.device).tril()
        return _softmax_attention(q, k, v, seen).transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def _in_reach(q: Tensor, k: Tensor, v: Tensor, plan: SegmentPlan, backend: str) -> Tensor:
    """Attention whose reach differs from token to token: by the kernel made for it, or in bands; one token alone under one mask."""
    if plan.tokens == 1:
        attention = _softmax_attention if backend == "eager" else F.scaled_dot_product_attention
        return attention(*_heads_first(q, k, v), plan.seen_by_one).transpose(1, 2)
    # A bool also where a compiler makes symbols of the numbers.
    too_wide = True if q.shape[-1] > LARGEST_LOCAL_HEAD else False
    if _has_kernel(backend, q.device, q.dtype, too_wide):
        from infini.kernels.local import attend_in_reach

        return attend_in_reach(q, k.to(q.dtype), v.to(q.dtype), plan.earliest, plan.span)[0]
    return banded(q, k, v, plan, backend)


@torch.compiler.assume_constant_result
def _has_kernel(backend: str, device: torch.device, dtype: torch.dtype, too_wide: bool) -> bool:
    """Whether attention within reach runs on its kernel.

    Raises:
        InputError: it was asked for by name and cannot run.
    """
    if backend != "triton" and (backend == "eager" or device.type != "cuda"):
        return False
    why = _why_bands(backend, device, dtype, too_wide)
    if backend == "triton" and why:
        raise InputError(f"the attention backend 'triton' cannot run: {why}. Use 'auto', 'sdpa' or 'eager'")
    return why is None


@functools.cache
def _why_bands(backend: str, device: torch.device, dtype: torch.dtype, too_wide: bool) -> str | None:
    """Why attention within reach runs in bands, or None; logged once for each combination."""
    why = f"heads may be {LARGEST_LOCAL_HEAD} wide" if too_wide else why_not_local(device, dtype)
    if backend not in ("flash", "sdpa", "triton"):
        why = f"{backend!r} was asked for"
    elif backend != "triton" and dtype not in HALF:
        why = f"in {dtype} only 'triton' by name"
    within = "everything" if backend == "triton" else "windows, packed and padded rows"
    log.info("%s on %s in %s: %s", within, device.type, dtype, f"masked bands ({why})" if why else "triton")
    return why


def banded(q: Tensor, k: Tensor, v: Tensor, plan: SegmentPlan, backend: str) -> Tensor:
    """Attention whose reach differs from token to token, at a cost linear in the tokens.

    Bands of queries meet the keys from `span` before the band's first token to its last, under a mask from the plan.

    Args:
        q, k, v, plan: as of `local_attention`.
        backend: `eager`; any other takes `scaled_dot_product_attention`.
    """
    tokens, span = plan.tokens, plan.span
    band = min(BAND, tokens)
    bands, fill = -(-tokens // band), -tokens % band
    reach = span + band
    # Key 0 of a band stands `span` tokens before its first query; the fill at the end is seen by fill queries alone.
    ahead = span - plan.history
    q, k, v = _heads_first(F.pad(q, (0, 0) * 2 + (0, fill)), *(F.pad(x, (0, 0) * 2 + (ahead, fill)) for x in (k, v)))
    k, v = (rearrange(x.unfold(2, reach, band), "b h c d n -> (b c) h n d") for x in (k, v))
    q = rearrange(q, "b h (c n) d -> (b c) h n d", n=band)
    place = torch.arange(tokens + fill, device=q.device)
    earliest = torch.cat([plan.earliest + ahead, (span + place[tokens:]).expand(len(plan.earliest), -1)], dim=1)
    first, last = (x.unflatten(1, (bands, band)).unsqueeze(-1) for x in (earliest, (span + place).unsqueeze(0)))
    key = (torch.arange(bands, device=q.device)[:, None] * band + torch.arange(reach, device=q.device)).unsqueeze(1)
    seen = (key >= first) & (key <= last)
    seen = seen.expand(plan.batch, -1, -1, -1).flatten(0, 1).unsqueeze(1)
    attention = _softmax_attention if backend == "eager" else F.scaled_dot_product_attention
    attended = attention(q, k, v, seen)
    return rearrange(attended, "(b c) h n d -> b (c n) h d", b=plan.batch)[:, :tokens]


def _softmax_attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """Attention written out; `seen` is a bool mask of what each query may see."""
    scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
    return scores.masked_fill(~seen, float("-inf")).softmax(dim=-1) @ v


def _heads_first(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`[b, n, h, d]` to `[b, h, n, d]`, each key/value head repeated for the query heads of its group (0, 0, 1, 1, ...)."""
    group = q.shape[2] // k.shape[2]
    k, v = (x.to(q.dtype) for x in (k, v))
    if group > 1:
        k, v = (x.repeat_interleave(group, dim=2) for x in (k, v))
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
