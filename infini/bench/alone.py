"""Every kernel of the memory by itself: launched with any tiles, compared with its plain twin, timed.

The layer's rows say how far the whole is from its floor, these say which kernel it is.
"""

import functools
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace

import torch

from infini.bench.clock import LEAD
from infini.bench.memory import Shape
from infini.bench.pieces import Case, Piece
from infini.bench.trial import Trial, Trials
from infini.kernels.tiles import Tiles

# Short segments, and the widest heads.
SHAPES = (Shape(20, 4096, 256, 4, 4, 128), Shape(1, 65536, 1024, 4, 2, 256))


def small(shape: Shape) -> Shape:
    """The same kernels on few segments, for comparisons."""
    return replace(shape, rows=1, tokens=min(shape.tokens, max(2, 4096 // shape.segment_length) * shape.segment_length))


Job = tuple[Shape, str, Tiles | None]


def prove(job: Job, device: str) -> str | None:
    """Compile one kernel with these tiles and compare it on few segments; None, or why it is out."""
    shape, name, tiles = job
    try:
        _small_pieces(small(shape), device)[name].agree(tiles)
    except Exception as error:  # too little shared memory, a compiler that gives up, numbers that differ
        return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:160]}"
    return None


@functools.lru_cache(maxsize=4)
def _small_pieces(shape: Shape, device: str) -> dict[str, Piece]:
    return Case(shape, torch.device(device)).pieces()


def prove_all(jobs: list[Job], device: torch.device, workers: int | None = None, seconds: float = 60.0) -> Iterator[tuple[Job, str | None]]:
    """`prove` of all jobs, in the order in which they are done; what is compiled lies in Triton's cache then.

    Args:
        workers: processes, each with its own context on the GPU; 0: this one alone. None: as many as there are processors, less two.
        seconds: after which the rest is given up, which is printed.
    """
    workers = max(1, len(os.sched_getaffinity(0)) - 2) if workers is None else workers
    if workers == 0 or not jobs:
        yield from ((job, prove(job, str(device))) for job in jobs)
        return
    end = time.monotonic() + seconds
    with multiprocessing.get_context("spawn").Pool(min(workers, len(jobs)), _start) as pool:
        results = pool.imap_unordered(functools.partial(_numbered, device=str(device)), list(enumerate(jobs)))
        for done in range(len(jobs)):
            try:
                index, why = results.next(timeout=max(0.0, end - time.monotonic()))
            except multiprocessing.TimeoutError:
                print(f"{len(jobs) - done} of {len(jobs)} kernels were not compiled within {seconds:.0f} s", flush=True)
                return
            yield jobs[index], why


def _start() -> None:
    torch.set_num_threads(1)


def _numbered(numbered: tuple[int, Job], device: str) -> tuple[int, str | None]:
    return numbered[0], prove(numbered[1], device)


def trials(device: torch.device, shapes: tuple[Shape, ...], workers: int | None = None) -> Trials:
    """Every kernel of every shape, compared on few segments (all of them compiled beside each other), then timed in full."""
    if device.type != "cuda":
        workers = 0
    jobs: list[Job] = [(shape, name, None) for shape in shapes for name in _small_pieces(small(shape), str(device))]
    why = {job[:2]: reason for job, reason in prove_all(jobs, device, workers)}
    for shape in shapes:
        case = Case(shape, device)
        for name, piece in case.pieces().items():
            reason = why.get((shape, name), "AssertionError: it was not compared")

            def prepare(piece: Piece = piece, reason: str | None = reason) -> Callable[[], object]:
                if reason is not None:
                    raise AssertionError(reason)
                return functools.partial(piece.launch, None)

            facts = {"part": "kernels", "what": name, "rule": shape.variant, "backend": "triton", "shape": asdict(shape)}
            yield Trial(facts, prepare, shape.rows * shape.tokens, piece.work, lead=LEAD)
        del case
