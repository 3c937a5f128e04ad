"""`infini train` and `infini passkey` on every baseline, from the checkout; without it, one sentence."""

import json
import logging

import pytest
import torch

from infini import StreamingSession
from infini.cli import build, passkey, train
from infini.cli.compose import compose
from infini.errors import InputError

NAMES = ["transformer_xl", "memorizing", "full", "sliding", "rmt", "gated_deltanet"]


@pytest.fixture(autouse=True)
def log_level_stays():
    logger = logging.getLogger("infini")
    level = logger.level
    yield
    logger.setLevel(level)


@pytest.mark.parametrize("name", NAMES)
def test_trained_asked_and_streamed(name, tmp_path, capsys):
    changes = ["train.steps=2", "model.segment_length=128", "task.tokens_per_batch=256", "task.max_segments=2"]
    config = compose("train", ["debug=tiny", f"model={name}", *changes, "output=x"])
    train._train(config, tmp_path / "run")
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert record["config"]["model"]["class"] == config["model"]["_model_"]
    assert record["metrics"]["knockout_token_loss"] != 0
    folder = tmp_path / "run" / "model"
    passkey.run([f"checkpoint={folder}", "lengths=[320]", "depths=[0.5]", "samples=1", f"output={tmp_path / 'asked'}"])
    model = build.model_class(json.loads((folder / "config.json").read_text())["model_type"]).from_pretrained(folder)
    row = json.loads((tmp_path / "asked" / "record.json").read_text())["rows"][0]
    assert row["state_bytes"] >= model.state_bytes(320)
    session = StreamingSession(model)
    session.feed(torch.randint(256, (100,)))
    session.save(tmp_path / "session")
    restored = StreamingSession.restore(tmp_path / "session", model)
    assert [int(t) for t in restored.generate(5)] == [int(t) for t in session.generate(5)]


@pytest.mark.parametrize("name", ["memorizing", "rmt"])
def test_a_wheel_says_so_in_one_sentence(name, monkeypatch):
    monkeypatch.setattr(build, "checkout", lambda: None)
    with pytest.raises(InputError, match=r"^baselines\.\S+ is part of the checkout, not of the wheel: clone the repository"):
        build.model_class(name)
    with pytest.raises(InputError, match="is part of the checkout"):
        train.read(compose("train", [f"model={name}", "output=x"]))


@pytest.mark.parametrize("name", ["llama", "None", "../task/passkey", ""])
def test_a_checkpoint_of_an_unknown_model(name):
    with pytest.raises(InputError, match="is no model of this library: see conf/model"):
        build.model_class(name)
