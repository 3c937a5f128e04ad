"""From training texts to a table: `infini tokenizer`, `infini train task=stream`, `infini perplexity`."""

import json
import random

import pytest

from infini.cli.main import main
from infini.cli.tokenizer import _HELD_OUT
from infini.report.render import render

WORDS = "the of and whale ship sea captain white old man said went 1851 naïve".split()
SHAPE = ["model.hidden_size=16", "model.num_hidden_layers=1", "model.segment_length=16", "model.tokenizer=tok", "model.vocab_size=280"]
TASK = ["task=stream", "task.texts=[train.txt]", "task.rows=1", "task.segments=2", "train.steps=2"]
LEAVE = ["~task.min_segments", "~task.max_segments", "~task.tokens_per_batch"]


def write(path, seed, count=400):
    draw = random.Random(seed)
    path.write_text(" ".join(draw.choice(WORDS) for _ in range(count)))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "train.txt", 0)
    for seed in (1, 2):
        write(tmp_path / f"held-{seed}.txt", seed, 200 * seed)
    assert main(["tokenizer", "texts=[train.txt]", "vocab_size=280", "output=tok"]) == 0
    return tmp_path


def test_a_tokenizer_comes_with_its_record(folder, capsys):
    assert main(["tokenizer", "texts=[train.txt]", "vocab_size=280", "output=tok"]) == 0  # again: the same file
    assert (folder / "tok" / "record.md").read_text() in capsys.readouterr().out
    record = json.loads((folder / "tok" / "record.json").read_text())
    assert record["kind"] == "tokenizer" and record["metrics"]["vocab_size"] == 280 and record["metrics"]["words"] == 400
    assert record["metrics"]["bytes"] == (folder / "train.txt").stat().st_size and record["metrics"]["bytes_per_token"] > 1.5
    assert record["data"]["files"] == ["train.txt"] and len(record["data"]["tokenizer_sha256"]) == 64


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (["texts=[test-00000.txt]"], "calls itself held out"),
        (["texts=[]"], "texts is empty"),
        (["texts=[nowhere.txt]"], "nowhere.txt does not exist"),
        (["texts=[train.txt]", "vocab_size=281"], "another tokenizer: models may need it; choose another output"),
        (["texts=[train.txt]", "vocab_size=100"], "vocab_size is 100; it must be at least 257"),
    ],
)
def test_tokenizers_that_are_not_made(folder, capsys, asked, message):
    (folder / "test-00000.txt").write_text("held out")
    before = (folder / "tok" / "tokenizer.json").read_bytes()
    assert main(["tokenizer", "vocab_size=280", "output=tok", *asked]) == 2
    assert message in capsys.readouterr().err
    assert (folder / "tok" / "tokenizer.json").read_bytes() == before


def test_which_names_are_held_out():
    held = ("test-00000-of-00001.parquet", "validation.jsonl", "pg19_valid.txt", "x.dev.csv", "Test.txt")
    assert all(map(_HELD_OUT.search, held))
    assert not any(map(_HELD_OUT.search, ("train-00000.parquet", "latest.txt", "contest.txt", "device.txt", "evaluated.txt")))


@pytest.fixture
def trained(folder):
    for model in ("infini_long", "transformer_xl"):
        assert main(["train", "debug=tiny", f"model={model}", *SHAPE, *TASK, *LEAVE, f"output=runs/{model}"]) == 0
    return folder


def test_models_side_by_side_from_folders_to_a_table(trained, capsys):
    models = [f"runs/{model}/model" for model in ("infini_long", "transformer_xl")]
    asked = ["texts=[held-*.txt]", "device=cpu", "piece=50"]
    assert main(["perplexity", f"checkpoint=[{','.join(models)}]", *asked, "output=out"]) == 0
    printed = capsys.readouterr().out
    record = json.loads((trained / "out" / "record.json").read_text())
    assert [(row["model"], row["document"]) for row in record["rows"]] == [(m, f"held-{i}.txt") for m in models for i in (1, 2)]
    ours, theirs = (record["data"][model] for model in models)
    assert ours["tokens_sha256"] == theirs["tokens_sha256"] and ours["checkpoint_sha256"] != theirs["checkpoint_sha256"]
    assert ours["trained"]["gradient_tokens"] == 32
    assert [row["tokens"] for row in record["rows"][:2]] == [row["tokens"] for row in record["rows"][2:]]
    table = (trained / "out" / "record.md").read_text()
    assert table in printed and all(table.count(f"| {model} |") == 2 for model in models[:1])
    assert "| 16 to 31 | 2 |" in table and (trained / "out" / "record.png").read_bytes()[:4] == b"\x89PNG"
    before = table, (trained / "out" / "record.png").read_bytes()
    render(trained / "out" / "record.json")
    assert before == ((trained / "out" / "record.md").read_text(), (trained / "out" / "record.png").read_bytes())
    # One model alone and another batch: the same numbers to rounding.
    assert main(["perplexity", f"checkpoint={models[1]}", *asked, "batch_size=1", "knockout=false", "output=one"]) == 0
    alone = json.loads((trained / "one" / "record.json").read_text())["rows"]
    assert [row["nll"] for row in alone] == pytest.approx([row["nll"] for row in record["rows"][2:]], rel=1e-5)
    assert {row["nll_without_memory"] for row in alone} == {None} and "| - |" in (trained / "one" / "record.md").read_text()


def test_interrupted_it_says_that_nothing_is_kept(trained, monkeypatch, capsys):
    def stop(*arguments, **keywords):
        raise KeyboardInterrupt

    monkeypatch.setattr("infini.tasks.perplexity.benchmark.score_documents", stop)
    assert main(["perplexity", "checkpoint=runs/infini_long/model", "texts=[held-1.txt]", "output=out", "device=cpu"]) == 130
    assert "nothing of this record is kept" in capsys.readouterr().err and not (trained / "out").exists()


def test_mistakes(folder, capsys):
    for asked, message in (
        (["output=x"], "texts is missing"),
        (["texts=[held-1.txt]", "pece=3"], "nothing reads pece"),
        (["texts=[held-1.txt]", "checkpoint=nowhere"], "there is no checkpoint folder 'nowhere'"),
        (["texts=[nowhere.txt]"], "nowhere.txt does not exist"),
    ):
        assert main(["perplexity", *asked]) == 2
        assert message in capsys.readouterr().err
