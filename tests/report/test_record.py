"""A record names everything, is written whole or not at all, and is read with suspicion."""

import json
import os
import stat
import subprocess
import sys
import time

import pytest

from infini.errors import InputError
from infini.report import record as module
from infini.report.record import make_record, read_record, source, write_atomically, write_record


def made(**results):
    asked = {"config": {"a": 1}, "data": {"x": "y"}, "seeds": {"prompts": 3}}
    return make_record("passkey", **asked, started=time.time(), **results)


def test_it_names_command_commit_config_data_seeds_machine_and_versions(monkeypatch):
    monkeypatch.setattr(sys, "orig_argv", ["/usr/bin/python3", "/venv/bin/infini", "passkey", "lengths=[320, 512]"])
    record = made(rows=[{"length": 1}])
    assert record["config"] == {"a": 1} and record["data"] == {"x": "y"} and record["seeds"] == {"prompts": 3}
    assert record["rows"] == [{"length": 1}]
    assert record["machine"]["cores"] == len(os.sched_getaffinity(0))
    assert record["machine"]["memory_bytes"] > 2**28
    assert {"python", "torch", "numpy", "infini-attention"} <= record["versions"].keys()
    assert record["command"] == "infini passkey 'lengths=[320, 512]'"
    assert record["seconds"] >= 0
    assert json.loads(json.dumps(record)) == record


def test_a_result_cannot_replace_the_provenance():
    with pytest.raises(InputError, match="already has the field 'machine'"):
        made(machine="mine")


def git(folder, *arguments):
    settings = ["-c", "user.name=x", "-c", "user.email=x@example.org", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", *settings, *arguments], cwd=folder, check=True, capture_output=True)


@pytest.fixture
def repository(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "checkout", lambda: tmp_path)
    (tmp_path / "infini").mkdir()
    (tmp_path / "infini" / "model.py").write_text("a = 1\n")
    (tmp_path / "README.md").write_text("text\n")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "first")
    return tmp_path


def test_source_of_a_clean_tree_is_its_commit(repository):
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=repository, capture_output=True, text=True, check=True)
    assert source() == {"commit": head.stdout.strip(), "dirty": False, "diff_sha256": None}


def test_changed_or_new_code_is_dirty_and_texts_are_not(repository):
    (repository / "README.md").write_text("other text\n")
    (repository / "notes.txt").write_text("new\n")
    assert source()["dirty"] is False
    (repository / "infini" / "model.py").write_text("a = 2\n")
    edited = source()
    assert edited["dirty"] is True and len(edited["diff_sha256"]) == 64
    (repository / "infini" / "new.py").write_text("b = 1\n")
    assert source()["diff_sha256"] != edited["diff_sha256"]
    git(repository, "checkout", "-q", "infini/model.py")
    assert source()["dirty"] is True  # the untracked file alone


def test_source_says_why_there_is_no_commit(repository, monkeypatch, tmp_path_factory):
    monkeypatch.setenv("PATH", str(tmp_path_factory.mktemp("empty")))
    assert source() == {"commit": None, "dirty": None, "diff_sha256": None, "why": "git is not installed"}
    monkeypatch.setattr(module, "checkout", lambda: None)
    assert source()["why"] == "installed from a wheel"
    monkeypatch.undo()
    folder = tmp_path_factory.mktemp("no_repository")
    monkeypatch.setattr(module, "checkout", lambda: folder)
    assert "not a git repository" in source()["why"]


def test_what_was_written_comes_back(tmp_path):
    record = made(rows=[{"exact_match": 0.1}])
    path = tmp_path / "new" / "record.json"
    write_record(record, path)
    assert read_record(path) == record
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


def test_nan_is_refused_and_the_old_file_stays(tmp_path):
    path = tmp_path / "record.json"
    write_record({"schema": 1}, path)
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_record({"schema": float("nan")}, path)
    assert path.read_text() == '{\n  "schema": 1\n}\n'


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(failing, tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def fail(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, b"new")
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("file", b"old")]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "there is no record"),
        (b'{"schema": 1', "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"[]", "is not a run record"),
        (b'{"rows": []}', "is not a run record"),
        (b'{"schema": 2, "kind": "passkey", "command": "x"}', "has record schema 2, this version reads 1"),
    ],
)
def test_what_is_no_record_is_refused_by_name(content, sentence, tmp_path):
    path = tmp_path / "record.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=sentence) as error:
        read_record(path)
    assert str(path) in str(error.value)
