"""The benchmark at sizes that an interpreter can do: it compares before it times, and its record says what was timed."""

import pytest
import torch

from infini import InfiniConfig, InfiniTransformer
from infini.attention import InfiniAttention
from infini.bench.memory import Shape, run
from infini.report.record import read_record
from infini.report.render import render

pytest.importorskip("triton")
SHAPES = [Shape(1, 24, 16, 2, 1, 16), Shape(1, 16, 8, 1, 1, 16, long=False)]


def bench(tmp_path, device):
    torch.manual_seed(0)
    config = InfiniConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1, segment_length=8, initializer_range=0.3
    )
    model = InfiniTransformer(config, "eager").to(device)
    return run(tmp_path, SHAPES, device, model, (1, 16), repeats=1)


def test_every_part_is_timed_by_both_backends(tmp_path, kernel_device, capsys):
    rows = bench(tmp_path, kernel_device)
    parts = {(row["part"], row["backend"], str(row.get("shape"))) for row in rows}
    assert len(parts) == len(rows) == 2 * (2 * len(SHAPES) + 2)
    assert all(row["milliseconds"] > 0 and row["tokens_per_second"] > 0 for row in rows)
    record = read_record(tmp_path / "record.json")
    assert record["rows"] == rows and record["config"]["batch"] == [1, 16]
    table = render(tmp_path / "record.json")[0].read_text()
    plain, fast = (next(row for row in rows if row["backend"] == backend) for backend in ("torch", "triton"))
    times = f"| memory forward | 1 x 24 / 16, 2 : 1 x 16 | {plain['milliseconds']:.3f} | {fast['milliseconds']:.3f} |"
    assert f"{times} {plain['milliseconds'] / fast['milliseconds']:.2f} |" in table
    assert table.count("| shipped model |") == 2 and table.count("\n| memory") == 2 * len(SHAPES)
    assert len([line for line in capsys.readouterr().out.splitlines() if "tokens/s" in line]) == len(rows)


def test_what_does_not_agree_is_not_timed(tmp_path, kernel_device, monkeypatch):
    honest = InfiniAttention._read_by_kernels
    monkeypatch.setattr(InfiniAttention, "_read_by_kernels", lambda *arguments: honest(*arguments) * 1.1)
    with pytest.raises(AssertionError, match="error"):
        bench(tmp_path, kernel_device)
    assert not (tmp_path / "record.json").exists()


def test_tiles_are_timed_and_the_table_is_left_alone(kernel_device):
    from infini.bench.tiles import tune
    from infini.kernels.tiles import TABLE

    before = {kernel: dict(table) for kernel, table in TABLE.items()}
    found = tune(SHAPES[0], kernel_device, [(16, 16, 4, 1), (16, 32, 4, 1)], repeats=1)
    assert set(found) == set(TABLE) and all(len(timed) == 2 and timed == sorted(timed) for timed in found.values())
    assert before == TABLE
