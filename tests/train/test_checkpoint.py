import errno
import os
import random

import numpy as np
import pytest
import torch

from infini.errors import InputError
from infini.train.checkpoint import Progress, latest_checkpoint, load_checkpoint, save_checkpoint
from infini.train.optimizer import build_optimizer


@pytest.fixture
def parts(tiny_model, settings):
    model = tiny_model()
    optimizer = build_optimizer(model, settings())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return model, optimizer


def draw():
    return random.random(), np.random.rand(), np.random.normal(), torch.rand(()).item()  # a normal leaves a second one behind


def test_everything_comes_back(parts, tiny_model, settings, tmp_path):
    model, optimizer = parts
    draw()
    path = save_checkpoint(tmp_path, model, optimizer, Progress(7, 900, 1.5))
    expected = draw()
    other = tiny_model()
    other_optimizer = build_optimizer(other, settings())
    assert load_checkpoint(path, other, other_optimizer) == Progress(7, 900, 1.5)
    assert draw() == expected
    for old, new in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(old, new)
        for key, value in optimizer.state[old].items():
            assert torch.equal(value, other_optimizer.state[new][key])


def test_only_the_newest_is_kept(parts, tmp_path):
    for step in (9, 10, 100):
        save_checkpoint(tmp_path, *parts, Progress(step))
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000100"]
    assert latest_checkpoint(tmp_path).name == "step-00000100"


def test_saved_twice_it_is_there_once(parts, tmp_path):
    for seconds in (1.0, 2.0):
        path = save_checkpoint(tmp_path, *parts, Progress(9, seconds=seconds))
    assert [found.name for found in tmp_path.iterdir()] == ["step-00000009"]
    assert load_checkpoint(path, *parts).seconds == 2.0


def test_of_two_that_are_whole_the_later_counts(tmp_path):
    """A process may die before it has deleted the older one."""
    for step in (10, 9, 100):
        (tmp_path / f"step-{step:08d}").mkdir()
    assert latest_checkpoint(tmp_path).name == "step-00000100"


def test_progress_keeps_the_farthest_reach():
    progress = Progress()
    for reach in ((8, 40), (16, 20), (4, 4)):
        progress.reached(*reach)
    assert (progress.gradient_tokens, progress.text_tokens) == (16, 40)


def test_no_checkpoint_is_none(tmp_path):
    assert latest_checkpoint(tmp_path / "missing") is None


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_leaves_the_last_checkpoint_and_says_so(parts, tmp_path, monkeypatch, number):
    def full_disk(content, file):
        file.write(b"half")
        raise OSError(number, os.strerror(number))

    save_checkpoint(tmp_path, *parts, Progress(5))
    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(InputError, match="no space left .* checkpoint of step 5 is intact"):
        save_checkpoint(tmp_path, *parts, Progress(6))
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000005"]
    assert load_checkpoint(latest_checkpoint(tmp_path), *parts).step == 5


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs the device that is always full")
def test_torch_reports_a_full_disk_as_one(tmp_path):
    # The reason for writing through Python's file: by path, torch raises a RuntimeError.
    with pytest.raises(OSError, match="No space left"), open("/dev/full", "wb", buffering=0) as file:
        torch.save({"x": torch.zeros(100_000)}, file)


class FullDisk:
    """A file on a disk with room for so many bytes."""

    def __init__(self, room):
        self.room = room

    def write(self, data):
        self.room -= memoryview(data).nbytes
        if self.room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return memoryview(data).nbytes


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.9, 0.99])
def test_wherever_a_disk_fills_up_it_is_said(parts, tmp_path, monkeypatch, share):
    save_checkpoint(tmp_path, *parts, Progress(5))
    size, save = (tmp_path / "step-00000005/training.pt").stat().st_size, torch.save
    monkeypatch.setattr(torch, "save", lambda content, file: save(content, FullDisk(int(share * size))))
    with pytest.raises(InputError, match="no space left .* checkpoint of step 5 is intact"):
        save_checkpoint(tmp_path, *parts, Progress(6))
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000005"]


class Killed(BaseException):
    pass


@pytest.mark.parametrize("moment", ["save", "fsync", "rename"])
def test_a_process_that_dies_while_saving_loses_nothing(parts, tmp_path, monkeypatch, moment):
    save_checkpoint(tmp_path, *parts, Progress(5))

    def die(*_):
        raise Killed

    with monkeypatch.context() as patch:
        where = {"save": torch, "fsync": os, "rename": type(tmp_path)}[moment]
        patch.setattr(where, moment, die)
        patch.setattr("shutil.rmtree", lambda *a, **k: None)  # the dead do not tidy up
        with pytest.raises(Killed):
            save_checkpoint(tmp_path, *parts, Progress(6))
    assert len(list(tmp_path.iterdir())) == 2
    assert load_checkpoint(latest_checkpoint(tmp_path), *parts).step == 5
    save_checkpoint(tmp_path, *parts, Progress(6))
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000006"]


def test_a_truncated_checkpoint_is_named(parts, tmp_path):
    path = save_checkpoint(tmp_path, *parts, Progress(5))
    file = path / "training.pt"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(InputError, match="step-00000005 cannot be loaded .* delete it"):
        load_checkpoint(path, *parts)


def test_a_pickle_that_runs_code_is_refused(parts, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    path = save_checkpoint(tmp_path, *parts, Progress(5))
    torch.save({"model": Evil()}, path / "training.pt")
    with pytest.raises(InputError, match="cannot be loaded"):
        load_checkpoint(path, *parts)
    assert not (tmp_path / "ran").exists()
