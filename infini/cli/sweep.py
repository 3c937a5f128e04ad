"""A sweep: the jobs that it is made of, what becomes of each, and how all of them are stopped."""

from __future__ import annotations

import itertools
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from infini.cli.worker import PARENT_VARIABLE, STOP, Worker, workers
from infini.errors import InputError
from infini.report.jobs import Job, find_jobs, note_job, plan_jobs
from infini.report.record import COMMAND_VARIABLE, typed_command

logger = logging.getLogger(__name__)


class Stopped(Exception):
    """A job was stopped, or not begun because its sweep was. Not a KeyboardInterrupt: Hydra's launchers hand on exceptions only."""


@dataclass(frozen=True)
class Plan:
    """The jobs that one command asks for.

    Attributes:
        folder: of the sweep.
        jobs: the overrides of each, sorted.
        side_by_side: they run in processes of their own on this machine.
    """

    folder: Path
    jobs: tuple[tuple[str, ...], ...]
    side_by_side: bool

    def found(self) -> list[Job]:
        """These jobs as their folders show them."""
        return [job for job in find_jobs(self.folder) if job.overrides in self.jobs]


class Planner(Callback):
    """Hydra's hook: notes the jobs of a sweep before the first of them begins."""

    plan: Plan | None = None  # of the sweep that this process runs

    def on_multirun_start(self, config: DictConfig, **unused) -> None:
        swept = config.hydra.sweeper.get("params") or {}
        arguments = [f"{key}={value}" for key, value in swept.items()] + list(config.hydra.overrides.task)
        ignored = ignored_keys(config.hydra)
        jobs = tuple(tuple(sorted(asked_for(job, ignored))) for job in combinations(arguments))
        folder = Path(config.hydra.sweep.dir)
        Planner.plan = Plan(folder, jobs, "joblib" in config.hydra.launcher._target_)
        plan_jobs(folder, jobs)


def combinations(arguments: Sequence[str]) -> list[list[str]]:
    """The jobs that Hydra makes of overrides: each value of one with each of the others; of two for one key the last counts.

    Example:
        >>> combinations(["seed=0,1", "model=rmt", "seed=2,3"])
        [['seed=2', 'model=rmt'], ['seed=3', 'model=rmt']]
    """
    found = {}
    for override in OverridesParser.create().parse_overrides(list(arguments)):
        key = override.get_key_element()
        values = override.sweep_string_iterator() if override.is_sweep_override() else [override.get_value_element_as_str()]
        found[key] = [f"{key}={value}" for value in values]
    return [list(job) for job in itertools.product(*found.values())]


def asked_for(overrides: Sequence[str], ignored: Sequence[str]) -> list[str]:
    """The overrides that decide what a job computes."""
    return [override for override in overrides if override.partition("=")[0] not in ignored]


def ignored_keys(hydra: DictConfig) -> list[str]:
    """Keys that say where and how a job is carried out; they are in no job's name."""
    return list(hydra.job.config.override_dirname.exclude_keys)


def run_job(train: Callable[[], None], folder: Path, overrides: Sequence[str]) -> None:
    """Runs one job of a sweep and notes in its folder how it ended.

    Raises:
        InputError: it failed; the message alone, so that any launcher can hand it on.
        Stopped: in a worker that was told to stop.
    """
    worker = Worker.here()
    if worker is None:
        return _noted(train, folder, overrides)
    if worker.stopped:
        raise Stopped(f"{folder} was not begun")
    try:
        with worker.job():
            worker.take_gpu()
            _noted(train, folder, overrides)
    except KeyboardInterrupt as stop:
        logger.info("stopped: %s", stop)
        raise Stopped(str(stop)) from None


def _noted(train: Callable[[], None], folder: Path, overrides: Sequence[str]) -> None:
    note_job(folder, overrides)
    try:
        train()
    except Exception as error:
        note_job(folder, overrides, str(error) or repr(error))
        expected = isinstance(error, InputError)
        logger.error("%s failed: %s", folder, error, exc_info=None if expected else error)
        raise InputError(str(error) or repr(error)) from None


@contextmanager
def launched() -> Iterator[None]:
    """Around Hydra's run of one job or of a sweep: hands the command to the jobs, stops them all on a signal, says at the end what failed.

    Raises:
        InputError: some jobs failed.
        KeyboardInterrupt: SIGINT or SIGTERM came; every job has finished its step and is saved.
    """
    Planner.plan, stop = None, _StopAll()
    os.environ |= {PARENT_VARIABLE: str(os.getpid()), COMMAND_VARIABLE: typed_command()}
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
        if stop.asked:
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        if Planner.plan is None:  # a single run, which says itself how far it came
            raise
        raise KeyboardInterrupt(_progress(Planner.plan)) from None
    except Exception as error:
        if stop.asked:
            raise KeyboardInterrupt(_progress(Planner.plan)) from None
        if failed := [job for job in Planner.plan.found() if job.error] if Planner.plan else []:
            raise InputError(_failures(failed, Planner.plan)) from error
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for name in (PARENT_VARIABLE, COMMAND_VARIABLE):
            os.environ.pop(name, None)


class _StopAll:
    """The sweep's own answer to a signal: the first is handed to the jobs, the second ends the sweep at once."""

    def __init__(self):
        self.asked = False

    def __call__(self, number: int, frame: object) -> None:
        running = workers() if Planner.plan and Planner.plan.side_by_side else []
        if self.asked or not running:
            raise KeyboardInterrupt
        self.asked = True
        print("stopping: each job finishes its step and saves; once more ends them at once", file=sys.stderr)
        for worker in running:
            os.kill(worker, STOP)


def _progress(plan: Plan) -> str:
    finished = sum(job.finished for job in plan.found())
    return f"{finished} of {len(plan.jobs)} jobs are finished; the same command goes on with the others"


def _failures(failed: Sequence[Job], plan: Plan) -> str:
    lines = "".join(f"\n  {job.folder}: {job.error}" for job in failed)
    return f"{len(failed)} of {len(plan.jobs)} jobs failed, the others are kept; the same command runs what is missing:{lines}"
