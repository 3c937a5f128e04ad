"""The best weights on held-out text are kept, whatever stops the run, and training is what it would be without it."""

import json
import os
import shutil
import signal

import pytest
import torch

from infini.errors import InputError
from infini.train import held_out as held_out_module
from infini.train import train
from infini.train.checkpoint import Progress
from infini.train.held_out import HeldOut, read_note
from infini.train.reach import read_reach

LOSSES = {2: 3.0, 4: 1.0, 6: 2.0, 8: 1.0, 10: 0.5, 11: 0.7}


class Scripted:
    """A source that says what its held-out text is worth after each step, and remembers the weights that were asked about."""

    def __init__(self, source, losses=LOSSES):
        self.source, self.losses, self.asked = source, losses, {}
        self.before = lambda index: None

    def __getitem__(self, index):
        self.before(index)
        self.step = index + 1
        return self.source[index]

    def held_out(self, model):
        assert not model.training
        self.asked[self.step] = {name: value.clone() for name, value in model.state_dict().items()}
        return self.losses[self.step]

    def epochs(self, batches):
        return batches / 4


@pytest.fixture
def run(tiny_model, copy_source, settings, tmp_path):
    """Trains 11 steps in a folder of this name; `before` is called when a batch is asked for."""

    def start(name, before=lambda index: None, losses=LOSSES, **changes):
        model, source = tiny_model(), Scripted(copy_source(steps=22), losses)

        def check(index):
            assert model.training
            before(index)

        source.before = check
        metrics = train(model, source, settings(**dict(steps=11, validate_every=2, checkpoint_every=5) | changes), tmp_path / name)
        return metrics, source.asked

    return start


def saved(folder):
    return torch.load(folder / "weights.pt", weights_only=True)


def equal(saved_weights, weights):
    return all(torch.equal(value.half(), saved_weights[name]) for name, value in weights.items())


def rows(folder):
    """What was read of the held-out text."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [row for row in lines if "held_out_bits_per_byte" in row]


def test_the_best_weights_are_kept_beside_the_last(run, tmp_path):
    metrics, asked = run("a")
    assert list(asked) == [2, 4, 6, 8, 10, 11]
    assert equal(saved(tmp_path / "a/best/model"), asked[10]) and equal(saved(tmp_path / "a/model"), asked[11])
    assert not equal(saved(tmp_path / "a/best/model"), asked[11])
    assert read_note(tmp_path / "a/best/model") == {"step": 10, "bits_per_byte": 0.5} and read_note(tmp_path / "a/model") is None
    assert read_reach(tmp_path / "a/best/model") == read_reach(tmp_path / "a/model")
    record = json.loads((tmp_path / "a/record.json").read_text())
    assert record["metrics"] == metrics
    assert (metrics["held_out_bits_per_byte"], metrics["best_held_out_bits_per_byte"], metrics["best_step"]) == (0.7, 0.5, 10)
    assert metrics["epochs"] == 11 / 4 and metrics["steps"] == 11
    assert {row["step"]: row["held_out_bits_per_byte"] for row in rows(tmp_path / "a")} == LOSSES
    lines = [json.loads(line) for line in (tmp_path / "a/metrics.jsonl").read_text().splitlines()]
    assert all(line["epochs"] == line["step"] / 4 for line in lines if "loss" in line)


def test_of_equally_good_weights_the_first_are_kept(run, tmp_path):
    metrics, asked = run("a", losses={step: 1.0 for step in LOSSES})
    assert metrics["best_step"] == 2 and equal(saved(tmp_path / "a/best/model"), asked[2])


def test_training_is_the_same_without_it(run, tiny_model, copy_source, settings, tmp_path):
    _, asked = run("a")
    plain = tiny_model()
    metrics = train(plain, copy_source(steps=11), settings(steps=11, checkpoint_every=5), tmp_path / "b")
    assert all(torch.equal(value, asked[11][name]) for name, value in plain.state_dict().items())
    assert not {"best_step", "held_out_bits_per_byte", "epochs"} & metrics.keys() and not (tmp_path / "b/best").exists()


def test_training_ends_when_patience_does(run, tmp_path):
    losses = {2: 2.0, 4: 2.5, 6: 1.0, 8: 1.5, 10: 1.2}  # two in a row
    metrics, asked = run("a", losses=losses, patience=2)
    assert (metrics["steps"], metrics["best_step"], metrics["epochs"]) == (10, 6, 2.5)
    assert equal(saved(tmp_path / "a/best/model"), asked[6]) and equal(saved(tmp_path / "a/model"), asked[10])
    # Dead before its record was written, it does not go on training.
    (tmp_path / "a/record.json").unlink()
    again, none = run("a", losses={}, patience=2)
    assert again == metrics and not none


@pytest.mark.parametrize("patience", [None, 2])
@pytest.mark.parametrize("at", [1, 3, 4, 5, 9, 10])
@pytest.mark.parametrize("how", ["SIGINT", "power cut"])
def test_stopped_anywhere_the_same_weights_are_best(run, tmp_path, how, at, patience):
    def stop(index):
        if index == at and how == "SIGINT":
            os.kill(os.getpid(), signal.SIGINT)
        elif index == at:
            raise RuntimeError("power cut")

    losses = LOSSES if patience is None else {2: 2.0, 4: 1.0, 6: 1.5, 8: 1.2}
    whole, asked = run("whole", losses=losses, patience=patience)
    last = max(losses)
    if at < last - (how == "SIGINT"):
        with pytest.raises(RuntimeError if how == "power cut" else KeyboardInterrupt):
            run("parts", stop, losses, patience=patience)
    resumed, later = run("parts", losses=losses, patience=patience)
    clock = ("seconds", "tokens_per_second", "peak_memory_bytes", "loss", "token_loss", "answer_loss")
    assert {k: v for k, v in resumed.items() if k not in clock} == {k: v for k, v in whole.items() if k not in clock}
    assert rows(tmp_path / "whole") == rows(tmp_path / "parts")
    for part in ("best/model", "model"):
        one, other = (saved(tmp_path / name / part) for name in ("whole", "parts"))
        assert all(torch.equal(value, other[name]) for name, value in one.items())
    for step, weights in later.items():
        assert all(torch.equal(value, asked[step][name]) for name, value in weights.items())


@pytest.mark.parametrize("writes", ["weights", "note"])
def test_dead_before_the_best_weights_were_written(run, tmp_path, monkeypatch, writes):
    """The checkpoint of that step has them."""
    count = iter(range(100))

    def die(*arguments):
        if next(count) == 1:  # of steps 2, 4 and 10: the second
            raise OSError("dead")
        return real(*arguments)

    if writes == "weights":
        real = held_out_module.write_reach
        monkeypatch.setattr(held_out_module, "write_reach", die)
    else:
        real = held_out_module.write_atomically
        monkeypatch.setattr(held_out_module, "write_atomically", die)
    with pytest.raises(OSError, match="dead"):
        run("a")
    assert read_note(tmp_path / "a/best/model")["step"] == 2  # whole as it was
    reached = []
    _, asked = run("a", before=lambda index: reached.append((index, read_note(tmp_path / "a/best/model")["step"])))
    assert reached[0] == (4, 4) and min(asked) == 6
    assert read_note(tmp_path / "a/best/model") == {"step": 10, "bits_per_byte": 0.5}


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # by torch itself, when its compiler is imported
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_it_is_read_in_the_precision_of_training_and_compiles_nothing(tiny_model, copy_source, settings, tmp_path, precision):
    compiled, found = [], []

    def read(model):
        found.append((torch.ones(2, 2) @ torch.ones(2, 2)).dtype)
        torch.compile(lambda x: x + 1, backend=lambda graph, inputs: compiled.append(graph) or graph.forward)(torch.ones(2))
        return 1.0

    source = Scripted(copy_source())
    source.held_out = read
    HeldOut(source, settings(validate_every=2, precision=precision), tmp_path).measure(tiny_model(), torch.device("cpu"), Progress(2))
    assert found == [torch.bfloat16 if precision == "bf16" else torch.float32] and not compiled


def test_the_best_weights_say_how_far_their_training_reached(tiny_model, copy_source, settings, tmp_path):
    progress = Progress(step=2, gradient_tokens=4, text_tokens=9, best_held_out=1.0, best_step=2)
    HeldOut(Scripted(copy_source()), settings(validate_every=2), tmp_path).keep(tiny_model(), progress)
    assert read_reach(tmp_path / "best/model") == {"gradient_tokens": 4, "text_tokens": 9}


def test_epochs_are_those_of_all_accumulated_batches(run):
    losses = {2 * step: loss for step, loss in LOSSES.items()}
    assert run("a", losses=losses, accumulation=2)[0]["epochs"] == 22 / 4


def test_best_weights_that_are_gone_are_not_replaced_by_others(run, tmp_path):
    def stop(index):
        if index == 4:
            os.kill(os.getpid(), signal.SIGINT)

    losses = LOSSES | {10: 1.2, 11: 1.3}
    with pytest.raises(KeyboardInterrupt):
        run("a", stop, losses)
    shutil.rmtree(tmp_path / "a/best")
    assert run("a", losses=losses)[0]["best_step"] == 4
    assert not (tmp_path / "a/best").exists()


def test_what_cannot_be_is_said_before_a_folder_is_made(run, tiny_model, copy_source, settings, tmp_path):
    with pytest.raises(InputError, match="patience is 3, but validate_every is null"):
        settings(patience=3)
    with pytest.raises(InputError, match="validate_every is 0 but must be at least 1"):
        settings(validate_every=0)
    with pytest.raises(InputError, match="validate_every is 2, but the data has no held-out text"):
        train(tiny_model(), copy_source(), settings(validate_every=2), tmp_path / "a")
    with pytest.raises(InputError, match="the data has held-out text, but validate_every is null"):
        run("a", validate_every=None)
    assert not (tmp_path / "a").exists()
