"""The README is true: its numbers are those of records, its Python runs."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def read(source: str) -> dict:
    return json.loads((ROOT / source).read_text())


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
    sources, table = re.search(r"<!-- passkey: (.+) -->\n((?:\|.*\n)+)", README).groups()
    rows = [row for source in sources.split() for row in pooled(read(source))]
    assert table.splitlines()[2:] == rows


def right_of(rows: list[dict]) -> str:
    """"398 of 400", cells taken together."""
    return f"{sum(round(row['exact_match'] * row['samples']) for row in rows)} of {sum(row['samples'] for row in rows)}"


def test_other_seeds_are_those_of_their_records():
    folder = "results/passkey_bytes_12m"
    assert f"it finds {right_of(read(f'{folder}/passkey_seed1/record.json')['rows'])} keys" in README
    assert f"another seed finds {right_of(read(f'{folder}/seed1/passkey_seed1/record.json')['rows'])}," in README
    assert f"and at a million tokens {right_of(read(f'{folder}/seed1/million/record.json')['rows'])}." in README
    assert read(f"{folder}/seed1/training/record.json")["seeds"]["train"] == 1


def test_peak_memory_does_not_grow():
    peaks = {row["peak_memory_bytes"] for row in read("results/passkey_bytes_12m/peak_memory/record.json")["rows"]}
    assert len(peaks) == 1 and "the same to the byte" in README


def test_the_long_prompt_is_its_record():
    short, long = [row for row in read("results/long_prompt/record.json")["rows"] if row["way"] == "generate"]
    growth = (long["peak_memory_bytes"] - short["peak_memory_bytes"]) / (long["length"] - short["length"])
    assert long["exact"] and long["length"] == 2**20
    assert f"in {long['seconds']:.1f} seconds at {growth:.0f} bytes a token" in README


def test_drift_is_its_record():
    rows = read("results/drift/record.json")["rows"]
    (last,) = [row for row in rows if row["tokens"] == 10_485_760]
    assert f"within {last['read_error']:.0e} of its fp64 copy" in README


def test_numbers_in_the_text_are_the_training_record():
    record = read("results/passkey_bytes_12m/training/record.json")
    metrics, data = record["metrics"], record["data"]
    assert f"{metrics['parameters'] / 1e6:.1f}M-parameter" in README
    assert f"trained for {metrics['seconds']:.0f} seconds on one H200" in README
    assert [gpu["name"] for gpu in record["machine"]["gpus"]] == ["NVIDIA H200"]
    assert f"at most {data['max_segments'] * data['segment_length']:,} tokens" in README


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", README, re.S))
def test_its_python_runs(block, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {})
    assert "48213" in capsys.readouterr().out or "48213" not in block  # the shipped model finds the key


def test_links_lead_somewhere():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


NEGATIVE = (ROOT / "results/NEGATIVE.md").read_text()


@pytest.mark.parametrize(
    ("source", "cells"), re.findall(r"^\| \[[^]]*\]\((\S+)\.md\) \|((?: *(?:\d+ of \d+)? \|)+)$", NEGATIVE, re.M)
)
def test_what_did_not_work_is_told_with_the_numbers_of_its_records(source, cells):
    rows = read(f"results/{source}.json")["rows"]
    lengths = sorted({row["length"] for row in rows})
    told = [cell.strip() for cell in cells.split("|")]
    assert told[: len(lengths)] == [right_of([row for row in rows if row["length"] == length]) for length in lengths]


def test_what_is_said_of_books_is_the_record():
    rows = read("results/passkey_bytes_12m/untrained/natural_text/record.json")["rows"]
    assert f"it finds {right_of(rows)} keys up to {max(row['length'] for row in rows):,} tokens" in README
