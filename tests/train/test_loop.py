import dataclasses
import json
import os
import signal

import pytest
import torch

from infini.errors import InputError
from infini.train import train
from infini.train.reach import read_reach


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def rows(folder, key="loss"):
    """The metrics that do not depend on the clock."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    clock = ("seconds", "tokens_per_second", "peak_memory_bytes")
    return [{k: v for k, v in row.items() if k not in clock} for row in lines if key in row]


class Interrupting:
    """A source that sends a signal to its process when batch ``at`` is asked for."""

    def __init__(self, source, at, number):
        self.source, self.at, self.number = source, at, number

    def __getitem__(self, index):
        if index == self.at:
            os.kill(os.getpid(), self.number)
        return self.source[index]


def test_one_batch_is_learned_by_heart(tiny_model, copy_source, settings, tmp_path):
    long = settings(steps=400, warmup_steps=10, learning_rate=0.05, weight_decay=0.0, log_every=50)
    train(tiny_model(), copy_source(steps=400, fixed=True), long, tmp_path)
    losses = [row["loss"] for row in rows(tmp_path)]
    assert losses[0] > 2.0
    assert losses[-1] < 0.6 * losses[0]


def test_a_run_leaves_its_model_its_curve_and_its_record(tiny_model, copy_source, settings, tmp_path):
    model, source = tiny_model(), copy_source()
    metrics = train(model, source, settings(), tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "checkpoints",
        "metrics.jsonl",
        "model",
        "record.json",
        "run.json",
    ]
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 4, 6, 8]
    assert [row["step"] for row in rows(tmp_path, "knockout_token_loss")] == [1, 4, 8]
    saved = torch.load(tmp_path / "model" / "weights.pt", weights_only=True)
    assert torch.equal(saved["out.weight"], model.out.weight.half())
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["kind"] == "train" and record["metrics"] == metrics
    assert record["data"]["class"].endswith("CopySource") and record["data"]["steps"] == 8
    assert metrics["tokens"] == sum(source[i].predicted_tokens for i in range(8))
    longest = max(source[i].tokens.shape[1] - 1 for i in range(8))
    assert (metrics["gradient_tokens"], metrics["text_tokens"]) == (longest, longest)
    assert read_reach(tmp_path / "model") == {"gradient_tokens": longest, "text_tokens": longest}


def test_with_no_weight_an_answer_is_a_token_like_others(tiny_model, copy_source, settings, tmp_path):
    class Unasked(type(copy_source())):
        def __getitem__(self, index):
            batch = super().__getitem__(index)
            return dataclasses.replace(batch, answer=torch.zeros_like(batch.answer))

    models = {}
    for name, source in (("asked", copy_source()), ("unasked", Unasked())):
        models[name] = tiny_model()
        train(models[name], source, settings(answer_weight=0.0), tmp_path / name)
    assert all(torch.equal(*both) for both in zip(*(model.state_dict().values() for model in models.values()), strict=True))
    assert [row["loss"] for row in rows(tmp_path / "asked")] == [row["token_loss"] for row in rows(tmp_path / "asked")]


def test_the_same_seed_gives_the_same_run(tiny_model, copy_source, settings, tmp_path):
    results = []
    for name in "ab":
        torch.manual_seed(hash(name))  # whatever happened before
        model = tiny_model()
        train(model, copy_source(), settings(), tmp_path / name)
        results.append(weights(model))
    assert all(torch.equal(results[0][k], results[1][k]) for k in results[0])
    assert rows(tmp_path / "a") == rows(tmp_path / "b")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_goes_on_to_the_same_bits(
    tiny_model, copy_source, settings, tmp_path, number
):
    class Source(Interrupting):  # the same source as far as the run's identity goes
        pass

    whole, halves, s = tiny_model(), tiny_model(), settings(accumulation=2, steps=6)
    train(whole, Source(copy_source(steps=12), None, None), s, tmp_path / "whole")

    before = signal.getsignal(number)  # a run in the background begins with SIGINT ignored
    with pytest.raises(KeyboardInterrupt, match="stopped after step 4 of 6.*same command"):
        train(halves, Source(copy_source(steps=12), 7, number), s, tmp_path / "halves")
    assert signal.getsignal(number) == before
    assert not (tmp_path / "halves" / "record.json").exists()
    torch.manual_seed(99)
    resumed = type(halves)()  # other weights: all must come from the checkpoint
    train(resumed, Source(copy_source(steps=12), None, None), s, tmp_path / "halves")

    assert all(torch.equal(v, resumed.state_dict()[k]) for k, v in weights(whole).items())
    assert rows(tmp_path / "whole") == rows(tmp_path / "halves")
    assert rows(tmp_path / "whole", "layers")[-1] == rows(tmp_path / "halves", "layers")[-1]


def test_a_finished_run_is_not_run_again(tiny_model, copy_source, settings, tmp_path):
    first = train(tiny_model(), copy_source(), settings(), tmp_path)
    model = tiny_model()
    before = weights(model)
    assert train(model, copy_source(), settings(), tmp_path) == first
    assert all(torch.equal(before[k], v) for k, v in weights(model).items())


def test_a_run_that_died_before_its_record_only_writes_what_is_missing(
    tiny_model, copy_source, settings, tmp_path
):
    first = train(tiny_model(), copy_source(), settings(), tmp_path)
    (tmp_path / "record.json").unlink()
    saved = (tmp_path / "model" / "weights.pt").read_bytes()
    (tmp_path / "model" / "weights.pt").unlink()
    assert train(tiny_model(), copy_source(), settings(), tmp_path) == first
    assert (tmp_path / "model" / "weights.pt").read_bytes() == saved


@pytest.mark.parametrize("part", ["settings", "data"])
def test_the_folder_of_another_run_is_refused(tiny_model, copy_source, settings, tmp_path, part):
    train(tiny_model(), copy_source(), settings(), tmp_path)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    other = {"settings": dict(learning_rate=0.5), "data": {}}[part]
    with pytest.raises(InputError, match=f"{part}.*choose another output folder"):
        train(tiny_model(), copy_source(seed=int(part == "data")), settings(**other), tmp_path)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_batches_without_answers_train(tiny_model, copy_source, settings, tmp_path):
    class NoAnswers:
        def __getitem__(self, index):
            batch = copy_source()[index]
            batch.answer.zero_()
            return batch

    metrics = train(tiny_model(), NoAnswers(), settings(steps=2), tmp_path)
    assert metrics["answer_loss"] is None and metrics["knockout_answer_loss"] is None
    assert metrics["loss"] == metrics["token_loss"] > 0


def test_weights_spoiled_by_nan_are_never_saved(tiny_model, copy_source, settings, tmp_path):
    class Poisoned(type(tiny_model())):
        calls = 0

        def forward(self, tokens, *args, **keywords):
            logits, state = super().forward(tokens, *args, **keywords)
            self.calls += torch.is_grad_enabled()
            return (logits * float("nan") if self.calls == 7 else logits), state

    with pytest.raises(InputError, match="the loss became nan in step 7"):
        train(Poisoned(), copy_source(), settings(log_every=100), tmp_path)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000004"]
    assert not (tmp_path / "model").exists()


def test_a_dead_gate_is_told_at_the_first_step(tiny_model, copy_source, settings, tmp_path, caplog):
    model = tiny_model()
    with torch.no_grad():
        model.beta.fill_(-100.0)
    train(model, copy_source(steps=1), settings(steps=1, warmup_steps=0), tmp_path)
    assert "gate beta: heads 0, 1 are saturated" in caplog.text


def test_recompute_is_asked_of_the_model(tiny_model, copy_source, settings, tmp_path):
    model = tiny_model()
    train(model, copy_source(), settings(recompute=True), tmp_path)
    assert model.recomputes


@pytest.mark.parametrize(
    ("changes", "message"),
    [(dict(device="abacus"), "device is 'abacus': use auto"), (dict(steps=9), "the data has 8 batches")],
)
def test_what_cannot_run_is_refused_before_a_folder_is_made(
    tiny_model, copy_source, settings, tmp_path, changes, message
):
    with pytest.raises(InputError, match=message):
        train(tiny_model(), copy_source(), settings(**changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("on", [False, True])
def test_compiling_is_the_model_s_own_affair(tiny_model, copy_source, settings, tmp_path, on):
    model = tiny_model()
    train(model, copy_source(), settings(compile=on), tmp_path)
    assert model.compiles is on
