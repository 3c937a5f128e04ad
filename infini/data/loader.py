"""Batches in order, made ahead of need; the position in the data is one number."""

from __future__ import annotations

import signal
from collections.abc import Generator
from typing import Protocol

import torch
from torch.utils.data import DataLoader

from infini.data.batch import Batch


class BatchSource(Protocol):
    """Training data by random access: ``source[index]`` is the same batch in every process and run.

    It may have ``digests``, a dict of SHA-256 by name, of the files that it was made from: they are part of a run's identity;
    ``epochs(batches)``, how often its text has been read after so many batches; and ``held_out``, called with a model for its bits
    per byte on text that is not learned from, or None.
    """

    def __getitem__(self, index: int) -> Batch: ...


def load_batches(
    source: BatchSource, start: int, stop: int, *, workers: int = 0, pin_memory: bool = False
) -> Generator[Batch, None, None]:
    """Yield ``source[start]`` to ``source[stop - 1]`` in order; ``close()`` lets go of the workers.

    Because a batch depends on its index alone, any number of workers gives the same batches, and
    a run that resumes at ``start`` meets exactly the data that an uninterrupted one would.

    Args:
        source: random access to batches; must be picklable where worker processes are spawned.
        start: index of the first batch.
        stop: one past the index of the last batch.
        workers: processes that make batches ahead; 0 makes them here, when they are asked for.
        pin_memory: hand out page-locked tensors, which a GPU copies without holding up the host.

    Example:
        >>> class Squares:
        ...     def __getitem__(self, index):
        ...         tokens = torch.full((1, 3), index * index)
        ...         return Batch(tokens, tokens > 0, segments=1)
        >>> [int(batch.tokens[0, 0]) for batch in load_batches(Squares(), 2, 5)]
        [4, 9, 16]
    """
    loader = DataLoader(
        source,
        batch_size=None,
        sampler=range(start, stop),
        num_workers=workers,
        pin_memory=pin_memory,
        prefetch_factor=4 if workers else None,
        worker_init_fn=_leave_interrupts_to_the_parent,
        # Its own generator: starting the workers must not advance the random state of training.
        generator=torch.Generator(),
    )
    yield from loader


def _leave_interrupts_to_the_parent(worker: int) -> None:
    # Ctrl-C, and many a job scheduler's SIGTERM, reaches every process of the job, but the loop
    # still needs its data to finish the step. Workers end when the loop lets go of them.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
