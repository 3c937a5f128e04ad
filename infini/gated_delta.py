"""The one door to flash-linear-attention: its operator of the gated delta rule, and where that can run."""

import functools
import importlib.metadata
import importlib.util
import re

import torch
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)
LARGEST_KEY = 256


def why_not(device: torch.device, dtype: torch.dtype, key_head_dim: int, gradients: bool) -> str | None:
    """Why the operator of flash-linear-attention cannot run, or None.

    Args:
        device, dtype: of the activations.
        key_head_dim: width of queries and keys.
        gradients: there may be a backward pass.

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


def gated_delta_by_fla(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, strength: Tensor, initial: Tensor | None = None, borders: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Write and read token by token, equation (10) of arXiv:2412.06464, where `why_not` says nothing; k and q are made unit inside.

    Args:
        q, k: `[batch, tokens, heads, d_k]`, 16 bits; q is not scaled.
        v: `[batch, tokens, heads, d_v]`, of the same dtype.
        log_decay: at most 0, `[batch, tokens, heads]`, fp32.
        strength: in [0, 1], like `log_decay`.
        initial: the matrix before each sequence, `[batch or sequences, heads, d_k, d_v]`, fp32; None: zeros.
        borders: int64 `[sequences + 1]`, where the sequences packed into a batch of 1 begin and the last one ends; None: each row is one.

    Returns:
        `[batch, tokens, heads, d_v]` in the dtype of `v`, and the matrices after the last tokens, like `initial`.
    """
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule  # here, because it imports transformers: seconds

    q, k, v, log_decay, strength = (x.contiguous() for x in (q, k, v, log_decay, strength))
    return chunk_gated_delta_rule(
        q,
        k,
        v,
        g=log_decay,
        beta=strength,
        scale=1.0,
        initial_state=initial,
        output_final_state=True,
        use_qk_l2norm_in_kernel=True,
        **({} if borders is None else {"cu_seqlens": borders}),
    )
