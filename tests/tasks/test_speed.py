"""`infini speed`: every length is reached in its turn, what is written is taken back, and what does not fit is said."""

import json

import pytest
import torch
from infini.tasks import speed
from infini.tasks.speed import SpeedSettings, run

from infini import InfiniConfig, InfiniTransformer
from infini.cli.main import main
from infini.errors import InputError

GIVEN = dict(lengths=(40, 100), train_lengths=(16, 32), train_tokens=64, piece=16, tokens=3, repeats=2)


def build():
    torch.manual_seed(0)
    return InfiniTransformer(InfiniConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, segment_length=16)).eval()


class Watched(torch.nn.Module):
    """Notes how many tokens each call reads, after how many."""

    def __init__(self):
        super().__init__()
        self.inner, self.calls, self.fail = build(), [], None
        self.config = self.inner.config

    def init_state(self, *arguments):
        return self.inner.init_state(*arguments)

    def forward(self, tokens, state=None, **keywords):
        seen = 0 if state is None else int(state.tokens_seen.max())
        self.calls.append((tuple(tokens.shape), seen, "targets" in keywords, torch.is_grad_enabled() and self.training))
        if self.fail == tokens.shape[1]:
            raise torch.cuda.OutOfMemoryError
        return self.inner(tokens, state, **keywords)


def test_each_length_is_read_once_and_written_after(monkeypatch):
    model = Watched()
    monkeypatch.setattr(speed, "fingerprint", lambda model: "0")
    rows, data = run(model, SpeedSettings(**GIVEN))
    assert data == {"checkpoint_sha256": "0"}
    assert [(row["what"], row["length"], row["rows"]) for row in rows] == [
        ("reading", 40, 1), ("writing", 40, 1), ("reading", 100, 1), ("writing", 100, 1), ("training", 16, 4), ("training", 32, 2),
    ]  # fmt: skip
    assert all(row["tokens_per_second"] > 0 and row["peak_memory_bytes"] > 2**20 for row in rows)
    assert {row["state_bytes"] for row in rows[:4]} == {model.inner.state_bytes(100)}
    read = [(shape[1], seen) for (shape, seen, targets, _) in model.calls if not targets and shape[1] > 1]
    assert read[2:] == [(16, 0), (16, 16), (8, 32), (16, 40), (16, 56), (16, 72), (12, 88)]  # first the warm-up, then every token once
    alone = [seen for (shape, seen, targets, _) in model.calls if not targets and shape[1] == 1]
    assert sorted(set(alone))[-4:] == [100, 101, 102, 103] and alone.count(100) == 2  # each time from the same state
    trained = [(shape, grad) for (shape, _, targets, grad) in model.calls if targets]
    assert trained == [((4, 16), True)] * 3 + [((2, 32), True)] * 3  # once before the clock
    assert not model.training and all(parameter.grad is None for parameter in model.parameters())


def test_what_does_not_fit_is_said_and_the_rest_goes_on(monkeypatch):
    model = Watched()
    monkeypatch.setattr(speed, "fingerprint", lambda model: "0")
    model.fail = 32
    rows, _ = run(model, SpeedSettings(**GIVEN))
    assert [row["tokens_per_second"] is None for row in rows] == [False] * 5 + [True]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(lengths=(100, 40)), r"lengths are \[100, 40\]; they must rise"),
        (dict(train_lengths=(1,)), r"train_lengths are \[1\]; they must rise and be at least 2"),
        (dict(lengths=(), train_lengths=()), "give one of them"),
        (dict(repeats=0), "repeats is 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        SpeedSettings(**GIVEN | change)


def test_the_command_leaves_a_record_and_sweeps_show_it(tmp_path, capsys):
    for seed in range(2):
        build().save_pretrained(tmp_path / str(seed) / "model")
        record = {"schema": 1, "kind": "train", "command": "infini train", "overrides": [f"seed={seed}", "model=a"]}
        record |= {"source": {"commit": "c", "dirty": False}, "seeds": {}, "versions": {}, "started": "x", "seconds": 1, "config": {"model": {}}}
        record |= {"metrics": {"token_loss": 1.0, "loss": 1.0}, "machine": {"cores": 1, "cpu": "x", "gpus": []}}
        (tmp_path / str(seed) / "record.json").write_text(json.dumps(record))
    asked = [f"{key}={list(value) if isinstance(value, tuple) else value}".replace(" ", "") for key, value in GIVEN.items()]
    assert main(["speed", f"runs={tmp_path}", *asked, "device=cpu", "output=speed"]) == 0
    table = (tmp_path / "0" / "speed" / "record.md").read_text()
    assert "| model | what | 16 | 32 | 40 | 100 | state, MiB |" in table and "| infini | training |" in table
    assert (tmp_path / "0" / "speed" / "record.png").read_bytes()[:4] == b"\x89PNG"
    for seed, (rate, peak) in enumerate(((100.0, 2**30), (300.0, 2**31))):
        path = tmp_path / str(seed) / "speed" / "record.json"
        content = json.loads(path.read_text())
        for row in content["rows"]:
            row |= {"tokens_per_second": rate, "peak_memory_bytes": peak} if row["what"] == "reading" else {"tokens_per_second": None}
        path.write_text(json.dumps(content))
    assert main(["report", str(tmp_path), "gather=true"]) == 0
    table = (tmp_path / "sweep.md").read_text()
    assert "| reading | 2 of 2 | - | - | 200 (2.00) | 200 (2.00) |" in table and "| training | 2 of 2 | no room | no room | - | - |" in table
    assert (tmp_path / "sweep.png").read_bytes()[:4] == b"\x89PNG"
