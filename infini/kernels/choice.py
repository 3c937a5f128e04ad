"""Which calls run on the kernels. What they cannot do, the plain PyTorch of `infini.memory` does, and the log says why.

`torch` is the plain code, `triton` the kernels, `auto` the kernels wherever they can run on a CUDA device. Rows may differ:
padding and documents that begin inside a row are no reason to fall back. What is:

- feature maps other than ELU + 1;
- heads wider than a program's shared memory can hold (`LARGEST_HEAD`; with `deltanet` it depends on GPU and dtype);
- statistics of what is read (`trace`), which kernels never store, and fp64;
- a GPU before Ampere or not NVIDIA's, or no Triton.
"""

import functools
import importlib.util
import logging

import torch

from infini.errors import InputError

BACKENDS = ("auto", "triton", "torch")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# The scan of delta's maps holds a whole one in shared memory.
LARGEST_HEAD = {"linear": 256, "delta": 128, "gamma_delta": 128, "deltanet": 128}
# Attention within reach has tiles up to here.
LARGEST_LOCAL_HEAD = 256
HAS_TRITON = importlib.util.find_spec("triton") is not None

log = logging.getLogger(__name__)


def choose_memory_backend(
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    *,
    update_rule: str,
    feature_map: str,
    head_dim: int,
    traced: bool,
) -> str:
    """Resolve `auto` for one call of a model, and refuse a backend that cannot run it.

    Args:
        backend: one of `BACKENDS`.
        device, dtype: of the activations.
        update_rule, feature_map, head_dim: as in `InfiniConfig`.
        traced: statistics of what is read are asked for; kernels do not keep it.

    Raises:
        InputError: the backend is unknown, or it is `triton` and cannot run.

    Example:
        >>> case = dict(update_rule="linear", feature_map="elu", head_dim=64, traced=False)
        >>> choose_memory_backend("auto", torch.device("cpu"), torch.float32, **case)
        'torch'
    """
    if backend not in BACKENDS:
        raise InputError(f"the memory backend is {backend!r}; choose one of {', '.join(BACKENDS)}")
    if backend == "torch":
        return backend
    why_not = _why_not(device, dtype, update_rule, feature_map, head_dim, traced)
    if backend == "triton" and why_not:
        raise InputError(f"the memory backend 'triton' cannot run: {why_not}. Use 'auto' or 'torch'")
    if why_not is None and (backend == "triton" or device.type == "cuda"):
        announce(device.type, dtype, "triton", None)
        return "triton"
    announce(device.type, dtype, "torch", why_not if device.type == "cuda" else None)
    return "torch"


@torch.compiler.assume_constant_result
def why_not_local(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why `infini.kernels.local` cannot attend there, or None. Its heads are up to `LARGEST_LOCAL_HEAD` wide.

    Example:
        >>> why_not_local(torch.device("cuda"), torch.float64)
        'the kernel computes in float32, bfloat16 or float16, not torch.float64'
    """
    if dtype not in DTYPES:
        return f"the kernel computes in float32, bfloat16 or float16, not {dtype}"
    return _machine_lacks(device)


@functools.cache
def announce(device: str, dtype: torch.dtype, backend: str, why: str | None) -> None:
    """Log, once for each combination, which backend runs and why."""
    log.info("memory on %s in %s: %s%s", device, dtype, backend, f" ({why})" if why else "")


def _why_not(device, dtype, update_rule, feature_map, head_dim, traced) -> str | None:
    if dtype not in DTYPES:
        return f"the kernels compute in float32, bfloat16 or float16, not {dtype}"
    if update_rule not in LARGEST_HEAD or (feature_map != "elu" and update_rule != "deltanet"):
        rules = " and ".join(map(repr, LARGEST_HEAD))
        return f"there are kernels for update_rule {rules} with feature_map 'elu', not for {update_rule!r} with {feature_map!r}"
    if head_dim > LARGEST_HEAD[update_rule]:
        return f"heads may be {LARGEST_HEAD[update_rule]} wide with update_rule {update_rule!r}, not {head_dim}"
    if traced:
        return "statistics of what is read are asked for"
    lacks = _machine_lacks(device)
    if lacks is None and update_rule == "deltanet":
        return _too_wide(device, dtype, head_dim)
    return lacks


def _too_wide(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Programs of `deltanet` need more shared memory than some GPUs have."""
    from infini.kernels.tiles import shared_memory, widest_deltanet

    widest = widest_deltanet(dtype != torch.bfloat16, shared_memory(device))
    return None if head_dim <= widest else f"heads may be {widest} wide with update_rule 'deltanet' in {dtype} on this GPU, not {head_dim}"


@functools.cache
def _machine_lacks(device: torch.device) -> str | None:
    """What the machine lacks; importing the kernels registers their operators."""
    if not HAS_TRITON:
        return "the package triton is not installed"
    if device.type == "cuda":
        if torch.version.cuda is None:
            return "the kernels are made for NVIDIA GPUs"
        if torch.cuda.get_device_capability(device) < (8, 0):
            return "the GPU is older than Ampere"
    from infini.kernels.parts import INTERPRETED

    if device.type != "cuda" and not INTERPRETED.value:
        return f"Triton needs a CUDA device, not {device.type}, or its interpreter (TRITON_INTERPRET=1)"
    import infini.kernels.delta
    import infini.kernels.deltanet
    import infini.kernels.local
    import infini.kernels.read
    import infini.kernels.read_deltanet
    import infini.kernels.write  # noqa: F401

    return None
