"""What a sweep leaves beside its records: which jobs were asked for, and which of them failed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from infini.errors import InputError
from infini.report.record import write_atomically

PLAN = "sweep.json"  # in the sweep's folder
NOTE = "job.json"  # in each job's


@dataclass(frozen=True)
class Job:
    """One job of a sweep.

    Attributes:
        overrides: how it was asked for, such as ("model=rmt", "seed=1"), sorted.
        folder: where it works; None: it was never begun.
        error: why it failed the last time; None: it did not.
    """

    overrides: tuple[str, ...]
    folder: Path | None = None
    error: str | None = None

    @property
    def finished(self) -> bool:
        return self.folder is not None and (self.folder / "record.json").exists()


def plan_jobs(sweep: Path, jobs: Iterable[Sequence[str]]) -> None:
    """Notes that these jobs belong to a sweep, beside those noted before."""
    path = sweep / PLAN
    plan = _read(path) if path.exists() else {"jobs": []}
    before = plan["jobs"]
    asked = [sorted(overrides) for overrides in jobs]
    both = before + [overrides for overrides in asked if overrides not in before]
    write_atomically(path, (json.dumps(plan | {"jobs": both}, indent=2) + "\n").encode())


def planned(sweep: Path) -> list[tuple[str, ...]]:
    """The jobs that belong to a sweep by its plan, in the order they were asked for; none where there is no plan."""
    path = sweep / PLAN
    return [tuple(overrides) for overrides in _read(path)["jobs"]] if path.exists() else []


def note_job(folder: Path, overrides: Sequence[str], error: str | None = None) -> None:
    """Notes in a job's folder what it is and, where it failed, why."""
    note = {"overrides": sorted(overrides), "error": error}
    write_atomically(folder / NOTE, (json.dumps(note, indent=2) + "\n").encode())


def find_jobs(sweep: Path) -> list[Job]:
    """The jobs of a sweep: those with a note at any depth below its folder, then those that were planned and never begun.

    Raises:
        InputError: a note that is not JSON.

    Example:
        >>> import tempfile
        >>> sweep = Path(tempfile.mkdtemp())
        >>> plan_jobs(sweep, [["seed=0"], ["seed=1"]])
        >>> note_job(sweep / "a", ["seed=1"], error="the loss became nan")
        >>> [(job.overrides, job.folder is None, job.error) for job in find_jobs(sweep)]
        [(('seed=1',), False, 'the loss became nan'), (('seed=0',), True, None)]
    """
    begun = []
    for path in sorted(sweep.rglob(NOTE)):
        note = _read(path)
        begun.append(Job(tuple(note["overrides"]), path.parent, note["error"]))
    known = {job.overrides for job in begun}
    return begun + [Job(overrides) for overrides in planned(sweep) if overrides not in known]


def _read(path: Path) -> dict:
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise InputError(f"{path} is not JSON ({error}): delete it and run the sweep again") from None
