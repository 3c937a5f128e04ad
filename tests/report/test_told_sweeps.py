"""What is told of a sweep stands in its tables, and they are what its records say."""

import re
import shutil
from pathlib import Path

import pytest

from infini.cli.report import find_sweeps, render_sweep

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "results").glob("*.md"))]
# A table behind <!-- sweep: FOLDER --> has columns of one table of FOLDER/sweep.md, under their names there, of some of its lines.
TOLD = r"<!-- sweep: (\S+) -->\n((?:\|.*\n)+)"


def cells(table: str) -> list[tuple[str, ...]]:
    """Head and lines of a Markdown table, without what lies between them."""
    rows = [tuple(cell.strip() for cell in line.strip().strip("|").split("|")) for line in table.splitlines()]
    return [rows[0], *rows[2:]]


def untold(table: str, source: str) -> list[tuple[str, ...]]:
    """The lines of a table that no table of the source has, under the same heads."""
    head, *lines = cells(table)
    found = []
    for names, *rows in map(cells, re.findall(r"(?:\|.*\n)+", source)):
        if set(head) <= set(names):
            places = [names.index(name) for name in head]
            found += [tuple(row[place] for place in places) for row in rows]
    return [line for line in lines if line not in found]


@pytest.mark.parametrize(("folder", "table"), [told for page in PAGES for told in re.findall(TOLD, page.read_text())])
def test_a_table_is_that_of_its_sweep(folder, table):
    assert not untold(table, (ROOT / folder / "sweep.md").read_text())


@pytest.mark.parametrize("folder", find_sweeps(ROOT / "results"), ids=str)
def test_a_committed_sweep_is_what_its_records_say(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "sweep", ignore=shutil.ignore_patterns("sweep.md", "*.png"))
    render_sweep(copy, {})
    for name in ("sweep.md", "sweep.json"):
        assert (copy / name).read_text() == (folder / name).read_text()


def test_a_line_of_another_row_column_or_table_is_found_out():
    source = "| model | bits | loss |\n|---|---|---|\n| a | 1 | 2 |\n| b | 3 | 4 |\n\n| model | loss |\n|---|---|\n| a | 9 |\n"
    told = "| model | loss |\n|---|---|\n| b | 4 |\n| a | 9 |\n| a | 1 |\n| b | 9 |\n"
    assert untold(told, source) == [("a", "1"), ("b", "9")]
    assert untold("| model | speed |\n|---|---|\n| a | 1 |\n", source) == [("a", "1")]
