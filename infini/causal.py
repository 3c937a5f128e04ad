"""Causal attention kernels by name, behind one signature, and which of them can run where.

    flash4      the package flash-attn-4 (`flash_attn.cute`)
    flash3      the package flash-attn-3 (`flash_attn_interface`)
    flash       the package flash-attn, version 2
    cudnn       torch's scaled_dot_product_attention, held to cuDNN
    torch_flash     the same, held to the flash kernel that comes with torch
    efficient   the same, held to the memory-efficient kernel
    varlen      torch's public variable-length flash attention, which knows windows
    sdpa        torch's scaled_dot_product_attention, whatever it takes
"""

import functools
import importlib.util
import inspect
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)
PACKAGES = {"flash": "flash-attn", "flash3": "flash-attn-3", "flash4": "flash-attn-4"}
OF_TORCH = {"cudnn": "CUDNN_ATTENTION", "torch_flash": "FLASH_ATTENTION", "efficient": "EFFICIENT_ATTENTION"}
KERNELS = ("flash4", "flash3", "flash", "cudnn", "torch_flash", "efficient", "varlen", "sdpa")
WINDOWED = ("flash4", "flash3", "flash", "varlen")


def why_not(kernel: str, device: torch.device, dtype: torch.dtype, head_dim: int, window: bool = False) -> str | None:
    """Why a kernel cannot attend there, or None.

    Example:
        >>> why_not("cudnn", torch.device("cpu"), torch.bfloat16, 64)
        'cudnn needs a CUDA device, not cpu'
        >>> why_not("sdpa", torch.device("cpu"), torch.float32, 64) is None
        True
    """
    if window and kernel not in WINDOWED:
        return f"{kernel} knows no window"
    if kernel == "sdpa":
        return None
    if device.type != "cuda":
        return f"{kernel} needs a CUDA device, not {device.type}"
    if dtype not in HALF and kernel != "efficient":
        return f"{kernel} needs float16 or bfloat16, not {dtype}"
    if kernel in PACKAGES and not installed(kernel):
        return f"the package {PACKAGES[kernel]} is not installed"
    capability = torch.cuda.get_device_capability(device)
    if kernel == "flash3" and capability[0] != 9:
        return "flash-attn-3 is made for Hopper"
    if kernel == "varlen" and torch_varlen() is None:
        return "this torch's varlen_attn knows no window"
    if kernel in ("cudnn", "torch_flash", "varlen", "flash") and head_dim > (128 if kernel == "cudnn" else 256):
        return f"{kernel} takes no heads of {head_dim}"
    return None


@functools.cache
def installed(kernel: str) -> bool:
    """Whether the package of a kernel is there; nothing is imported. Versions 2 and 4 share the name `flash_attn`."""
    if kernel == "flash":
        return importlib.util.find_spec("flash_attn_2_cuda") is not None
    if kernel == "flash3":
        return importlib.util.find_spec("flash_attn_interface") is not None
    spec = importlib.util.find_spec("flash_attn")
    folders = [] if spec is None or spec.submodule_search_locations is None else spec.submodule_search_locations
    return any((Path(folder) / "cute").is_dir() for folder in folders)


def attend(kernel: str, q: Tensor, k: Tensor, v: Tensor, window: int | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d)) v over the keys up to a query's own, or the last `window` of these.

    Args:
        kernel: one of `KERNELS` for which `why_not` says nothing.
        q: `[batch, queries, heads, d]`; the last query stands at the last key.
        k, v: `[batch, keys, kv_heads, d]`; without a window as many keys as queries.
        window: tokens seen, itself included.

    Returns:
        `[batch, queries, heads, d]`.
    """
    if kernel == "flash":
        from flash_attn import flash_attn_func

        return flash_attn_func(q, k, v, causal=True, window_size=(-1, -1) if window is None else (window - 1, 0))
    if kernel in ("flash3", "flash4"):
        return _by_package(kernel, q, k, v, window)
    if kernel == "varlen":
        return torch_varlen()(q, k, v, k.shape[1] if window is None else window)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    grouped = _grouped(q.shape[1], k.shape[1])
    if kernel == "sdpa":
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped).transpose(1, 2)
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if grouped and kernel == "efficient":
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        grouped = False
    with sdpa_kernel(getattr(SDPBackend, OF_TORCH[kernel])):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped).transpose(1, 2)


def _grouped(heads: int, groups: int) -> bool:
    """A bool also where a compiler makes symbols of the numbers."""
    return True if heads != groups else False


@torch.compiler.disable  # they are no operators that a compiler could know
def _by_package(kernel: str, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    if kernel == "flash3":
        from flash_attn_interface import flash_attn_func

        attended = flash_attn_func(q, k, v, causal=True, window_size=(-1, -1) if window is None else (window - 1, 0))
    else:
        from flash_attn.cute import flash_attn_func

        attended = flash_attn_func(q, k, v, causal=True, window_size=(None, None) if window is None else (window - 1, 0))
    return attended[0] if isinstance(attended, tuple) else attended


@functools.cache
def torch_varlen():
    """Sliding attention by torch's public variable-length flash attention, where it knows windows; otherwise None."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    known = inspect.signature(varlen_attn).parameters
    if "window_size" not in known or "enable_gqa" not in known:
        return None

    def attend(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
        batch, queries, keys = q.shape[0], q.shape[1], k.shape[1]
        rows = torch.arange(batch + 1, dtype=torch.int32, device=q.device)
        flat = (x.flatten(0, 1) for x in (q, k, v))
        grouped = _grouped(q.shape[2], k.shape[2])
        attended = varlen_attn(
            *flat, rows * queries, rows * keys, queries, keys, window_size=(window - 1, 0), enable_gqa=grouped
        )
        return attended.unflatten(0, (batch, queries))

    return attend
