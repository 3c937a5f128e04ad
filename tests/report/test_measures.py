"""Tables and pictures of capacity and drift."""

import io
import subprocess
import sys

import numpy as np
import pytest
from matplotlib import image

from infini.report.plots import capacity_curves, drift_curves
from infini.report.record import write_record
from infini.report.render import render
from infini.report.tables import capacity_table, drift_table

PROVENANCE = {
    "schema": 1,
    "command": "infini capacity",
    "source": {"commit": "0123456789abcdef", "dirty": False, "diff_sha256": None},
    "config": {},
    "data": {},
    "seeds": {"text": 0},
    "machine": {"cpu": "Some CPU", "cores": 2, "gpus": []},
    "versions": {"torch": "2.13.0"},
    "started": "2026-01-01T00:00:00+00:00",
    "seconds": 61.5,
}


def cell(model, key_dim, pairs, distance, digits):
    theory = {"theory_linear": 1.0, "theory_delta": 0.5}
    row = {"model": model, "key_dim": key_dim, "pairs": pairs, "distance": distance, "associations": 5 * pairs, "names": 16}
    return row | {"digit_accuracy": digits, "exact_match": digits / 2} | theory


@pytest.fixture
def capacity():
    rows = [cell("b", 128, 16, 1024, 0.25), cell("b", 128, 2, 1024, 1.0), cell("a", 64, 2, 1024, 0.75), cell("b", 128, 2, 0, 1.0)]
    return {**PROVENANCE, "kind": "capacity", "rows": rows}


@pytest.fixture
def drift():
    rows = [(10**7, 2e-6, 3e-6, None), (16384, 1e-7, 0.0, None)]
    names = ("tokens", "read_error", "matrix_error", "normalizer_error")
    return {**PROVENANCE, "kind": "drift", "rows": [{"model": "m"} | dict(zip(names, row, strict=True)) for row in rows]}


def lines(table):
    return [line for line in table.splitlines() if line.startswith("| ")][2:]


def test_capacity_has_a_sorted_line_per_cell_with_theory_beside_it(capacity):
    assert lines(capacity_table(capacity)) == [
        "| a | 64 | 1,024 | 2 | 10 | 16 | 75.0 % | 37.5 % | 100.0 % | 50.0 % |",
        "| b | 128 | 0 | 2 | 10 | 16 | 100.0 % | 50.0 % | 100.0 % | 50.0 % |",
        "| b | 128 | 1,024 | 2 | 10 | 16 | 100.0 % | 50.0 % | 100.0 % | 50.0 % |",
        "| b | 128 | 1,024 | 16 | 80 | 16 | 25.0 % | 12.5 % | 100.0 % | 50.0 % |",
    ]
    assert "chance 10 %" in capacity_table(capacity) and "0123456789ab" in capacity_table(capacity)


def test_drift_has_a_line_per_length(drift):
    assert lines(drift_table(drift)) == ["| m | 16,384 | 1.0e-07 | 0.0e+00 | - |", "| m | 10,000,000 | 2.0e-06 | 3.0e-06 | - |"]


def colors(png):
    pixels = np.round(image.imread(io.BytesIO(png))[..., :3] * 255).astype(int)
    return lambda color: np.nonzero((pixels == color).all(-1))


BLUE, ORANGE = (31, 119, 180), (255, 127, 14)


def test_the_capacity_picture_has_a_color_per_model_and_a_panel_per_distance(capacity):
    where = colors(capacity_curves(capacity))
    assert min(len(where(BLUE)[0]), len(where(ORANGE)[0])) > 30
    one = [row for row in capacity["rows"] if row["distance"] == 1024]
    few = image.imread(io.BytesIO(capacity_curves(capacity | {"rows": one})))
    assert few.shape[1] < image.imread(io.BytesIO(capacity_curves(capacity))).shape[1]
    # Each panel has its own cells: few digits right, low in the left one, many in the right one.
    rows = [
        cell("b", 128, pairs, distance, share) | {"theory_linear": share, "theory_delta": share}
        for pairs in (2, 64)
        for distance, share in ((0, 0.3), (1024, 1.0))
    ]
    png = capacity_curves(capacity | {"rows": rows})
    down, across = colors(png)(BLUE)
    height, width = image.imread(io.BytesIO(png)).shape[:2]
    left, right = down[across < 0.45 * width], down[across > 0.6 * width]
    assert left.min() > height / 2 > right.max()


def test_the_drift_picture_bears_what_has_no_logarithm_or_is_not_there(drift):
    assert len(colors(drift_curves(drift))(BLUE)[0]) > 100


@pytest.mark.parametrize("kind", ["capacity", "drift"])
def test_rendering_again_gives_the_same_bytes_in_another_process(kind, request, tmp_path):
    path = tmp_path / "record.json"
    write_record(request.getfixturevalue(kind), path)
    written = render(path)
    assert [file.suffix for file in written] == [".md", ".png"]
    before = [file.read_bytes() for file in written]
    subprocess.run([sys.executable, "-m", "infini.cli.main", "report", str(path)], check=True, capture_output=True)
    assert [file.read_bytes() for file in written] == before
