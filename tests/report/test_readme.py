"""The README is true: its numbers are those of records, its Python runs."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def pooled(record: dict) -> list[str]:
    """The README's rows: cells of one length taken together."""
    rows = []
    for length in sorted({row["length"] for row in record["rows"]}):
        cells = [row for row in record["rows"] if row["length"] == length]
        samples = sum(row["samples"] for row in cells)
        exact = sum(row["exact_match"] * row["samples"] for row in cells) / samples
        digits = sum(row["digit_accuracy"] * row["samples"] for row in cells) / samples
        worst = min(row["exact_match"] for row in cells)
        rows.append(f"| {length:,} | {exact:.1%} of {samples} | {worst:.1%} | {digits:.1%} |".replace("%", " %"))
    return rows


def test_the_table_is_the_record():
    source, table = re.search(r"<!-- passkey: (\S+) -->\n((?:\|.*\n)+)", README).groups()
    assert table.splitlines()[2:] == pooled(json.loads((ROOT / source).read_text()))


def test_numbers_in_the_text_are_the_training_record():
    record = json.loads((ROOT / "results/passkey_bytes_12m/training/record.json").read_text())
    metrics, data = record["metrics"], record["data"]
    assert f"{metrics['parameters'] / 1e6:.1f}M-parameter" in README
    assert f"trained for {metrics['seconds']:.0f} seconds on one H100" in README
    assert f"at most {data['max_segments'] * data['segment_length']:,} tokens" in README


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", README, re.S))
def test_its_python_runs(block, capsys):
    exec(compile(block, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "48213" in printed or "session" not in block  # the shipped model finds the key of the first block


def test_links_lead_somewhere():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
