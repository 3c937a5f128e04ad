"""Work on every model of a sweep: one after the other, shared by as many processes as are started."""

from __future__ import annotations

import fcntl
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from infini.errors import InputError

logger = logging.getLogger(__name__)


def runs_below(folder: Path) -> list[Path]:
    """The finished training runs at any depth below a folder, sorted: those with a model.

    Raises:
        InputError: there is none.
    """
    from infini.checkpoint import CONFIG_FILE

    found = sorted(path.parents[1] for path in folder.rglob(f"model/{CONFIG_FILE}"))
    if not found:
        raise InputError(f"there is no trained model in {folder} or below: give the output folder of a sweep")
    return found


def measure_each(runs: Path, output: str, measure: Callable[[Path, Path], None]) -> list[Path]:
    """Calls `measure` with the model of each run and RUN/NAME, NAME being the last part of `output`.

    A run that another process works on at this time is left to it, so that the same command, given once for each GPU, shares the work.

    Args:
        runs: folder of a sweep.
        output: names the folders.
        measure: returns at once where it finds its finished record.

    Returns:
        The folders, in the order of the runs.

    Raises:
        InputError: nothing to measure; or, when all others are measured, what failed.
    """
    name = Path(output).name
    return work_through([(run, run / name) for run in runs_below(runs)], lambda run, folder: measure(run / "model", folder))


def work_through(work: Sequence[tuple[Path, Path]], do: Callable[[Path, Path], None]) -> list[Path]:
    """Calls `do` with each run and the folder of what is made of it, but for those that another process works on.

    Returns:
        The folders.

    Raises:
        InputError: what failed, when all others are done.
    """
    failed = []
    for run, folder in work:
        with held(folder) as mine:
            if not mine:
                logger.info("%s is left to another process, which works on it", run)
                continue
            try:
                do(run, folder)
            except Exception as error:  # of one model: the others come first
                logger.error("%s failed: %s", run, error, exc_info=None if isinstance(error, InputError) else error)
                failed.append(f"\n  {run}: {error}")
    if failed:
        raise InputError(f"{len(failed)} of {len(work)} runs failed, the others are done:{''.join(failed)}")
    return [folder for _, folder in work]


@contextmanager
def held(folder: Path) -> Iterator[bool]:
    """Whether this process alone works in a folder, as long as the block lasts; a process that dies lets go of it."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
