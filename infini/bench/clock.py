"""How long a call takes, and how fast the device copies."""

import statistics
import time
from collections.abc import Callable

import torch

# Cycles that a GPU waits before a call of kernels: some four milliseconds, in which the host launches them all, gradient included.
LEAD = 8_000_000


def milliseconds(call: Callable[[], object], device: torch.device, repeats: int = 20, warm_up: int = 3) -> float:
    """The median time of `repeats` calls: by CUDA events on a GPU, by the wall clock elsewhere.

    Example:
        >>> milliseconds(lambda: time.sleep(0.01), torch.device("cpu"), repeats=3, warm_up=0) >= 10
        True
    """
    for _ in range(warm_up):
        call()
    times = []
    for _ in range(repeats):
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end))
        else:
            begin = time.perf_counter()
            call()
            times.append(1000 * (time.perf_counter() - begin))
    return statistics.median(times)


def copy_bandwidth(device: torch.device, size: int = 2**30) -> float:
    """Bytes per second that a copy of `size` bytes reads and writes together, a ceiling for everything that moves bytes."""
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / (milliseconds(lambda: target.copy_(source), device) / 1000)


def cold_milliseconds(
    call: Callable[[], object], device: torch.device, repeats: int = 20, seconds: float = 2.0, lead: int = 0
) -> tuple[float, int]:
    """The median time of a call that finds nothing in the caches, and of how many calls.

    On a GPU more bytes than its second-level cache holds are written before every call; that also hides how long the host takes
    to launch the first kernels.

    Args:
        call: what is timed; it is called once before, to compile and allocate.
        device: where it runs.
        repeats: at most so many calls.
        seconds: after which no further call is timed; one is in any case.
        lead: clock cycles for which a GPU waits before the call, so that the host has launched all of it when it begins.

    Example:
        >>> took, calls = cold_milliseconds(lambda: time.sleep(0.02), torch.device("cpu"), seconds=0.1)
        >>> took >= 20 and 1 <= calls < 10
        True
    """
    flood = torch.empty(2**30 if device.type == "cuda" else 1, dtype=torch.uint8, device=device)
    call()
    times: list[float] = []
    while len(times) < repeats and sum(times) < 1000 * seconds:
        flood.zero_()
        if lead and device.type == "cuda":
            torch.cuda._sleep(lead)
        times.append(milliseconds(call, device, repeats=1, warm_up=0))
    return statistics.median(times), len(times)


def product_rate(device: torch.device, size: int = 8192) -> float:
    """FLOP per second of a bf16 product of square matrices, a ceiling for everything that computes."""
    a, b = (torch.randn(size, size, device=device).to(torch.bfloat16) for _ in range(2))
    return 2 * size**3 / (milliseconds(lambda: a @ b, device) / 1000)
