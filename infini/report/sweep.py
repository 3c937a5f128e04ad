"""A sweep gathered from what its jobs left behind: settings, each with its seeds, and the learning rate of each."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from infini.errors import InputError
from infini.report.jobs import find_jobs, planned
from infini.report.perplexity import summary
from infini.report.record import read_record

SEEDS = ("seed", "train.seed", "task.seed")
TUNED = "train.learning_rate"
PICK = "loss"
# Of what a rate is picked by: the first of these is better where it is larger, all other metrics where they are smaller.
LARGER_IS_BETTER = ("exact_match", "digit_accuracy", "answer_accuracy")
NOT_BEGUN, UNFINISHED = "not begun", "not finished"


@dataclass(frozen=True)
class Run:
    """One job and what is known of it.

    Attributes:
        overrides: how it was asked for, key -> value.
        record: of its training, or None.
        problem: why there is none.
        evaluations: records below its folder, by the name of theirs.
        folder: of a finished run.
    """

    overrides: Mapping[str, str]
    record: Mapping[str, Any] | None = None
    problem: str | None = None
    evaluations: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    folder: Path | None = None


@dataclass(frozen=True)
class Setting:
    """Runs that differ in their seed alone.

    Attributes:
        values: what tells this setting from the others, one for each key of the sweep.
        rate: the tuned value, "" where nothing is tuned.
        runs: one for each seed.
    """

    values: tuple[str, ...]
    rate: str
    runs: tuple[Run, ...]

    @property
    def finished(self) -> list[Run]:
        return [run for run in self.runs if run.record is not None]

    def metric(self, name: str) -> list[float]:
        """A metric of training, of each seed that has it."""
        found = (run.record["metrics"].get(name) for run in self.finished)
        return [value for value in found if value is not None]


@dataclass(frozen=True)
class Sweep:
    """All settings of a sweep.

    Attributes:
        keys: of the overrides that differ, without the seed's and the tuned one.
        settings: in the order of the plan, then of their names; those of the same values differ in the rate.
        pick: the number that picks the rate, see :func:`validation`.
    """

    keys: tuple[str, ...]
    settings: tuple[Setting, ...]
    pick: str = PICK

    def rates(self) -> dict[tuple[str, ...], list[Setting]]:
        """The settings of each row, by rate."""
        rows: dict[tuple[str, ...], list[Setting]] = {}
        for setting in self.settings:
            rows.setdefault(setting.values, []).append(setting)
        return rows

    def best(self) -> list[Setting]:
        """For each row the rate at which most seeds have `pick` (of equals, finished), among those the one with its best mean, of equals the
        one nearest to the middle of the row's rates."""
        return [self._best(row) for row in self.rates().values()]

    def picked_by(self, setting: Setting) -> float | None:
        """The mean over seeds of what the rate is picked by; None where no seed has it."""
        found = self.pick_of(setting)
        return math.fsum(found) / len(found) if found else None

    def pick_of(self, setting: Setting) -> list[float]:
        """What the rate is picked by, of each seed that has it."""
        return [value for run in setting.finished if (value := validation(run, self.pick)) is not None]

    def evaluations(self) -> list[str]:
        """Names of the evaluations, without the one that picks the rate: it is no test any more."""
        names = {name for setting in self.settings for run in setting.runs for name in run.evaluations}
        return sorted(names - {self.pick.rpartition("/")[0]})

    def _best(self, row: Sequence[Setting]) -> Setting:
        middle = (len(row) - 1) / 2
        return max(enumerate(row), key=lambda placed: (*self._rank(placed[1]), -abs(placed[0] - middle)))[1]

    def _rank(self, setting: Setting) -> tuple[int, int, float]:
        value = self.picked_by(setting)
        if value is None:
            return -1, 0, 0.0
        larger = self.pick.rpartition("/")[2] in LARGER_IS_BETTER
        return len(self.pick_of(setting)), len(setting.finished), value if larger else -value


def gather(folder: Path, pick: str = PICK, tuned: str = TUNED) -> Sweep:
    """Reads the sweep in a folder, from its records and the notes of its jobs alone.

    Args:
        folder: of the sweep; runs are at any depth below, and below each run the records that were measured with its model.
        pick: see :func:`validation`.
        tuned: key of the override whose value is picked for each row.

    Raises:
        InputError: there are no runs, a record cannot be read, or no run has the number to pick by though rates differ.
    """
    runs = find_runs(folder)
    if not runs:
        raise InputError(f"there are no training runs in {folder} or below: give the output folder of a sweep")
    named = {key for run in runs for key in run.overrides}
    differ = sorted(key for key in named if len({run.overrides.get(key) for run in runs}) > 1)
    keys = tuple(key for key in differ if key not in (*SEEDS, tuned))
    found: dict[tuple, list[Run]] = {}
    for run in runs:
        rate = run.overrides.get(tuned, "default") if tuned in differ else ""
        found.setdefault((tuple(run.overrides.get(key, "-") for key in keys), rate), []).append(run)
    order = list(dict.fromkeys(tuple(job.get(key, "-") for key in keys) for job in map(_as_mapping, planned(folder))))
    names = sorted(found, key=lambda name: (order.index(name[0]) if name[0] in order else len(order), name[0], _as_number(name[1])))
    sweep = Sweep(keys, tuple(Setting(*name, tuple(found[name])) for name in names), pick)
    if tuned in differ and not any(sweep.picked_by(setting) is not None for setting in sweep.settings):
        raise InputError(f"pick is {pick!r}, which no run has: name a metric of training, or NAME/METRIC of the records in RUN/NAME")
    return sweep


def find_runs(folder: Path) -> list[Run]:
    """The runs below a folder: those with a training record, and the jobs of a sweep that have none."""
    runs = []
    records = {path.parent: read_record(path) for path in sorted(folder.rglob("record.json"))}
    trained = {home for home, record in records.items() if record["kind"] == "train"}
    for home in sorted(trained):
        below = {str(at.relative_to(home)): record for at, record in records.items() if at != home and home in at.parents}
        runs.append(Run(_as_mapping(overrides_of(records[home])), records[home], None, below, home))
    for job in find_jobs(folder):
        if job.folder is None or job.folder not in trained:
            problem = NOT_BEGUN if job.folder is None else job.error or UNFINISHED
            runs.append(Run(_as_mapping(job.overrides), None, problem))
    return runs


def overrides_of(record: Mapping[str, Any]) -> list[str]:
    """How a run was asked for; of records that do not say it, what its command says."""
    if record.get("overrides"):
        return list(record["overrides"])
    return [word for word in shlex.split(record["command"]) if "=" in word and not word.startswith(("output=", "-"))]


def validation(run: Run, pick: str) -> float | None:
    """The number that says how good a run is, before anything is tested.

    Args:
        run: a finished one.
        pick: a metric of training, "answer_loss"; or "NAME/METRIC", METRIC of the record in the run's folder NAME: exact_match or
            digit_accuracy of all prompts of a passkey record, bits_per_byte or another total of a perplexity record.

    Returns:
        None where the run does not have it.
    """
    name, _, metric = pick.rpartition("/")
    if not name:
        return run.record["metrics"].get(metric)
    record = run.evaluations.get(name)
    if record is None:
        return None
    if record["kind"] == "perplexity":
        return summary(record["rows"]).get(metric)
    counts = [row.get("samples") or row["names"] for row in record["rows"]]
    if metric not in record["rows"][0]:
        return None
    return math.fsum(n * row[metric] for n, row in zip(counts, record["rows"], strict=True)) / sum(counts)


def _as_mapping(overrides: Sequence[str]) -> dict[str, str]:
    return {key.lstrip("+~"): value for key, _, value in (override.partition("=") for override in overrides)}


def _as_number(text: str) -> tuple[float, str]:
    try:
        return float(text), text
    except ValueError:
        return math.inf, text
