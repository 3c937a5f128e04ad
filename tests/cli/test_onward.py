"""`infini train runs=FOLDER`: training goes on from the models of a sweep, each as it was saved."""

import json

import pytest
import torch

from baselines.rmt.config import RMTConfig
from baselines.rmt.model import RecurrentMemoryTransformer
from infini import InfiniConfig, InfiniTransformer
from infini.cli.main import main
from infini.data.bpe import train_bpe
from infini.report.fingerprint import fingerprint

SHAPE = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, segment_length=64, vocab_size=290)
TASK = ["task=passkey", "task.min_segments=5", "task.max_segments=5", "task.tokens_per_batch=320", "task.dense_question_share=0"]
TRAIN = ["train.steps=2", "train.warmup_steps=1", "train.device=cpu", "train.precision=fp32", "train.workers=0", "train.learning_rate=1e-9"]
PROVENANCE = {"schema": 1, "kind": "train", "command": "infini train", "config": {}}


@pytest.fixture
def sweep(tmp_path):
    """Two models whose tokens are those of a trained tokenizer; of one two rates, the second is better; of the other two seeds."""
    (tmp_path / "tokenizer.json").write_bytes(train_bpe(["The grass is green and there is a pass key. " * 9, "What is it? Key of AB"] * 3, 290))
    folder = tmp_path / "it's, a=b"  # a name that overrides cannot hold without quotes
    runs = [("a", InfiniTransformer, 0, "1e-3", 2.0), ("b", InfiniTransformer, 0, "2e-3", 1.0)]
    runs += [("c/d", RecurrentMemoryTransformer, 3, "1e-3", 5.0), ("c/e", RecurrentMemoryTransformer, 4, "1e-3", 6.0)]
    built = {}
    for name, kind, seed, rate, loss in runs:
        torch.manual_seed(seed)
        config = InfiniConfig if kind is InfiniTransformer else RMTConfig
        more = dict(write_gate=True, local_attention="sliding") if config is InfiniConfig else dict(num_memory_tokens=3)
        model = kind(config(**SHAPE, **more, tokenizer=str(tmp_path / "tokenizer.json")))
        model.save_pretrained(folder / name / "model")
        group = "infini_long" if config is InfiniConfig else "rmt"
        overrides = [f"model={group}", f"seed={seed}", f"train.learning_rate={rate}", "train.steps=7"]
        record = PROVENANCE | {"overrides": overrides, "seeds": {"train": seed}}
        (folder / name / "record.json").write_text(json.dumps(record | {"metrics": {"loss": loss}}))
        built[name] = model
    return folder, built


def go_on(folder, output, *more):
    return main(["train", f"runs={folder}", *TASK, *TRAIN, f"output={output}", *more])


def test_each_model_goes_on_at_its_picked_rate_and_once(sweep, tmp_path, capsys):
    folder, built = sweep
    assert go_on(folder, tmp_path / "out") == 0, capsys.readouterr().err
    records = {str(path.parent.relative_to(tmp_path / "out")): json.loads(path.read_text()) for path in tmp_path.rglob("out/**/record.json")}
    assert records.keys() == {"b", "c/d", "c/e"}  # of the first model the better rate
    for name, record in records.items():
        assert record["data"]["origin"]["weights_sha256"] == fingerprint(built[name])
        assert record["seeds"]["train"] == {"b": 0, "c/d": 3, "c/e": 4}[name] and record["data"]["class"].endswith("PasskeyTraining")
        said = dict(override.split("=", 1) for override in record["overrides"])
        assert said["model"] == ("infini_long" if name == "b" else "rmt") and said["seed"] == str(record["seeds"]["train"])
        assert said["train.learning_rate"] == "1e-9" and said["train.steps"] == "2"  # what was asked last
        assert said["task"] == "passkey" and "output" not in said and "train.device" not in said
        trained = type(built[name]).from_pretrained(tmp_path / "out" / name / "model")
        for key, weight in built[name].state_dict().items():  # the step was tiny: these are the weights it began with
            torch.testing.assert_close(trained.state_dict()[key], weight, atol=1e-3, rtol=1e-3)
        assert trained.config.vocab_size == 290 and (tmp_path / "out" / name / "model" / "tokenizer.json").exists()

    before = {path: path.read_bytes() for path in tmp_path.rglob("out/**/record.json")}
    assert go_on(folder, tmp_path / "out") == 0
    assert {path: path.read_bytes() for path in before} == before
    assert main(["report", str(tmp_path / "out"), "gather=true"]) == 0
    table = (tmp_path / "out" / "sweep.md").read_text()
    assert "| infini_long | 1 of 1 |" in table and "| rmt | 2 of 2 |" in table

    # The old rate was that of other training: with the default rows do not differ in it.
    assert main(["train", f"runs={folder}", *TASK, *TRAIN[:-1], f"output={tmp_path}/more"]) == 0
    overrides = [json.loads(path.read_text())["overrides"] for path in tmp_path.rglob("more/**/record.json")]
    assert len(overrides) == 3 and not any("learning_rate" in override for run in overrides for override in run)


def test_what_cannot_be_is_said(sweep, tmp_path, capsys):
    folder, _ = sweep
    for more, message in (
        (["model=rmt"], f"model is given beside runs: each model goes on as it is in {folder}; leave model out"),
        (["-m"], "-m is given beside runs"),
        (["weights=x"], "weights is given beside runs"),
        (["train.stepz=1"], "nothing reads train.stepz; did you mean train.steps?"),
    ):
        assert go_on(folder, tmp_path / "out", *more) == 2
        assert message in capsys.readouterr().err
    assert main(["train", f"runs={folder}", *TASK]) == 2
    assert "output is missing" in capsys.readouterr().err
    assert go_on(tmp_path / "none", tmp_path / "out") == 2
    assert "there are no training runs in" in capsys.readouterr().err
