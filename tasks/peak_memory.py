"""Peak memory of a stretch of work: of the GPU's allocator, or of the whole process on a CPU."""

from __future__ import annotations

from pathlib import Path

import torch

from infini.errors import InputError


def start_peak(device: torch.device) -> None:
    """Begins a new peak.

    Args:
        device: where the work runs.

    Raises:
        InputError: on a CPU whose system cannot reset a process's peak (not Linux).
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        # 5 sets the high-water mark of resident memory back to what is resident now (proc(5)).
        Path("/proc/self/clear_refs").write_text("5")
    except OSError as error:
        raise InputError(
            f"cannot reset this process's peak memory ({error}); measure on Linux or on a GPU"
        ) from None


def peak_bytes(device: torch.device) -> int:
    """The peak since :func:`start_peak`, in bytes: tensors on a GPU, resident memory on a CPU.

    Example:
        >>> cpu = torch.device("cpu")
        >>> start_peak(cpu)
        >>> before = peak_bytes(cpu)
        >>> held = torch.ones(64 * 2**20)  # 256 MiB
        >>> peak_bytes(cpu) - before > 128 * 2**20
        True
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise InputError("/proc/self/status names no VmHWM; measure on Linux or on a GPU")
