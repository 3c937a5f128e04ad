"""Rows of the attention within reach: compared before they are timed, and work counted from what is seen."""

import json
import runpy
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from infini.bench import reach, reach_tiles, tiles
from infini.bench.memory import Shape
from infini.bench.reach import Reach

pytest.importorskip("triton")
from infini.kernels.tiles import LOCAL, LocalTiles  # noqa: E402

PACKED = Reach(2, 40, 2, 1, 16, window=9, document=11)


@pytest.mark.parametrize("case", [PACKED, Reach(1, 40, 2, 1, 16, segment_length=16, document=11)], ids=["window", "segment"])
def test_every_way_is_compared_and_timed(case, kernel_device, rows_of):
    rows = rows_of(reach.trials(case, kernel_device, "local"), kernel_device)
    assert [(row["kernel"], row["direction"]) for row in rows] == [
        (way, direction) for direction in ("forward", "forward + backward") for way in reach.WAYS
    ]
    assert all(row["milliseconds"] > 0 for row in rows)
    for bands, kernel in (rows[:2], rows[2:]):
        assert kernel["against"] == "bands" and kernel["ratio"] == pytest.approx(kernel["milliseconds"] / bands["milliseconds"])


@pytest.mark.parametrize("part", ["output", "keys"])
def test_what_does_not_agree_is_not_timed(part, kernel_device, monkeypatch, rows_of):
    """A wrong output, and a right one whose keys get another gradient."""
    honest = reach.attend_by

    def wrong(way, q, k, v, plan):
        out = honest(way, q, k, v, plan)
        return out * 1.1 if part == "output" else honest(way, q, 1.1 * k - 0.1 * k.detach(), v, plan)

    monkeypatch.setattr(reach, "attend_by", wrong)
    rows = rows_of(reach.trials(PACKED, kernel_device, "local"), kernel_device)
    assert len(rows) == 4 and all({"output": "output", "keys": "dk"}[part] in row["failed"] for row in rows)


def test_only_pairs_that_see_each_other_are_counted():
    assert Reach(1, 6, 1, 1, 16, window=3).work(gradient=False).flop == (1 + 2 + 3 + 3 + 3 + 3) * 4 * 16


def test_segments_of_rows_that_are_alike_have_other_kernels():
    alike, packed = Shape(1, 64, 16, 2, 1, 16), Shape(1, 64, 16, 2, 1, 16, document=20)
    assert [case.window for case in Reach.all_of(alike)] == [16]
    assert [(case.window, case.segment_length) for case in Reach.all_of(packed)] == [(16, None), (None, 16)]


def test_records_of_older_runs_are_of_the_same_fields():
    record = json.loads((Path(__file__).parents[2] / "results/benchmarks/h200/reach/record.json").read_text())
    shapes = [row["shape"] for row in record["rows"] if row["what"] == "attention within reach"]
    assert shapes and all(list(asdict(Reach(**shape)).items()) == list(shape.items()) for shape in shapes)


def test_the_tuner_times_what_agrees_and_nothing_else(kernel_device, monkeypatch):
    honest, good, bad = reach_tiles.why_out, LocalTiles(16, 16, 32, 4, 1), LocalTiles(16, 16, 16, 4, 1)

    def why_out(name, kernels, tiles, *witnesses):
        return "numbers" if tiles == bad else honest(name, kernels, tiles, *witnesses)

    monkeypatch.setattr(reach_tiles, "why_out", why_out)
    found = dict(reach_tiles.tune(PACKED, kernel_device, [good, bad], repeats=1))
    assert found.keys() == LOCAL.keys()
    for result in found.values():
        assert [tiles for _, *tiles in result["timed"]] == [list(good[1:])] and result["refused"] == {"numbers": 1}


@pytest.mark.parametrize("name", ["local", "local_queries", "local_keys"])
def test_the_tuner_compares(name, kernel_device):
    kernels, tiles = reach_tiles.Kernels(PACKED, kernel_device), LocalTiles(16, 16, 32, 4, 1)
    plain, true = kernels.eager(torch.bfloat16), kernels.eager(torch.float64)
    assert reach_tiles.why_out(name, kernels, tiles, plain, true) is None
    launch = kernels.by_name[name]
    kernels.by_name[name] = lambda tiles: {part: 1.1 * x for part, x in launch(tiles).items()}
    assert reach_tiles.why_out(name, kernels, tiles, plain, true).startswith("AssertionError: ")


def test_candidates_are_few_and_all_different():
    for name, wide in ((name, wide) for name in LOCAL for wide in (64, 128, 256)):
        tries = list(reach_tiles.candidates(name, wide))
        assert 15 <= len(tries) == len(set(tries)) <= 30 and all(one.BD == wide for one in tries)


@pytest.mark.parametrize("module", [tiles, reach_tiles], ids=["tiles", "reach_tiles"])
def test_a_tuner_without_a_folder_says_what_it_needs(module, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["python"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(module.__file__, run_name="__main__")
    name = module.__name__.rpartition(".")[2]
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: give the folder for {name}.json: python -m {module.__name__} OUTPUT")
