"""How long a call takes, and how fast the device copies."""

import statistics
import time
from collections.abc import Callable

import torch


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
