"""`infini peak`: the right key by both ways, and rows from which growth can be read."""

import pytest

from infini.cli import main as cli
from infini.report.generation_tables import peak_table
from infini.report.record import read_record

pytest.importorskip("transformers")


def test_the_shipped_model_answers_both_ways(tmp_path):
    asked = ["peak", "lengths=[600,700]", "warm_up=500", "piece=512", "device=cpu", f"output={tmp_path}"]
    assert cli.main(asked) == 0
    record = read_record(tmp_path / "record.json")
    assert [(row["way"], row["length"]) for row in record["rows"]] == [
        ("generate", 600), ("generate", 700), ("session", 600), ("session", 700),
    ]
    assert all(row["exact"] and str(row["key"]) in row["answer"] for row in record["rows"])
    one, *others = record["rows"]
    assert {row["state_bytes"] for row in others} == {one["state_bytes"]}
    assert one["answer"] == others[1]["answer"] and others[0]["answer"] == others[2]["answer"]
    assert len(record["data"]["checkpoint_sha256"]) == 64


def test_growth_is_counted_from_the_shortest_prompt_of_each_way():
    def row(way, length, peak):
        facts = {"key": 12345, "answer": " 12345.\nx", "exact": True, "seconds": 2.0, "state_bytes": 7}
        return facts | {"way": way, "length": length, "peak_memory_bytes": peak}

    about = {"source": {"commit": "c" * 40, "dirty": False}, "machine": {"gpus": [], "cores": 1, "cpu": "x"}}
    about |= {"seeds": {}, "versions": {}, "command": "infini peak", "started": "now", "seconds": 1.0}
    rows = [row("session", 3000, 1010), row("generate", 1000, 5000), row("session", 1000, 1000), row("generate", 3000, 5000 + 2000 * 48)]
    table = peak_table(about | {"rows": rows})
    assert "| generate | 3,000 | 12345 | ` 12345.` | yes | 2.00 | 1,500 |" in table and "| 48.00 | 20.2000 |" in table
    assert "| 0.01 | 1.0100 |" in table


@pytest.mark.parametrize(
    ("argument", "sentence"),
    [
        ("lengths=[2000,1200]", "lengths is [2000, 1200]; give at least one number of tokens, in rising order"),
        ("lengths=[100]", "length is 100 tokens, but the passkey text alone takes"),
        ("depth=2", "depth is 2.0"),
        ("piece=0", "piece is 0; it must be at least 1"),
        ("ways=[hf]", "ways is ['hf'] but must be a list, each one of generate, session"),
        ("checkpoint=nowhere", "there is no checkpoint folder 'nowhere'"),
    ],
)
def test_bad_input_is_one_sentence(argument, sentence, tmp_path, capsys):
    assert cli.main(["peak", "device=cpu", f"output={tmp_path}", argument]) == 2
    assert sentence in capsys.readouterr().err
