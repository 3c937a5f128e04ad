"""The benchmark of decoding: nothing is timed before it is right, and what is written down is what was asked for."""

import pytest
import torch

from infini.bench import decode
from infini.bench.plain import PlainStep
from infini.cli import main as cli
from infini.config import InfiniConfig
from infini.errors import InputError
from infini.model import InfiniTransformer
from infini.report.record import read_record
from infini.testing import assert_equal_to_oracle
from infini.token_step import TokenStep

CPU = torch.device("cpu")
TINY = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, segment_length=16)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(decode.SIZES, "1b", TINY | {"initializer_range": 0.3})


def time_tiny(output, **options):
    asked = dict(sizes=["1b"], contexts=[40], plain_contexts=[40], paths=["eager"], tokens=3, repeats=1, piece=16, device=CPU)
    return decode.run(output, **asked | {"dtype": torch.float32} | options)


@pytest.mark.parametrize("taps", [0, 3])
@torch.no_grad()
def test_the_yardstick_is_plain_attention(taps):
    config = InfiniConfig(**TINY | {"initializer_range": 0.3}, memory_layers=(), local_attention="sliding", window=30, short_conv=taps)
    model, text = InfiniTransformer(config).double(), torch.randint(256, (2, 30))
    for block in model.blocks if taps else ():
        torch.nn.init.normal_(block.attention.short_conv.weight)
    step = PlainStep(model, 31, rows=2)
    for cache in step.caches:
        cache.fill_(float("nan"))  # what is not read yet is not seen
    found = torch.stack([step.step(text[:, i], i) for i in range(30)], 1)
    assert_equal_to_oracle("logits", found, model(text)[0])
    assert step.nbytes == 2 * (2 * 2 * 2 * 31 * 8 + 2 * taps * 32) * 8


def test_rows_and_record(tmp_path, capsys):
    arguments = ["device=cpu", "dtype=float32", "paths=[eager]", "sizes=[1b]", "contexts=[40,90]", "plain_contexts=[40]"]
    assert cli.main(["bench", "decode", *arguments, "tokens=3", "repeats=1", "piece=16", f"output={tmp_path}"]) == 0
    record = read_record(tmp_path / "record.json")
    assert record["kind"] == "decode" and record["config"]["sizes"]["1b"]["hidden_size"] == 32
    assert [(row["model"], row["context"], row["path"]) for row in record["rows"]] == [
        ("infini", 40, "eager"), ("infini", 90, "eager"), ("plain", 40, "eager"),
    ]
    first, second, plain = record["rows"]
    assert first["state_bytes"] == second["state_bytes"] and plain["state_bytes"] == 2 * 2 * 2 * 8 * 4 * 43
    assert all(row["milliseconds"] > 0 for row in record["rows"])
    ratio = f"{second['milliseconds'] / first['milliseconds']:.3f}"
    assert "| 1b | infini | 90 |" in (table := (tmp_path / "record.md").read_text()) and f" {ratio} |" in table
    assert "record.md" in capsys.readouterr().out


def test_a_cache_that_does_not_fit_is_a_row(tmp_path, monkeypatch):
    def full(model, capacity, rows=1, plain=PlainStep):
        if capacity > 100:
            raise torch.OutOfMemoryError
        return plain(model, capacity, rows)

    monkeypatch.setattr(decode, "PlainStep", full)
    rows = time_tiny(tmp_path, plain_contexts=[40, 1000])
    assert [row.get("out_of_memory", False) for row in rows] == [False, False, True]
    assert rows[2]["state_bytes"] == 2 * 2 * 2 * 8 * 4 * 1003


@pytest.mark.parametrize(("step", "which"), [(TokenStep, "the step with a memory"), (PlainStep, "the step of plain attention")])
def test_nothing_is_timed_where_numbers_are_wrong(step, which, tmp_path, monkeypatch):
    right = step.step
    monkeypatch.setattr(step, "step", lambda *args: right(*args) + 1e-2)
    with pytest.raises(AssertionError, match=which):
        time_tiny(tmp_path)
    assert not (tmp_path / "record.json").exists()


def test_bad_input(tmp_path, capsys):
    with pytest.raises(InputError, match="sizes has \\['7b'\\]; choose of shipped, 1b"):
        time_tiny(tmp_path, sizes=["7b"])
    for argument, sentence in (
        ("device=cpu", "decode is 'graph', but CUDA graphs need a CUDA device"),
        ("tokens=0", "tokens is 0; it must be at least 1"),
        ("contexts=[1]", "contexts is [1]; a context has at least 2 tokens"),
        ("path=[eager]", "did you mean paths?"),
    ):
        assert cli.main(["bench", "decode", argument, f"output={tmp_path}"]) == 2
        assert sentence in capsys.readouterr().err


@pytest.mark.gpu
def test_on_a_gpu_with_graphs(tmp_path):
    rows = time_tiny(tmp_path, paths=["eager", "graph"], device="cuda", dtype=torch.bfloat16, tokens=40)
    assert [(row["model"], row["path"]) for row in rows] == [(m, p) for m in ("infini", "plain") for p in ("eager", "graph")]
    assert all(row["peak_memory_bytes"] > 0 for row in rows)


def test_what_is_stopped_keeps_its_rows(tmp_path, monkeypatch, capsys):
    def stopped(*arguments, **options):
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(decode, "plain_rows", stopped)
    arguments = ["device=cpu", "dtype=float32", "paths=[eager]", "sizes=[1b]", "contexts=[40,90]", "plain_contexts=[40]"]
    assert cli.main(["bench", "decode", *arguments, "tokens=3", "repeats=1", "piece=16", f"output={tmp_path}"]) == 130
    assert [row["context"] for row in read_record(tmp_path / "record.json")["rows"]] == [40, 90]
    assert f"infini report {tmp_path / 'record.json'}" in capsys.readouterr().err
