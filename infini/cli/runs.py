"""Work on every model of a sweep: one after the other, shared by as many processes as are started."""

from __future__ import annotations

import errno
import fcntl
import json
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
    from infini.train.held_out import read_note

    # A run's best weights are no run of their own.
    found = sorted(path.parents[1] for path in folder.rglob(f"model/{CONFIG_FILE}") if read_note(path.parent) is None)
    if not found:
        raise InputError(f"there is no trained model in {folder} or below: give the output folder of a sweep")
    return found


def picked_runs(folder: Path) -> list[Path]:
    """The finished runs below a folder at the learning rate that is picked for their row, sorted.

    What it is picked by is noted in the sweep by `infini report FOLDER pick=...`; unless it is, the training loss.

    Raises:
        InputError: there is none.
    """
    from infini.report.jobs import PLAN
    from infini.report.sweep import PICK, gather

    plan = folder / PLAN
    pick = json.loads(plan.read_bytes()).get("report", {}).get("pick", PICK) if plan.exists() else PICK
    found = sorted(run.folder for setting in gather(folder, pick).best() for run in setting.finished)
    if not found:
        raise InputError(f"no run in {folder} is finished: run the sweep first")
    return found


def require_runs(picked: bool, best: bool, runs: str | None) -> None:
    """Refuse to choose where there is nothing to choose from.

    Raises:
        InputError: `picked` or `best` without `runs`.
    """
    if not runs and (asked := "picked" if picked else "best" if best else None):
        raise InputError(f"{asked} is true, but runs is null: give runs=FOLDER, the sweep that is meant")


def model_of(run: Path, best: bool) -> Path:
    """The folder of a run's weights: its last, or those that were best on held-out text.

    Raises:
        InputError: no weights of that run were kept for being the best.
    """
    from infini.train.held_out import FOLDER, read_note

    if best and read_note(run / FOLDER) is None:
        raise InputError(f"best is true, but {run} has no {FOLDER}: it was trained without train.validate_every")
    return run / FOLDER if best else run / "model"


def is_best(model: str) -> bool:
    """Whether a checkpoint folder is, by its name, that of a run's best weights.

    >>> is_best("runs/a/best/model"), is_best("runs/a/model")
    (True, False)
    """
    from infini.train.held_out import FOLDER

    return Path(model).parts[-2:] == FOLDER.parts


def measure_each(
    runs: Path, output: str, measure: Callable[[Path, Path], None], picked: bool = False, best: bool = False
) -> list[Path]:
    """Calls `measure` with the model of each run and RUN/NAME, NAME being the last part of `output`.

    A run that another process works on at this time is left to it, so that the same command, given once for each GPU, shares the work.

    Args:
        runs: folder of a sweep.
        output: names the folders.
        measure: returns at once where it finds its finished record.
        picked: leave out the runs at other learning rates than those of :func:`picked_runs`.
        best: each run's best weights in place of its last, see :func:`model_of`.

    Returns:
        The folders, in the order of the runs.

    Raises:
        InputError: nothing to measure; or, when all others are measured, what failed.
    """
    name = Path(output).name
    found = picked_runs(runs) if picked else runs_below(runs)
    return work_through([(run, run / name) for run in found], lambda run, folder: measure(model_of(run, best), folder))


def work_through(work: Sequence[tuple[Path, Path]], do: Callable[[Path, Path], None]) -> list[Path]:
    """Calls `do` with each run and the folder of what is made of it, but for those that another process works on.

    Returns:
        The folders.

    Raises:
        InputError: what failed, when all others are done.
        OSError: the disk is full; nothing more is done.
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
                if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise  # what is measured of the others could not be kept either
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
