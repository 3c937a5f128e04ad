"""One row of a benchmark: what is to be timed, behind the proof that its numbers are right."""

from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any

import torch

from infini.bench.clock import cold_milliseconds
from infini.bench.work import Work
from infini.errors import InputError

Row = dict[str, Any]
Trials = Generator["Trial", Row, None]
"""A part of the benchmark: yields trials, and is sent the finished row of each."""


@dataclass(frozen=True)
class Ceilings:
    """What the device did at most in this run: bytes per second copied, FLOP per second of a bf16 product."""

    copy_bytes_per_second: float
    product_flop_per_second: float

    def floor(self, work: Work) -> float:
        """Milliseconds under which no kernel can stay.

        Example:
            >>> Ceilings(1e12, 1e15).floor(Work(bytes=1e9, flop=2e12))  # the products take longer than the bytes
            2.0
        """
        return 1000 * max(work.bytes / self.copy_bytes_per_second, work.flop / self.product_flop_per_second)


@dataclass(frozen=True)
class Trial:
    """What one row measures.

    Attributes:
        facts: what is timed, JSON values; `part` and `what` at least. `prepare` may add what it found.
        prepare: compares, and gives the call that is to be timed. Raises AssertionError where numbers differ.
        tokens: read by one call.
        work: what the call must move and compute.
        against: name and milliseconds of what it is compared with.
        lead: as of `clock.cold_milliseconds`.
        counts_use: give the share of the product rate that the FLOP are, as model FLOP utilization.
    """

    facts: Row
    prepare: Callable[[], Callable[[], object]]
    tokens: int
    work: Work | None = None
    against: tuple[str, float] | None = None
    counts_use: bool = field(default=False)
    lead: int = 0


def measure(trial: Trial, device: torch.device, ceilings: Ceilings, repeats: int, seconds: float) -> Row:
    """The row of a trial: its facts, and the time or, under `failed`, why there is none."""
    facts = {"tokens": trial.tokens}
    on_gpu, held = device.type == "cuda", 0
    if on_gpu:
        torch.cuda.empty_cache()
        held = torch.cuda.memory_allocated(device)
    try:
        call = trial.prepare()
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(device)
        took, calls = cold_milliseconds(call, device, repeats, seconds, trial.lead)
        if on_gpu:  # beyond what other trials share
            facts["peak_memory_bytes"] = torch.cuda.max_memory_allocated(device) - held
    except torch.OutOfMemoryError:
        return trial.facts | facts | {"failed": "out of memory"}
    except InputError as error:
        return trial.facts | facts | {"failed": str(error)}
    except AssertionError as error:
        return trial.facts | facts | {"failed": f"numbers differ: {error}"}
    except Exception as error:  # a kernel or compiler that fails: the other rows are still worth having
        return trial.facts | facts | {"failed": f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"}
    row = trial.facts | facts | {"milliseconds": took, "calls": calls, "tokens_per_second": 1000 * trial.tokens / took}
    if on_gpu and trial.lead:
        row["launched_ahead"] = True
    if trial.work is not None:
        floor = ceilings.floor(trial.work)
        row |= {"bytes": trial.work.bytes, "flop": trial.work.flop, "floor_milliseconds": floor, "floor_ratio": took / floor}
        if trial.counts_use:
            row["flop_utilization"] = trial.work.flop / ceilings.product_flop_per_second / (took / 1000)
    if trial.against is not None:
        row |= {"against": trial.against[0], "ratio": took / trial.against[1]}
    return row


def fastest(rows: list[Row]) -> Row | None:
    """The row with the least time, of those that have one."""
    return min((row for row in rows if "milliseconds" in row), key=lambda row: row["milliseconds"], default=None)
