"""A disk that fills up when results are written: one sentence with the file's name, exit code 2, and what was there stays."""

import json
import os
import shutil
import tempfile

import pytest
import torch

from infini import InfiniConfig, InfiniTransformer
from infini.cli.main import main

pytestmark = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs the device that is always full")

COMMANDS = {  # what is asked for at the smallest size, and the files of its output folder
    "perplexity": (["texts=[text.txt]"], ["record.json", "record.md", "record.png"]),
    "booksum": (
        ["pairs=[pairs.jsonl]", "lengths=[]", "questions=2", "wrong_books=1", "max_new_tokens=2"],
        ["record.json", "record.md", "record.png", "record.html"],
    ),
    "tokenizer": (["texts=[text.txt]", "vocab_size=258"], ["tokenizer.json", "record.json", "record.md"]),
    "peak": (["lengths=[250]", "warm_up=250", "ways=[session]"], ["record.json", "record.md"]),
    "speed": (
        ["lengths=[32]", "train_lengths=[32]", "train_tokens=32", "tokens=1", "repeats=1"],
        ["record.json", "record.md", "record.png"],
    ),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A tiny model, and texts to read."""
    folder = tmp_path_factory.mktemp("made")
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    InfiniTransformer(InfiniConfig(**sizes, segment_length=16)).save_pretrained(folder / "model")
    (folder / "text.txt").write_text("On the next day Ahab said that Starbuck had seen the whale. " * 9)
    pairs = [{"id": name, "text": f"The story of {name}. " * 9, "summary": f"{name} goes."} for name in ("Ahab", "Pip")]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    return folder


@pytest.fixture
def fill(monkeypatch):
    """Makes the disk full for files of a name, whose space the system then refuses."""
    real = tempfile.mkstemp

    def full_for(name):
        def mkstemp(prefix, **where):
            handle, path = real(prefix=prefix, **where)
            if prefix == f".{name}.":
                full = os.open("/dev/full", os.O_WRONLY)
                os.dup2(full, handle)
                os.close(full)
            return handle, path

        monkeypatch.setattr(tempfile, "mkstemp", mkstemp)

    return full_for


@pytest.mark.parametrize(("command", "name"), [(command, name) for command, (_, names) in COMMANDS.items() for name in names])
def test_a_full_disk_is_said_with_the_file_and_none_is_half_written(command, name, made, tmp_path, monkeypatch, capsys, fill):
    monkeypatch.chdir(made)
    asked, names = COMMANDS[command]
    if command != "tokenizer":
        asked = [*asked, "checkpoint=model", "device=cpu"]
    older = {one: b"older" for one in names if one != "tokenizer.json"}  # another tokenizer is never written over
    for one, content in older.items():
        (tmp_path / one).write_bytes(content)
    fill(name)
    assert main([command, *asked, f"output={tmp_path}"]) == 2
    error = capsys.readouterr().err
    said = f"error: No space left on device ({tmp_path / name}): free some space, or name an output folder on another disk"
    assert error.splitlines()[-1].startswith(said) and "Traceback" not in error
    found = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    place = names.index(name)
    assert all(found.pop(one) != b"older" for one in names[:place])
    assert found == {one: content for one, content in older.items() if one in names[place:]}


def test_no_other_model_is_measured_when_the_disk_is_full(made, tmp_path, monkeypatch, capsys, fill):
    monkeypatch.chdir(made)
    for run in ("a", "b"):
        shutil.copytree(made / "model", tmp_path / run / "model")
    asked = ["perplexity", *COMMANDS["perplexity"][0], f"runs={tmp_path}", "device=cpu", "output=test"]
    fill("record.json")
    assert main(asked) == 2
    error = capsys.readouterr().err
    assert f"error: No space left on device ({tmp_path}/a/test/record.json)" in error and "Traceback" not in error
    assert not (tmp_path / "b/test").exists()
