"""Measuring every model of a sweep: one after the other, each with a record in its run's folder."""

from __future__ import annotations

import fcntl
import logging
from collections.abc import Callable, Iterator
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
    found = runs_below(runs)
    name, failed = Path(output).name, []
    for run in found:
        with held(run / name) as mine:
            if not mine:
                logger.info("%s is being measured by another process", run)
                continue
            try:
                measure(run / "model", run / name)
            except Exception as error:  # of one model: the others are measured first
                logger.error("%s failed: %s", run, error, exc_info=None if isinstance(error, InputError) else error)
                failed.append(f"\n  {run}: {error}")
    if failed:
        raise InputError(f"{len(failed)} of {len(found)} runs could not be measured, the others are:{''.join(failed)}")
    return [run / name for run in found]


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
