"""A job's process in a sweep whose jobs run side by side: its GPU, and how it is stopped."""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import IO

PARENT_VARIABLE = "INFINI_SWEEP"  # the process id of the sweep, for the processes that it starts
STOP = signal.SIGUSR1
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Worker:
    """This process as one of several that a sweep on this machine has started.

    From its making on it leaves SIGINT and SIGTERM, which terminals and schedulers send to every process, to the sweep, and stops on
    STOP alone, which the sweep sends once, and the kernel when the sweep's own process dies. A stopped worker begins no other job.
    """

    _one: Worker | None = None

    @classmethod
    def here(cls) -> Worker | None:
        """The worker that this process is, or None where the sweep runs its jobs itself or on other machines."""
        if cls._one is None and os.environ.get(PARENT_VARIABLE) == str(os.getppid()):
            cls._one = cls()
        return cls._one

    def __init__(self):
        self.stopped = False
        self._busy = False
        self._parent = os.getppid()
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        signal.signal(signal.SIGTERM, self._end)
        signal.signal(STOP, self._stop)
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, STOP)
        self._slot, self._lock = take_slot(Path(tempfile.gettempdir()) / f"infini-{os.getuid()}-{os.getppid()}")

    @contextmanager
    def job(self) -> Iterator[None]:
        """Around a job: STOP ends it with KeyboardInterrupt, or as the job itself answers SIGTERM: training finishes its step."""
        self._busy = True
        try:
            yield
        finally:
            self._busy = False
            self._leave_the_dead()

    def take_gpu(self) -> None:
        """Leaves one GPU visible to this process, by its number among the workers; nothing without GPUs.

        Before CUDA is initialized. The process keeps it from job to job, so that no memory stays behind on another.
        """
        import torch

        if not torch.cuda.is_initialized() and (gpus := torch.cuda.device_count()):
            os.environ["CUDA_VISIBLE_DEVICES"] = gpu_of(self._slot, gpus, os.environ.get("CUDA_VISIBLE_DEVICES"))

    def _stop(self, number: int, frame: object) -> None:
        if not self.stopped:
            self.stopped = True
            signal.getsignal(signal.SIGTERM)(signal.SIGTERM, frame)

    def _end(self, number: int, frame: object) -> None:
        if self._busy:
            raise KeyboardInterrupt
        self._leave_the_dead()

    def _leave_the_dead(self) -> None:
        # Nobody is left to take a result: waiting for work, as joblib's workers do for minutes, would only hold the GPU.
        if os.getppid() != self._parent:
            os._exit(1)


def gpu_of(slot: int, gpus: int, visible: str | None) -> str:
    """The GPU of a worker, as CUDA_VISIBLE_DEVICES names it: workers take turns.

    Args:
        slot: number of the worker.
        gpus: how many are visible.
        visible: CUDA_VISIBLE_DEVICES so far, which may name them by number or by UUID.

    Example:
        >>> [gpu_of(slot, 2, "3,GPU-4ef0") for slot in range(3)]
        ['3', 'GPU-4ef0', '3']
        >>> gpu_of(5, 4, None)
        '1'
    """
    names = visible.split(",") if visible else [str(i) for i in range(gpus)]
    return names[slot % gpus].strip()


def take_slot(folder: Path) -> tuple[int, IO]:
    """The lowest number that no living process holds in this folder, and the file whose lock holds it."""
    folder.mkdir(parents=True, exist_ok=True)
    for slot in count():
        file = (folder / str(slot)).open("w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return slot, file
        except BlockingIOError:
            file.close()


def workers() -> list[int]:
    """Process ids of the children of this process, without joblib's resource tracker, which the sweep still needs."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((process / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == os.getpid() and b"resource_tracker" not in (process / "cmdline").read_bytes():
                found.append(int(process.name))
        except OSError:  # it has ended meanwhile
            continue
    return found
