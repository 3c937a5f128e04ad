"""`infini train -m` with jobs side by side: what fails, what is stopped, what goes on."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext, suppress
from pathlib import Path
from types import SimpleNamespace

import pytest

from infini.cli.sweep import Stopped, asked_for, combinations, run_job
from infini.cli.worker import Worker, gpu_of, take_slot
from infini.errors import InputError
from infini.report.jobs import find_jobs

SWEEP = [sys.executable, "-m", "infini.cli.main", "train", "-m", "debug=tiny", "hydra/launcher=parallel", "hydra.launcher.n_jobs=2", "output=s"]


# Without the number of threads: that is the launcher's to say.
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}


def notes(folder):
    return {path.parent.name: json.loads(path.read_text()) for path in folder.glob("s/*/job.json")}


def records(folder):
    return {path.parent.name: json.loads(path.read_text()) for path in folder.glob("s/*/record.json")}


def wait_for(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def start(*asked, folder):
    """The sweep in a process group of its own, as a terminal gives: Ctrl-C reaches the jobs too."""
    streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    environment = ENVIRONMENT | {"STARTED_IN": str(folder)}  # a mark by which its processes are found
    return subprocess.Popen([*SWEEP, *asked], cwd=folder, env=environment, start_new_session=True, **streams)


def environments():
    """Of all processes that can be asked."""
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            yield path.read_bytes()


def checkpoints(folder):
    return {path.parents[1].name: int(path.name[5:]) for path in folder.glob("s/*/checkpoints/step-*")}


def test_a_stopped_sweep_goes_on_and_failing_jobs_take_no_other_with_them(tmp_path):
    asked = ["train.steps=40", "seed=0,1", "train.clip=1,0", "train.checkpoint_every=1000", "train.knockout_every=1000"]
    process = start(*asked, folder=tmp_path)
    wait_for(lambda: sum(path.stat().st_size > 0 for path in tmp_path.glob("s/*/metrics.jsonl")) == 2)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "each job finishes its step and saves" in errors
    assert "interrupted: 0 of 4 jobs are finished; the same command goes on with the others" in errors
    assert "resource_tracker" not in errors  # it is no job: whoever stops it leaves its semaphores and tracebacks
    stopped = checkpoints(tmp_path)
    assert len(stopped) == 2 and all(0 < step < 40 for step in stopped.values()) and not records(tmp_path)

    again = subprocess.run([*SWEEP, *asked], cwd=tmp_path, capture_output=True, text=True, env=ENVIRONMENT)
    assert again.returncode == 2
    said = again.stderr[again.stderr.index("error: ") :].splitlines()
    assert said[0] == "error: 2 of 4 jobs failed, the others are kept; the same command runs what is missing:"
    assert len(said) == 3 and all(line.endswith("clip is 0.0 but must be greater than 0") for line in said[1:])
    assert "Traceback" not in again.stdout
    for name, step in stopped.items():
        assert f"{name}/checkpoints/step-{step:08}" in again.stdout  # going on from
        steps = [json.loads(line)["step"] for line in (tmp_path / "s" / name / "metrics.jsonl").read_text().splitlines()]
        assert sorted(set(steps)) == list(range(1, 41))

    done = records(tmp_path)
    assert done.keys() == stopped.keys()
    named = [["debug=tiny", f"seed={seed}", "train.clip=1", "train.knockout_every=1000", "train.steps=40"] for seed in (0, 1)]
    assert sorted(record["overrides"] for record in done.values()) == named
    typed = f"infini.cli.main train -m debug=tiny hydra/launcher=parallel hydra.launcher.n_jobs=2 output=s {' '.join(asked)}"
    assert all(record["command"].endswith(typed) for record in done.values())
    assert {record["machine"]["threads"] for record in done.values()} == {max(1, len(os.sched_getaffinity(0)) // 2)}
    assert {name: note["error"] is None for name, note in notes(tmp_path).items()} == {name: name in done for name in notes(tmp_path)}
    assert len(notes(tmp_path)) == len(json.loads((tmp_path / "s" / "sweep.json").read_text())["jobs"]) == 4


def test_jobs_of_a_sweep_that_was_killed_save_and_end(tmp_path):
    process = start("train.steps=100000", "seed=0,1,2", "train.checkpoint_every=100000", folder=tmp_path)
    wait_for(lambda: sum(path.stat().st_size > 0 for path in tmp_path.glob("s/*/metrics.jsonl")) == 2)
    process.kill()
    process.stderr.close()
    process.wait(timeout=60)
    # Nobody holds a GPU, and the third was not begun.
    wait_for(lambda: not any(str(tmp_path).encode() in environment for environment in environments()))
    saved = checkpoints(tmp_path)
    assert len(saved) == len(notes(tmp_path)) == 2
    for name, step in saved.items():
        assert json.loads((tmp_path / "s" / name / "metrics.jsonl").read_text().splitlines()[-1])["step"] == step


def test_workers_hold_the_lowest_free_number(tmp_path):
    (first, one), (second, two) = take_slot(tmp_path), take_slot(tmp_path)
    assert (first, second) == (0, 1)
    one.close()
    third, three = take_slot(tmp_path)
    assert third == 0
    two.close()
    three.close()


def test_a_worker_sees_one_gpu_and_keeps_it(monkeypatch):
    import torch

    worker = Worker.__new__(Worker)
    worker._slot = 5
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(os.environ["CUDA_VISIBLE_DEVICES"].split(",")))
    for _ in range(2):
        worker.take_gpu()
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "5"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    worker.take_gpu()
    assert "CUDA_VISIBLE_DEVICES" not in os.environ
    assert [gpu_of(slot, 4, None) for slot in range(9)] == [*"0123", *"0123", "0"]  # as many jobs on each, as far as it goes


def test_a_stopped_worker_begins_nothing_and_hands_on_no_interrupt(tmp_path, monkeypatch):
    worker, begun = SimpleNamespace(stopped=False, job=nullcontext, take_gpu=lambda: None), []
    monkeypatch.setattr(Worker, "here", lambda: worker)

    def train():
        begun.append(1)
        raise KeyboardInterrupt("stopped after step 3")

    with pytest.raises(Stopped, match="stopped after step 3"):  # an interrupt would make joblib kill the jobs that are saving
        run_job(train, tmp_path, ["seed=0"])
    worker.stopped = True
    with pytest.raises(Stopped, match="was not begun"):
        run_job(train, tmp_path, ["seed=0"])
    assert begun == [1]


def test_this_process_is_no_worker(monkeypatch):
    assert Worker.here() is None
    monkeypatch.setenv("INFINI_SWEEP", str(os.getpid()))  # the sweep itself
    assert Worker.here() is None


def test_a_job_is_noted_while_it_runs_and_begins_without_its_old_error(tmp_path):
    seen = []

    def train():
        seen.extend((job.overrides, job.error) for job in find_jobs(tmp_path))
        raise InputError("it diverged")

    for _ in range(2):
        with pytest.raises(InputError, match="it diverged"):
            run_job(train, tmp_path / "job", ["seed=0"])
    assert seen == [(("seed=0",), None)] * 2 and find_jobs(tmp_path)[0].error == "it diverged"


def test_where_a_job_runs_is_no_part_of_what_it_computes():
    assert asked_for(["seed=0", "train.device=cpu", "train.devices=2"], ["train.device", "output"]) == ["seed=0", "train.devices=2"]


def test_jobs_are_counted_as_hydra_counts_them():
    assert combinations(["a=1,2", "b=[1,2]", "c='x,y'", "a=range(3)"]) == [[f"a={a}", "b=[1,2]", "c='x,y'"] for a in range(3)]
    assert len(combinations(["seed=0,1,2", "model=a,b"])) == 6


@pytest.mark.skipif(importlib.util.find_spec("submitit") is not None, reason="submitit is installed")
def test_a_launcher_that_is_not_installed_is_one_sentence(tmp_path):
    result = subprocess.run([*SWEEP, "hydra/launcher=slurm", "seed=0,1"], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: the launcher submitit_slurm is not installed: pip install 'infini-attention[slurm]'")
