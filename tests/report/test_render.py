"""Tables and pictures: the record's numbers, always the same bytes."""

import io
import json
import subprocess
import sys

import numpy as np
import pytest
from matplotlib import image

from infini.cli.report import find_records, run
from infini.errors import InputError
from infini.report.plots import passkey_heat_map
from infini.report.record import write_record
from infini.report.render import render
from infini.report.tables import caption, passkey_table, train_table

PROVENANCE = {
    "schema": 1,
    "command": "infini passkey seed=3",
    "source": {"commit": "0123456789abcdef", "dirty": True, "diff_sha256": "00"},
    "config": {},
    "data": {},
    "seeds": {"prompts": 3},
    "machine": {"cpu": "Some CPU", "cores": 2, "gpus": [{"name": "Some GPU", "memory_bytes": 1}]},
    "versions": {"torch": "2.13.0"},
    "started": "2026-01-01T00:00:00+00:00",
    "seconds": 61.5,
}


def row(length, depth, exact, **extras):
    measured = {"tokens_per_second": 3499.6, "peak_memory_bytes": 300 * 2**20, "digit_accuracy": 0.925}
    return {"length": length, "depth": depth, "samples": 8, "exact_match": exact, **measured, **extras}


@pytest.fixture
def record():
    cut = {"exact_match_low": 0.5, "exact_match_high": 0.95, "border_cut": 2, "border_cut_exact_match": 0.5}
    rows = [row(16384, 0.5, 0.875, **cut), row(4096, 1.0, 0.0), row(4096, 0.0, 1.0)]
    return {**PROVENANCE, "kind": "passkey", "rows": rows}


def test_table_has_a_sorted_line_per_cell_and_the_provenance(record):
    table = passkey_table(record)
    lines = [line for line in table.splitlines() if line.startswith("| ")][2:]
    assert lines == [
        "| 4,096 | 0 | 8 | 100.0 % | - | 92.5 % | - | 3,500 | 300 |",
        "| 4,096 | 1 | 8 | 0.0 % | - | 92.5 % | - | 3,500 | 300 |",
        "| 16,384 | 0.5 | 8 | 87.5 % | 50.0 % to 95.0 % | 92.5 % | 50.0 % of 2 | 3,500 | 300 |",
    ]
    facts = ["`infini passkey seed=3`", "0123456789ab with uncommitted changes", "prompts 3", "Some CPU, Some GPU"]
    assert all(fact in table for fact in [*facts, "torch 2.13.0"])


def test_an_unknown_commit_is_said(record):
    record["source"] = {"commit": None, "dirty": None, "why": "git is not installed"}
    assert "- commit: unknown, git is not installed\n" in passkey_table(record)


def test_train_table_shows_every_metric_and_what_is_missing():
    record = {**PROVENANCE, "kind": "train", "metrics": {"steps": 12000, "token_loss": 0.123456, "answer_loss": None}}
    table = train_table(record)
    assert "| steps | 12,000 |" in table
    assert "| token loss | 0.1235 |" in table
    assert "| answer loss | - |" in table


def test_heat_map_has_lengths_across_depths_down_and_gray_where_nothing_ran(record):
    def where(color):
        """Share of the picture in this color, and the middle of it: across, down."""
        down, across = np.nonzero((pixels == color).all(-1))
        return len(down) / pixels[..., 0].size, np.median(across), np.median(down)

    record["rows"] = [row(1, 0.0, 1.0), row(2, 1.0, 0.0)]
    pixels = np.round(image.imread(io.BytesIO(passkey_heat_map(record)))[..., :3] * 255).astype(int)
    green, red, gray = where((0, 104, 55)), where((165, 0, 38)), where((211, 211, 211))
    assert min(green[0], red[0]) > 0.05
    assert gray[0] == pytest.approx(green[0] + red[0], rel=0.2)
    assert green[1] < red[1] and green[2] < red[2]


def test_rendering_again_gives_the_same_bytes_in_another_process(record, tmp_path):
    path = tmp_path / "record.json"
    write_record(record, path)
    files = render(path)
    assert files == [tmp_path / "record.md", tmp_path / "record.png"]
    before = [file.read_bytes() for file in files]
    subprocess.run([sys.executable, "-m", "infini.cli.main", "report", str(path)], check=True, capture_output=True)
    assert [file.read_bytes() for file in files] == before


def test_report_finds_records_in_folders_and_refuses_an_empty_one(record, tmp_path, capsys):
    write_record(record, tmp_path / "b" / "deep" / "record.json")
    write_record(record, tmp_path / "a" / "record.json")
    write_record({"a": "cell, not a record"}, tmp_path / "a" / "cells" / "1.json")
    run([str(tmp_path)])
    printed = capsys.readouterr().out.splitlines()
    names = ("a/record.md", "a/record.png", "b/deep/record.md", "b/deep/record.png")
    assert printed == [str(tmp_path / name) for name in names]
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="there is no record.json in"):
        find_records(tmp_path / "empty")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"kind": "soup"}, "kind 'soup', this version renders passkey, train"),
        ({"rows": [{"length": 3}]}, "lacks the field 'depth'"),
    ],
)
def test_a_record_that_cannot_be_rendered_is_named(change, sentence, record, tmp_path):
    path = tmp_path / "record.json"
    path.write_text(json.dumps({**record, **change}))
    with pytest.raises(InputError, match=sentence):
        render(path)
    assert [file.name for file in tmp_path.iterdir()] == ["record.json"]


@pytest.mark.parametrize("dirty, words", [(None, "abc (stated, not checked)"), (False, "commit: abc\n"), (True, "abc with uncommitted changes")])
def test_a_commit_that_was_only_stated_is_not_shown_as_checked(dirty, words):
    machine = {"cores": 1, "cpu": "a", "gpus": []}
    record = {"command": "c", "source": {"commit": "abc", "dirty": dirty}, "machine": machine, "seeds": {}, "versions": {}}
    assert words in caption(record | {"started": "now", "seconds": 1})
