"""What others publish beside our layer: nothing of ours or of a library is timed before it is right, and what cannot be compared says so."""

import dataclasses
import math
import re
import sys
import types

import pytest
import torch

from infini import InputError, gated_delta
from infini.attention import InfiniAttention
from infini.bench import foreign, peers, projected
from infini.bench import gated_delta as bench_gated_delta
from infini.bench.memory import MemoryCase, Shape
from infini.bench.suite import BenchSettings, run
from infini.bench.trial import Ceilings, measure
from infini.cli import bench as command
from infini.cli.compose import compose
from infini.report.record import read_record
from infini.report.render import render

CPU = torch.device("cpu")
SMALL = BenchSettings(
    parts=("peers",), rules=("linear",), backends=("triton", "torch"), tokens=16, heads=2, head_dim=16, segment_length=8, repeats=1, seconds=0.001
)
SHAPE = SMALL.peer_shape
BOTH = ("forward", "forward + backward")

THEIRS = """
import torch
from torch import nn

class Mean(nn.Module):
    '''Every token receives the mean of all before it.'''
    def __init__(self, size, segment):
        super().__init__()
        self.proj, self.segment = nn.Linear(size, size), segment

    def forward(self, x):
        y = self.proj(x).float()
        return y.cumsum(1) / torch.arange(1, x.shape[1] + 1, device=x.device)[:, None]

class Tuple(Mean):
    def forward(self, x):
        return super().forward(x), "state"

class SplitByView(Mean):
    '''Heads by a view without a transpose, so that a head's row holds tokens of another place.'''
    def forward(self, x):
        y = super().forward(x)
        return y.view(len(x), 2, x.shape[1], -1).transpose(1, 2).reshape(x.shape)

class AcrossTheBorder(Mean):
    '''The last token of a segment sees the first one of the next.'''
    def forward(self, x):
        y, n = super().forward(x).clone(), self.segment
        y[:, n - 1 : -1 : n] = y[:, n - 1 : -1 : n] + self.proj(x)[:, n::n]
        return y

class InsideASegment(Mean):
    '''A token sees the next one of its segment, and no segment another.'''
    def forward(self, x):
        x = x.unflatten(1, (-1, self.segment))
        return self.proj(torch.cat([x[:, :, 1:], x[:, :, -1:]], dim=2)).flatten(1, 2)

class Remembers(Mean):
    '''Goes on where the last call ended.'''
    def forward(self, x):
        y = super().forward(x)
        before, self.seen = getattr(self, "seen", 0), y[:, -1:].detach()
        return y + before

class Drops(Mean):
    def forward(self, x):
        return nn.functional.dropout(super().forward(x), 0.5, self.training)

class Random(Mean):
    def forward(self, x):
        return super().forward(x) + torch.randn_like(x)

class Overflows(Mean):
    def forward(self, x):
        return super().forward(x) / 0

class Detached(Mean):
    def forward(self, x):
        return super().forward(x.detach()).detach()

class TooLarge(Mean):
    def forward(self, x):
        raise torch.OutOfMemoryError("tried to allocate\\na lot")

class Asserts(Mean):
    def forward(self, x):
        assert x.shape[1] == 1, "one token\\nat a time"

class Narrow(Mean):
    def forward(self, x):
        return super().forward(x)[..., :4]

class Dictionary(Mean):
    def forward(self, x):
        return {"y": super().forward(x)}

def maker(cls):
    return lambda hidden_size, heads, head_dim, segment_length: cls(hidden_size, segment_length)

mean, tuple_, split_by_view, across, inside = map(maker, (Mean, Tuple, SplitByView, AcrossTheBorder, InsideASegment))
remembers, drops, random_ = map(maker, (Remembers, Drops, Random))
overflows, detached, too_large, asserts, narrow, dictionary = map(maker, (Overflows, Detached, TooLarge, Asserts, Narrow, Dictionary))
number = 3
def no_module(*shape):
    return shape
def wants_more(hidden_size):
    return None
"""


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    file = tmp_path_factory.mktemp("peer") / "theirs.py"
    file.write_text(THEIRS)
    return lambda name: f"{file}:{name}"


def stand_in(q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False, use_qk_l2norm_in_kernel=False, cu_seqlens=None):
    """The library's operator as its documentation has it, by the matrix of all tokens: no loop, nothing of the code under test."""
    assert use_qk_l2norm_in_kernel and output_final_state and cu_seqlens is None and initial_state is None and q.dtype == torch.bfloat16
    assert g.dtype == beta.dtype == torch.float32 and all(x.is_contiguous() for x in (q, k, v, g, beta))
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    q, k = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
    until, beta = g.double().transpose(1, 2).cumsum(-1), beta.double().transpose(1, 2).unsqueeze(-1)
    decay = (until.unsqueeze(-1) - until.unsqueeze(-2)).tril().exp().tril()
    one = torch.eye(q.shape[2], dtype=q.dtype, device=q.device)
    written = torch.linalg.solve(one + (beta * decay * (k @ k.transpose(-1, -2))).tril(-1), beta * v)
    last = (k * decay[..., -1, :].unsqueeze(-1)).transpose(-1, -2) @ written
    read = (q.shape[-1] ** -0.5 if scale is None else scale) * (decay * (q @ k.transpose(-1, -2))) @ written
    return read.transpose(1, 2).to(torch.bfloat16), last.float()


@pytest.fixture
def machine(monkeypatch):
    """A Hopper with or without the library: the door's own reasons, as if the tensors were there; the operator is the stand-in."""

    def changed(packages=("fla",), triton=(3, 7, 1), operator=stand_in):
        monkeypatch.setattr(gated_delta, "_installed", lambda package: package in packages)
        monkeypatch.setattr(gated_delta, "_triton_version", lambda: triton)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
        monkeypatch.setattr(bench_gated_delta, "why_not", lambda device, *rest: gated_delta.why_not(torch.device("cuda"), *rest))
        for name in ("fla", "fla.ops", "fla.ops.gated_delta_rule"):
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        sys.modules["fla.ops.gated_delta_rule"].chunk_gated_delta_rule = operator

    return changed


def timed_rule(gradient, tokens=80):
    trial = bench_gated_delta.trial(CPU, tokens, 2, 16, gradient, ("ours", 2.0))
    return measure(trial, CPU, Ceilings(1e9, 1e12), 1, 0.001)


def timed_peer(peer, gradient=False):
    hidden = torch.randn(1, SHAPE.tokens, 32).to(torch.bfloat16)
    return measure(foreign.trial(peer, SHAPE, CPU, hidden, gradient, ("ours", 2.0)), CPU, Ceilings(1, 1), 1, 0.001)


def test_all_are_timed_in_one_run_and_rendered(tmp_path, kernel_device, theirs, machine, capsys):
    machine()
    rows = run(tmp_path, dataclasses.replace(SMALL, peer=theirs("split_by_view")), kernel_device)
    assert not [row for row in rows if "failed" in row] and {row["part"] for row in rows} == {"peers"}

    def found(**facts):
        return {row["direction"]: row for row in rows if all(row.get(name) == value for name, value in facts.items())}

    backends = [(backend, direction) for backend in ("triton", "torch") for direction in BOTH]
    for what in ("memory part", "Infini-attention", "layer with projections"):
        ours = [row for row in rows if row["what"] == what]
        assert [(row["backend"], row["direction"]) for row in ours] == backends and all(row["bytes"] and row["flop"] for row in ours)
    pairs = (("Infini-attention", found(what="gated delta rule", backend="fla")), ("layer with projections", found(verified=False)))
    for what, others in pairs:  # each stands against the fastest of ours that does as much
        assert tuple(others) == BOTH
        for direction, row in others.items():
            times = [one["milliseconds"] for one in rows if one["what"] == what and one["direction"] == direction]
            assert row["ratio"] == pytest.approx(row["milliseconds"] / min(times)) and row["against"].startswith(f"{what}, linear, ")
    assert [row["what"] for row in rows[-2:]] == ["split_by_view of theirs.py"] * 2 and "bytes" not in rows[-1]
    record = read_record(tmp_path / "record.json")
    assert record["config"]["peer"] == theirs("split_by_view") and not record["rows"][-1]["causal"] and record["rows"][-1]["finite"]
    table, picture = render(tmp_path / "record.json")
    text, printed = table.read_text(), capsys.readouterr().out
    said = re.compile(r"split_by_view of theirs.py \(not verified, not causal: earlier outputs change by [\d.]+ of the largest, finite\)")
    assert len(said.findall(text)) == len(said.findall(printed)) == 2
    assert text.count("| gated delta rule | - | fla |") == 2 and picture.read_bytes().startswith(b"\x89PNG")


def test_without_a_peer_only_its_rows_are_missing(tmp_path, kernel_device):
    settings = dataclasses.replace(SMALL, backends=("torch",), segment_length=32)  # one segment, shorter than asked
    rows = run(tmp_path, settings, kernel_device)
    assert {row["what"] for row in rows} == {"attention alone", "memory part", "Infini-attention", "gated delta rule"}
    assert all(("failed" in row) == (row["what"] == "gated delta rule") for row in rows if kernel_device == CPU)
    assert "flash-linear-attention cannot run: " in render(tmp_path / "record.json")[0].read_text()


def test_what_others_stand_against_is_the_fastest_that_ran():
    rows = [{"what": "ours", "rule": "linear", "backend": b, "direction": d} for d in BOTH for b in "abc"]
    for row, took in zip(rows, (2.0, 1.0, 3.0, 0.5, 0.3), strict=False):
        row["milliseconds"] = took
    assert peers._fastest(rows, False) == ("ours, linear, b", 1.0) and peers._fastest(rows, True) == ("ours, linear, b", 0.3)
    assert peers._fastest(rows[5:], True) is None


def test_the_operator_is_timed_behind_its_equations(machine):
    machine()
    for gradient in (False, True):
        row = timed_rule(gradient)
        assert row["milliseconds"] > 0 and row["ratio"] == pytest.approx(row["milliseconds"] / 2), row
        assert row["flop"] == (3 if gradient else 1) * 80 * 2 * 6 * 16**2


def scaled(**given):
    return stand_in(**given | {"scale": None})


def late(**given):
    return stand_in(**given | {"g": torch.cat([0 * given["g"][:, :1], given["g"][:, :-1]], dim=1)})


def forgets_a_chunk(**given):
    cut = torch.zeros_like(given["g"])
    cut[:, 64] = -100
    return stand_in(**given | {"g": given["g"] + cut})


def no_gradient_of_decay(**given):
    return stand_in(**given | {"g": given["g"] + (given["g"] - given["g"].detach()) * 0.1})


@pytest.mark.parametrize("wrong", [scaled, late, forgets_a_chunk])
def test_an_operator_that_computes_something_else_is_not_timed(machine, wrong):
    machine(operator=lambda q, k, v, **given: wrong(q=q, k=k, v=v, **given))
    row = timed_rule(gradient=False)
    assert row["failed"].startswith("numbers differ: output: error") and "milliseconds" not in row


def test_wrong_gradients_are_found_by_the_rows_that_have_them(machine):
    machine(operator=lambda q, k, v, **given: no_gradient_of_decay(q=q, k=k, v=v, **given))
    assert "milliseconds" in timed_rule(gradient=False)
    assert timed_rule(gradient=True)["failed"].startswith("numbers differ: gradient of log_decay: error")


def test_where_the_library_is_missing_or_wrong_the_row_says_why(machine):
    machine(packages=())
    for gradient in (False, True):
        assert timed_rule(gradient)["failed"] == (
            "flash-linear-attention cannot run: the package flash-linear-attention is not installed (pip install 'infini-attention[fla]')"
        )
    machine(triton=(3, 6, 0))  # its fault concerns gradients alone
    assert "milliseconds" in timed_rule(gradient=False)
    assert "its gradients are wrong on Hopper with Triton 3.6.0" in timed_rule(gradient=True)["failed"]


@pytest.mark.parametrize("rule", ["delta", "deltanet", "gated"])
def test_our_layer_with_projections_is_right(rule, kernel_device):
    projected.assert_layer(Shape(1, 16, 8, 2, 2, 16, rule), kernel_device, "sdpa", "triton")


@pytest.mark.parametrize(
    ("change", "which"),
    [(lambda x: 1.3 * x, "output"), (lambda x: x + 0.5 * (x - x.detach()), "gradient of hidden states")],
    ids=["output", "gradient"],
)
def test_a_layer_that_is_wrong_is_not_timed(change, which, kernel_device, monkeypatch):
    honest = InfiniAttention._read_by_kernels
    monkeypatch.setattr(InfiniAttention, "_read_by_kernels", lambda *given: change(honest(*given)))
    hidden = torch.randn(1, 16, 32, device=kernel_device).to(torch.bfloat16)
    trial = projected.trial(MemoryCase(SHAPE, kernel_device), hidden, "triton", False)
    row = measure(trial, kernel_device, Ceilings(1, 1), 1, 0.001)
    assert row["failed"].startswith(f"numbers differ: {which}: error")


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("name", ["mean", "tuple_", "remembers", "drops"])
def test_a_causal_peer_is_called_causal(theirs, name, gradient):
    """Also one that returns more than an output, one that goes on where the last call ended, and one with dropout, which is off."""
    row = timed_peer(theirs(name), gradient)
    assert row["causal"] and row["leak"] == row["noise"] == 0 and row["finite"] and row["verified"] is False
    assert row["milliseconds"] > 0 and row["ratio"] == pytest.approx(row["milliseconds"] / 2) and "floor_ratio" not in row


@pytest.mark.parametrize("name", ["split_by_view", "across", "inside"])
def test_a_peer_that_looks_ahead_is_found(theirs, name):
    """By heads split with a view, over a border alone, inside segments alone."""
    row = timed_peer(theirs(name))
    assert row["causal"] is False and row["leak"] > 0.01 and row["milliseconds"] > 0


def test_what_cannot_be_known_is_not_claimed(theirs):
    row = timed_peer(theirs("random_"))
    assert "causal" not in row and row["noise"] > 0.1 and row["finite"]
    assert timed_peer(theirs("overflows"))["finite"] is False


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("too_large", "out of memory"),
        ("asserts", "RuntimeError: AssertionError: one token"),
        ("wants_more", r"TypeError: wants_more\(\) takes 1 positional argument but 4 were given"),
    ],
)
def test_a_peer_that_fails_is_a_row(tmp_path, theirs, name, words, kernel_device):
    """Not a crash, and no number of ours that differs."""
    rows = run(tmp_path, dataclasses.replace(SMALL, backends=("torch",), peer=theirs(name)), kernel_device)
    assert len([row for row in rows if row["what"] == "layer with projections" and "milliseconds" in row]) == 2
    for row in rows[-2:]:
        assert re.fullmatch(words, row["failed"]) and row["verified"] is False
    assert "(not verified)" in render(tmp_path / "record.json")[0].read_text()


def test_a_peer_without_a_gradient_is_timed_forward(theirs):
    forward, backward = (timed_peer(theirs("detached"), gradient) for gradient in (False, True))
    assert forward["causal"] and "milliseconds" in forward
    assert backward["causal"] and backward["failed"].startswith("RuntimeError: element 0 of tensors does not require grad")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nothing", "but the file has no callable nothing: name one of its own .*mean, "),
        ("number", "but the file has no callable number"),
        ("no_module", "which gives tuple; it must give a torch.nn.Module"),
        ("narrow", r"whose module maps \[1, 16, 32\] to \[1, 16, 4\]; it must give a tensor of the same shape, or a tuple"),
        ("dictionary", r"whose module maps \[1, 16, 32\] to dict; it must"),
    ],
)
def test_a_peer_that_does_not_fit_is_refused_before_anything_is_timed(tmp_path, theirs, name, words, monkeypatch):
    monkeypatch.setattr("infini.bench.suite.measure", None)
    with pytest.raises(InputError, match=re.escape(f"peer is {theirs(name)!r}, ") + words):
        run(tmp_path, dataclasses.replace(SMALL, peer=theirs(name)), CPU)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("peer", "words"),
    [
        ("theirs", "peer is 'theirs'; it must be FILE.py:NAME"),
        ("theirs.py", "it must be FILE.py:NAME"),
        ("theirs.txt:build", "it must be FILE.py:NAME"),
        ("nowhere/theirs.py:build", "but there is no file nowhere/theirs.py: give its path from here"),
    ],
)
def test_a_peer_that_is_nowhere_is_refused_by_the_command(peer, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=re.escape(words)):
        command.read(compose("bench", [f"peer={peer}"]))


def test_a_file_is_not_executed_by_settings_and_its_errors_are_told(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "broken.py").write_text("import no_such_package_at_all\n")
    peer = f"{tmp_path / 'broken.py'}:build"
    _, _, settings = command.read(compose("bench", [f"peer={peer}", "parts=[peers]"]))
    assert settings.peer == peer
    with pytest.raises(InputError, match="executing the file ends in ModuleNotFoundError: No module named 'no_such_package_at_all'"):
        foreign.load(peer)
    with pytest.raises(InputError, match="peer is .*; it must be null where parts are without peers"):
        dataclasses.replace(settings, parts=("layer",))


def test_a_peer_finds_what_lies_beside_it(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "package_beside.py").write_text("from torch.nn import Identity as Layer\n")
    (tmp_path / "adapter.py").write_text("from package_beside import Layer\ndef build(*shape):\n    return Layer()\n")
    row = timed_peer(f"{tmp_path / 'adapter.py'}:build")
    assert row["causal"] and math.isfinite(row["milliseconds"])


@pytest.mark.gpu
@pytest.mark.parametrize("gradient", [False, True])
def test_the_library_itself(gradient):
    pytest.importorskip("fla")
    device = torch.device("cuda")
    why = gated_delta.why_not(device, torch.bfloat16, 64, gradient)
    if why:
        pytest.skip(why)
    torch.manual_seed(0)
    bench_gated_delta.assert_gated_delta(bench_gated_delta._inputs(device, bench_gated_delta.COMPARED, 4, 64), gradient)
