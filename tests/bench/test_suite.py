"""The benchmark at sizes that an interpreter can do: it compares before it times, and its record says what was timed."""

import dataclasses
import json

import pytest
import torch

from infini import InfiniConfig, InfiniTransformer, InputError
from infini.attention import InfiniAttention
from infini.bench import alone, attend, clock, curve, memory, shipped, suite, trial
from infini.bench.memory import MemoryCase, Shape
from infini.bench.pieces import Case
from infini.bench.suite import BenchSettings, run
from infini.bench.trial import Ceilings, Trial, measure
from infini.bench.work import Work
from infini.report.record import read_record
from infini.report.render import render
from infini.report.tables import bench_shape

pytest.importorskip("triton")
from infini.kernels.tiles import TUNED, USES, Tiles  # noqa: E402

SHAPES = (Shape(1, 16, 8, 2, 1, 16),)
SMALL = BenchSettings(
    parts=("layer", "kernels", "full", "step", "prefill", "local", "memory", "curve"),
    rules=("linear",),
    backends=("triton", "torch"),
    compiled=(False,),
    tokens=16,
    lengths=(8, 24),
    step_tokens=24,
    curve_steps=2,
    piece=16,
    layers=1,
    heads=1,
    head_dim=16,
    intermediate_size=16,
    segment_length=8,
    repeats=1,
    seconds=0.001,
)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(memory, "SHAPES", SHAPES)
    monkeypatch.setattr(alone, "SHAPES", ())
    monkeypatch.setattr(memory.trials, "__defaults__", (SHAPES, memory.BACKENDS))
    monkeypatch.setattr(curve.Run, "ROWS", 1)
    monkeypatch.setattr(curve.Run, "SEGMENTS", 2)


def timed(rows, **facts):
    return [row for row in rows if all(row.get(name) == value for name, value in facts.items())]


def test_every_part_is_timed_and_rendered(tmp_path, kernel_device, small, capsys):
    rows = run(tmp_path, SMALL, kernel_device)
    assert not [row for row in rows if "failed" in row]
    assert [row["part"] for row in rows] == sorted((row["part"] for row in rows), key=SMALL.parts.index)
    for row in rows:
        assert row["milliseconds"] > 0 and row["tokens_per_second"] == pytest.approx(1000 * row["tokens"] / row["milliseconds"])
    record = read_record(tmp_path / "record.json")
    assert record["rows"] == json.loads(json.dumps(rows)) and record["config"]["piece"] == 16
    # A ratio is to the fastest kernel that the same run has timed.
    alone = timed(rows, part="layer", what="attention alone", direction="forward")
    for whole in timed(rows, part="layer", what="Infini-attention", direction="forward"):
        assert whole["ratio"] == pytest.approx(whole["milliseconds"] / min(row["milliseconds"] for row in alone))
    # Full attention reaches over all tokens, ours over a segment.
    full, ours = timed(rows, part="full", tokens=24, what="attention alone")[0], timed(rows, part="full", tokens=24, rule="linear")[0]
    assert full["flop"] == 4 * 16 * 24 * 25 / 2 and ours["flop"] == 4 * 16 * 24 * 9 / 2 + 4 * 24 * 16 * 16
    steps = timed(rows, part="step", what="training step")
    assert [(row["rule"], row["backend"]) for row in steps] == [("full attention", "torch"), ("linear", "triton"), ("linear", "torch")]
    assert steps[0]["model"]["memory_layers"] == [] and steps[0]["model"]["segment_length"] == 24
    for row in steps:
        use = row["flop"] / (row["milliseconds"] / 1000) / record["ceilings"]["product_flop_per_second"]
        assert row["flop_utilization"] == pytest.approx(use)
    (curve,) = timed(rows, part="curve")
    assert len(curve["losses"]) == 2 and curve["plain_losses"] != curve["fp32_losses"]
    table, picture = render(tmp_path / "record.json")
    text = table.read_text()
    assert all(f"## {part}\n" in text for part in SMALL.parts) and text.count("| Infini-attention | linear |") == 8
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.count("tokens/s") == len(rows)


def test_packed_rows_are_compared_with_whole_ones(kernel_device, rows_of):
    """The ratio is to the same backend's time for the same tokens without documents."""
    whole, packed = Shape(2, 24, 8, 2, 1, 16), Shape(2, 24, 8, 2, 1, 16, document=7)
    assert 2 < memory._begins(packed).sum() < 24 and memory._begins(packed)[:, 0].all()
    rows = rows_of(memory.trials(kernel_device, (whole, packed), ("torch", "triton")), kernel_device)
    assert not [row for row in rows if "failed" in row]
    for of_whole, of_packed in zip(rows[:4], rows[4:], strict=True):
        assert of_packed["against"] == "whole rows"
        assert of_packed["ratio"] == pytest.approx(of_packed["milliseconds"] / of_whole["milliseconds"])
    assert "packed 7" in bench_shape(rows[-1]) and "packed" not in bench_shape(rows[0])


def test_a_layer_and_what_it_is_compared_with_are_launched_ahead_alike(tmp_path, kernel_device, small, monkeypatch):
    """A ratio of two times of which one had waited for the host would be none; and the table says which rows were launched ahead."""
    honest, leads = suite.measure, {}

    def watched(trial, *given):
        leads.setdefault(trial.facts["what"], set()).add(trial.lead)
        return honest(trial, *given) | ({"launched_ahead": True} if trial.lead else {})  # which a GPU's rows say themselves

    monkeypatch.setattr(suite, "measure", watched)
    run(tmp_path, dataclasses.replace(SMALL, parts=("layer", "step")), kernel_device)
    ahead = ("attention alone", "memory part", "Infini-attention")
    assert leads == dict.fromkeys(ahead, {clock.LEAD}) | {"training step": {0}}
    assert f"so that the host's time does not count: {', '.join(ahead)}." in render(tmp_path / "record.json")[0].read_text()


def test_what_does_not_agree_is_not_timed(tmp_path, kernel_device, small, monkeypatch):
    """The other rows are, and the command fails at the end."""
    honest = InfiniAttention._read_by_kernels
    monkeypatch.setattr(InfiniAttention, "_read_by_kernels", lambda *arguments: honest(*arguments) * 1.1)
    settings = dataclasses.replace(SMALL, parts=("layer", "step"))
    with pytest.raises(AssertionError, match="these were not timed"):
        run(tmp_path, settings, kernel_device)
    rows = read_record(tmp_path / "record.json")["rows"]
    for row in rows:
        of_kernels = row.get("backend") == "triton"
        assert ("milliseconds" in row) != of_kernels and ("numbers differ" in row.get("failed", "")) == of_kernels
    assert "numbers differ" in render(tmp_path / "record.json")[0].read_text()


def test_a_curve_that_leaves_the_others_is_noticed(kernel_device, small, monkeypatch):
    """No time, but the curves."""
    honest = InfiniAttention._read_by_kernels
    monkeypatch.setattr(InfiniAttention, "_read_by_kernels", lambda *arguments: honest(*arguments) * 3)
    monkeypatch.setattr(curve, "FLOOR", 0.0)  # hardly anything is learned in two steps
    (found,) = curve.trials(kernel_device, ("linear",), 2, 4, 1, 16, 1)
    row = measure(found, kernel_device, Ceilings(1, 1), 1, 0.001)
    assert "nats from fp32's" in row["failed"] and len(row["losses"]) == 2


def test_an_attention_kernel_that_looks_ahead_is_noticed(monkeypatch):
    monkeypatch.setattr(attend, "attend", lambda kernel, q, k, v, window: torch.nn.functional.scaled_dot_product_attention(q, k, v))
    q, k, v = attend.Stretch(1, 64, 2, 1, 16).inputs(torch.device("cpu"))
    with pytest.raises(AssertionError, match="row 0, queries from 0"):
        attend.assert_attends("sdpa", q, k, v)


@pytest.mark.parametrize(("window", "wrong"), [(None, None), (5, 6)])
def test_the_comparison_knows_windows(window, wrong, monkeypatch):
    def written_out(kernel, q, k, v, seen):
        return attend._written_out(q[0], k[0], v[0], 0, q.shape[1], seen if wrong is None else wrong, q.dtype).unsqueeze(0)

    monkeypatch.setattr(attend, "attend", written_out)
    q, k, v = attend.Stretch(1, 40, 2, 1, 16).inputs(torch.device("cpu"))
    if wrong is None:
        attend.assert_attends("any", q, k, v, window)
    else:
        with pytest.raises(AssertionError):
            attend.assert_attends("any", q, k, v, window)


def test_out_of_memory_is_a_row_and_the_others_are_kept(tmp_path, kernel_device, monkeypatch):
    """Also where the inputs of a part do not fit; the record is written after every row."""
    written, full = [], suite.write_record

    def trials(settings, device):
        for times in (1, 2):
            if times == 2:
                raise torch.OutOfMemoryError("no room")
            yield Trial({"part": "local", "what": "small"}, lambda: lambda: None, 1)
            yield Trial({"part": "local", "what": "large"}, lambda: (_ for _ in ()).throw(torch.OutOfMemoryError("no room")), 1)

    monkeypatch.setitem(suite.PARTS, "local", trials)
    monkeypatch.setattr(suite, "write_record", lambda record, path: (written.append(len(record["rows"])), full(record, path)))
    rows = run(tmp_path, dataclasses.replace(SMALL, parts=("local", "layer")), kernel_device)
    assert [row.get("failed") for row in rows[:3]] == [None, "out of memory", "no room"]
    assert "milliseconds" in rows[3] and rows[3]["part"] == "layer"
    assert written[:4] == [1, 2, 4, 5] and written[-1] == len(rows)


def test_a_floor_is_the_longer_of_bytes_and_products():
    ceilings = Ceilings(1e9, 1e12)
    found = Trial({"part": "x", "what": "y"}, lambda: lambda: clock.time.sleep(0.004), 1, Work(1e6, 2e9), ("z", 8.0), True)
    row = measure(found, torch.device("cpu"), ceilings, 3, 1.0)
    assert row["floor_milliseconds"] == 2 and row["floor_ratio"] == pytest.approx(row["milliseconds"] / 2)
    assert row["ratio"] == pytest.approx(row["milliseconds"] / 8) and row["flop_utilization"] == pytest.approx(2 / row["milliseconds"])
    assert trial.fastest([{"failed": "no"}, row, {"milliseconds": 1e9}]) is row


def test_the_shipped_part(kernel_device, rows_of, monkeypatch):
    asked = []
    monkeypatch.setattr(InfiniTransformer, "enable_compile", lambda self: asked.append(self))  # the compiler itself takes a minute
    config = InfiniConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1, segment_length=8, initializer_range=0.3
    )
    model = InfiniTransformer(config, "eager").to(kernel_device)
    rows = rows_of(shipped.trials(kernel_device, model, (1, 16), True), kernel_device)
    ways = [("torch", False), ("triton", False), ("triton", True)]
    found = [(row["what"], row["backend"], row.get("compiled", False)) for row in rows]
    assert found == [(what, *way) for what in ("training step", "reading") for way in ways] and len(asked) == 2
    assert all("milliseconds" in row for row in rows) and rows[1]["against"] == "torch"


def test_a_compiled_memory_is_compared_and_timed(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda call, **options: call)  # the compiler itself takes half a minute
    case = MemoryCase(SHAPES[0], torch.device("cpu"))
    case.agree("compiled")
    assert case.timed("compiled", gradient=False)().shape == (1, 16, 2, 16)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"parts": ("laier",)}, "parts is 'laier'; it must be one of layer, kernels, full, step"),
        ({"tokens": 20}, "tokens is 20; it must be whole segments of segment_length = 8"),
        ({"lengths": (8, 12)}, "lengths is 12"),
        ({"repeats": 0}, "repeats is 0; it must be at least 1"),
        ({"backends": ("cuda",)}, "backends is 'cuda'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes, words):
    with pytest.raises(InputError, match=words):
        dataclasses.replace(SMALL, **changes)


@pytest.mark.parametrize("variant", ["gated", "delta", "gamma_delta", "deltanet"])
def test_every_kernel_alone_equals_its_plain_twin(variant, kernel_device):
    """Also with other tiles, in every way that a kernel has."""
    case = Case(Shape(1, 64, 32, 4, 2, 16, variant), kernel_device)
    for name, piece in case.pieces().items():
        piece.agree()
        if piece.table:
            piece.agree(Tiles(16, 16, 16, 4, 2, part=16, ahead=True, fused=name == "read_backward", turned=True))
        if name == "chunks_backward":  # compared as a part of write_backward
            continue
        wrong = dataclasses.replace(piece, launch=lambda tiles, piece=piece: {key: 1.1 * x for key, x in piece.launch(tiles).items()})
        with pytest.raises(AssertionError, match=name):
            wrong.agree()


def test_the_tuner_times_what_agrees_and_nothing_else(kernel_device, monkeypatch):
    from infini.bench import tiles

    good, bad = Tiles(16, 16, 32, 4, 1), Tiles(16, 16, 16, 4, 1)
    honest, kept = alone.prove, {}
    monkeypatch.setattr(alone, "prove", lambda job, device: "numbers" if job[2] == bad else honest(job, device))
    kernels = {"a read": (Shape(1, 64, 32, 2, 1, 16), "read"), "a write": (Shape(1, 64, 32, 2, 1, 16), "write")}
    before = dict(TUNED)
    tiles.tune(kernels, kernel_device, Ceilings(1e9, 1e12), kept.__setitem__, 0, [good, bad], repeats=1)
    for result in kept.values():
        found = [Tiles(*way) for _, way in result["timed"]]
        assert good in found and bad not in found and result["refused"] == {"numbers": 1}
        assert [took for took, _ in result["timed"]] == sorted(took for took, _ in result["timed"])
        assert {way.registers for way in found} == {0, 128, 168} and all(way.BT == 32 for way in found)
    assert eval("{" + tiles.line_of(kept["a write"], "here").partition(" #")[0] + "}").keys() == {("outer", 16, False, "short")}
    assert before == TUNED


def test_candidates_are_few_and_all_different():
    from infini.bench.tiles import candidates

    for wide in (64, 128, 256):
        for kernel in USES:
            tries = list(candidates(kernel, wide))
            assert 2 <= len(tries) == len(set(tries)) <= 80 and all(one.BD == wide and one.BV <= wide for one in tries)


def test_kernels_are_compiled_by_other_processes(tmp_path):
    """One that fails there is a reason here, not an end."""
    shape = Shape(1, 16, 8, 1, 1, 16)
    ((job, why),) = alone.prove_all([(shape, "nothing", None)], torch.device("cpu"), workers=1, seconds=60)
    assert job == (shape, "nothing", None) and why.startswith("KeyError")
