"""The kernels where rows differ: documents that begin inside a row, padding, open segments of different length.

Against the loops of infini.reference in fp64, one row and one document after the other, witnessed by the plain code.
"""

from dataclasses import dataclass, replace

import pytest
import torch

from infini import InfiniConfig, reference
from infini.attention import InfiniAttention
from infini.memory import MemoryState
from infini.segments import SegmentPlan
from infini.testing import assert_witnessed

pytest.importorskip("triton")
from infini.kernels.choice import _machine_lacks  # noqa: E402
from infini.kernels.delta import write_delta  # noqa: E402
from infini.kernels.deltanet import write_deltanet  # noqa: E402
from infini.kernels.read import read_and_mix  # noqa: E402
from infini.kernels.read_deltanet import read_deltanet  # noqa: E402
from infini.kernels.tiles import shared_memory, widest_deltanet  # noqa: E402
from infini.kernels.write import write_linear  # noqa: E402

EPS = 1e-6


@dataclass(frozen=True)
class Layout:
    """`tokens` places in each row, of which the first `lengths` hold tokens; `begins` are the (row, token) at which documents begin.

    `opened`, `started`: of each row before the call, tokens of the open segment and whether anything was written.
    """

    tokens: int
    begins: tuple[tuple[int, int], ...] = ()
    lengths: tuple[int, ...] | None = None
    opened: tuple[int, ...] = (0, 0)
    started: tuple[bool, ...] = (False, False)
    segment: int = 20
    history: int = 0
    heads: int = 2
    groups: int = 1
    dim: int = 16
    long: bool = True
    mix_empty: bool = False
    rule: str = "linear"

    @property
    def rows(self):
        return len(self.opened)

    @property
    def real(self):
        lengths = torch.tensor(self.lengths or [self.tokens] * self.rows)
        return torch.arange(self.tokens) < lengths[:, None]

    @property
    def reset(self):
        reset = torch.zeros(self.rows, self.tokens, dtype=torch.bool)
        for place in self.begins:
            reset[place] = True
        return reset

    def plan(self, device):
        opened = torch.tensor(self.opened)
        return SegmentPlan(
            tokens=self.tokens,
            segment_length=self.segment,
            span=self.history + 1 if self.history else self.segment,
            sliding=bool(self.history),
            open_length=opened,
            tokens_seen=opened + self.segment * torch.tensor(self.started),
            empty=~torch.tensor(self.started),
            history=self.history,
            lengths=self.real.sum(dim=1) if self.lengths else None,
            reset=self.reset if self.begins else None,
            device=device,
        )

    def layer(self, device):
        torch.manual_seed(2)
        config = InfiniConfig(
            hidden_size=self.heads * self.dim, num_attention_heads=self.heads, num_key_value_heads=self.groups, head_dim=self.dim,
            segment_length=self.segment, update_rule=self.rule, feature_map="none" if self.rule == "deltanet" else "elu",
            write_gate=self.long, qk_norm=self.long and self.rule != "deltanet", gate_when_empty=self.mix_empty, rms_norm_eps=EPS,
        )  # fmt: skip
        layer = InfiniAttention(config, has_memory=True)
        with torch.no_grad():
            for name, parameter in self.parameters(layer).items():
                parameter.copy_(torch.randn(parameter.shape) * 0.3 + {"b": 0.0, "q": 1.0, "k": 1.0, "r": 1.0}[name[0]])
        return layer.to(device)

    @staticmethod
    def parameters(layer):
        """Those of the memory itself."""
        return {name: p for name, p in layer.named_parameters() if "proj" not in name and "write_gate" not in name}

    def inputs(self, dtype, device):
        torch.manual_seed(4)
        line, started = self.history + self.tokens, torch.tensor(self.started)

        def random(tokens, *heads_and_dim):
            return torch.randn(self.rows, tokens, *heads_and_dim)

        made = {"q": random(self.tokens, self.heads, self.dim), "local_output": random(self.tokens, self.heads, self.dim)}
        made |= {"k": random(line, self.groups, self.dim), "v": random(line, self.groups, self.dim)}
        made = {name: x.to(dtype) for name, x in made.items()}
        if self.long:
            made["strength"] = random(line, self.groups).sigmoid()
        made["M"] = torch.randn(self.rows, self.groups, self.dim, self.dim) * started[:, None, None, None]
        if self.rule != "deltanet":
            made["z"] = (torch.randn(self.rows, self.groups, self.dim).abs() + 1) * started[:, None, None]
        return {name: x.to(device) for name, x in made.items()}


def by_layer(backend):
    def way(layout, layer, x):
        _machine_lacks(torch.device("cpu") if not x["q"].is_cuda else x["q"].device)  # registers the operators
        given = {name: x.get(name) for name in ("q", "k", "v", "strength", "local_output")}
        initial = MemoryState(x["M"], x.get("z"))
        mixed, after = layer.remember(**given, initial=initial, plan=layout.plan(x["q"].device), backend=backend)
        return mixed, after.matrix, after.normalizer

    return way


def by_reference(layout, layer, x):
    """A segment is read for and written as soon as it is whole, or left as it is where its document ends."""
    p, groups, shared_by = layout.parameters(layer), layout.groups, layout.heads // layout.groups
    mixed, states = torch.zeros_like(x["q"]), []

    def sigma(y, which, head):
        if layout.rule != "deltanet" and layout.long:
            y = y / (y.square().mean(-1, keepdim=True) + EPS).sqrt() * p[f"{which}_scale"][head] + p[f"{which}_bias"][head]
        return reference.elu_plus_one(y)

    def read(b, g, new, M, z, empty):
        for h in range(g * shared_by, (g + 1) * shared_by):
            out = x["local_output"][b, new, h]
            if not empty or layout.mix_empty:
                found = torch.zeros_like(out)
                if not empty and layout.rule == "deltanet":
                    found = reference.retrieve_deltanet(x["q"][b, new, h], M, EPS) * p["read_norm.weight"]
                elif not empty:
                    found = reference.retrieve(sigma(x["q"][b, new, h], "query", h), M, z)
                out = reference.gate(p["beta"][h], found, out)
            mixed[b, new, h] = out

    def written(b, g, line, M, z, empty):
        w = x["strength"][b, line, g] if layout.long else torch.ones(layout.segment, dtype=torch.float64)
        keys, values = x["k"][b, line, g], x["v"][b, line, g]
        if layout.rule == "deltanet":
            return reference.update_deltanet(keys, w, values, M), z
        if layout.rule == "linear":
            return reference.update_linear(sigma(keys, "key", g), w, values, M, z)
        update = {"delta": reference.update_delta, "gamma_delta": reference.update_gamma_delta}[layout.rule]
        return update(sigma(keys, "key", g), w, values, M, z, empty)

    for b in range(layout.rows):
        length = int(layout.real[b].sum())
        for g in range(groups):
            M, z = x["M"][b, g], x["z"][b, g] if "z" in x else None
            empty, first, begun = not layout.started[b], -layout.opened[b], 0
            for t in range(length + 1):
                ends = t == length or bool(layout.reset[b, t])
                whole = t - first == layout.segment
                if not (ends or whole):
                    continue
                if t > begun:
                    read(b, g, list(range(begun, t)), M, z, empty)
                if whole:
                    line = slice(layout.history + first, layout.history + t)
                    M, z, empty = *written(b, g, line, M, z, empty), False
                if ends and t < length:
                    M, z, empty = torch.zeros_like(M), None if z is None else torch.zeros_like(z), True
                first = begun = t
            states.append((M, z))
    matrices, normalizers = zip(*states, strict=True)
    shape = (layout.rows, groups)
    return mixed, torch.stack(matrices).unflatten(0, shape), torch.stack(normalizers).unflatten(0, shape) if "z" in x else None


def with_gradients(way, layout, layer, inputs):
    """Results, and the gradient of a random weighing of them by every input and parameter; padding has no weight."""
    leaves = {name: y.detach().clone().requires_grad_() for name, y in inputs.items()}
    parameters = layout.parameters(layer)
    found = dict(zip(("mixed", "M", "z"), way(layout, layer, leaves), strict=True))
    found = {name: y for name, y in found.items() if y is not None}
    real = layout.real.to(found["mixed"].device)
    torch.manual_seed(1)
    total = 0.0
    for name, y in found.items():
        weights = torch.randn(y.shape, dtype=torch.float64).to(y.device)
        if name == "mixed":
            assert y.isfinite().all()
            weights = weights * real[:, :, None, None]
        total = total + (y.double() * weights).sum()
    found["mixed"] = torch.where(real[:, :, None, None], found["mixed"], 0)
    gradients = torch.autograd.grad(total, [*leaves.values(), *parameters.values()], allow_unused=True, materialize_grads=True)
    return {name: y.detach() for name, y in found.items()} | {
        f"gradient of {name}": y for name, y in zip([*leaves, *parameters], gradients, strict=True)
    }


def compare(layout, dtype, device, oracle_way=by_reference):
    layer, inputs = layout.layer(device), layout.inputs(dtype, device)
    assert not layout.plan(device).uniform
    fast, plain = (with_gradients(by_layer(backend), layout, layer, inputs) for backend in ("triton", "torch"))
    where = torch.device("cpu") if oracle_way is by_reference else device
    oracle = with_gradients(oracle_way, layout, layer.double().to(where), {name: y.double().to(where) for name, y in inputs.items()})
    for name, true in oracle.items():
        assert fast[name].dtype == plain[name].dtype, name
        assert_witnessed(name, fast[name], plain[name], true, dtype)


def drawn(seed, **changes):
    """A layout of random documents, padding and open segments."""
    make = torch.Generator().manual_seed(seed)

    def draw(low, high):
        return int(torch.randint(low, high, (1,), generator=make))

    rows, tokens, segment = 2, draw(20, 50), draw(5, 17)
    lengths = tuple(draw(0, tokens + 1) if draw(0, 3) else tokens for _ in range(rows))
    begins = tuple((row, t) for row in range(rows) for t in range(lengths[row]) if draw(0, 18) == 0)
    opened, started = tuple(draw(0, segment) for _ in range(rows)), tuple(bool(draw(0, 2)) for _ in range(rows))
    history = segment + draw(0, 9)
    return Layout(tokens, begins, lengths, opened, started, segment, history, **changes)


BASIC = {
    "documents": Layout(30, begins=((0, 15), (0, 16), (1, 0), (1, 22)), segment=12),
    "padding": Layout(31, lengths=(31, 23), heads=1, dim=24, segment=10),
    "open": Layout(
        39, ((0, 0), (2, 11), (2, 27)), (39, 0, 36, 25), (13, 9, 9, 0), (True, False, True, True), segment=16, history=30
    ),
}
LAYOUTS = {f"{rule}-{name}": replace(layout, rule=rule) for name, layout in BASIC.items() for rule in ("linear", "delta", "gamma_delta", "deltanet")}
del LAYOUTS["delta-padding"], LAYOUTS["gamma_delta-padding"], LAYOUTS["deltanet-padding"]  # drawn ones are padded too
LAYOUTS |= {f"{rule}-drawn-{seed}": drawn(seed, rule=rule) for seed, rule in enumerate(("linear", "delta", "deltanet") * 2)}
LAYOUTS |= {
    "paper": replace(BASIC["open"], long=False),
    "mix-empty": replace(BASIC["open"], mix_empty=True),
    "delta-paper-mix-empty": replace(BASIC["open"], long=False, mix_empty=True, rule="delta"),
    "nothing-written": Layout(24, begins=((0, 12), (1, 19)), opened=(5, 0), started=(True, False), history=20),
    "one-open-segment": Layout(3, opened=(3, 9), started=(True, False), history=20),
    "wide-blocks": Layout(20, ((0, 17),), opened=(0,), started=(False,), heads=1, dim=160, segment=16),
    "many-parts": Layout(1060, ((0, 1041),), heads=1, opened=(50,), started=(True,), segment=1026, history=1030),
    "deltanet-chunks": Layout(100, ((1, 2),), (97, 100), (9, 0), (True, False), 75, 80, rule="deltanet"),
}
LAYOUTS["delta-many-parts"] = replace(LAYOUTS["many-parts"], rule="delta")
RUNS = [(name, "float32") for name in LAYOUTS]
RUNS += [(f"{rule}-open", "bfloat16") for rule in ("linear", "delta", "gamma_delta", "deltanet")] + [("linear-open", "float16")]


@pytest.mark.parametrize(("name", "dtype"), RUNS)
def test_equals_the_reference(name, dtype, kernel_device):
    compare(LAYOUTS[name], getattr(torch, dtype), kernel_device)


@pytest.mark.parametrize("rule", ["linear", "delta"])
def test_a_document_in_a_row_is_the_document_alone(rule, kernel_device):
    """By the reference's own walk over a whole text, local attention and all."""
    lengths, n = (15, 1, 24, 8), 6
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    layout = Layout(sum(lengths), tuple((0, t) for t in starts), opened=(0,), started=(False,), segment=n, long=False, rule=rule)
    layer, x = layout.layer(kernel_device), layout.inputs(torch.float32, kernel_device)
    beta = layer.beta.detach().double().cpu()
    q, k, v = (x[name].double().cpu() for name in "qkv")
    expected, state, local = [], None, torch.zeros_like(q)
    for start, length in zip(starts, lengths, strict=True):
        here = slice(start, start + length)
        out, state = reference.infini_attention(q[:, here], k[:, here], v[:, here], beta, n, rule)
        expected.append(out)
        for first in range(start, start + length, n):
            now = slice(first, min(first + n, start + length))
            for h in range(layout.heads):
                local[0, now, h] = reference.local_attention(q[0, now, h], k[0, now, 0], v[0, now, 0])
    x["local_output"] = local.float().to(kernel_device)
    fast, plain = (by_layer(backend)(layout, layer, x) for backend in ("triton", "torch"))
    for name, mine, other, true in zip(("mixed", "M", "z"), fast, plain, (torch.cat(expected, dim=1), *state), strict=True):
        assert_witnessed(name, mine, other, true)


@pytest.mark.parametrize("rule", ["linear", "delta", "gamma_delta", "deltanet"])
def test_what_a_new_document_drops_need_not_be_finite(rule, kernel_device):
    """Neither in the memory nor in the gradients that go back to it."""
    layout = Layout(30, ((0, 0), (1, 0)), opened=(3, 0), started=(True, True), segment=10, history=12, rule=rule)
    layer, x = layout.layer(kernel_device), layout.inputs(torch.float32, kernel_device)
    x["M"] = torch.full_like(x["M"], float("inf")).requires_grad_()
    if "z" in x:
        x["z"] = torch.full_like(x["z"], float("nan"))
    mixed, M, _ = by_layer("triton")(layout, layer, x)
    assert mixed.isfinite().all() and M.isfinite().all()
    assert torch.equal(torch.autograd.grad(mixed.sum() + M.sum(), x["M"])[0], torch.zeros_like(M))


def test_padding_is_zero_whatever_stands_in_it(kernel_device):
    """Numbers that nobody reads go into sums over all tokens with weight 0, where only finite ones are harmless."""
    layout = BASIC["padding"]
    layer, x = layout.layer(kernel_device), layout.inputs(torch.float32, kernel_device)
    for name in ("q", "k", "v", "local_output"):
        x[name] = x[name].masked_fill(~layout.real.to(kernel_device)[:, :, None, None], float("nan")).requires_grad_()
    mixed = by_layer("triton")(layout, layer, x)[0]
    assert torch.equal(mixed[1, 23:], torch.zeros_like(mixed[1, 23:])) and mixed.isfinite().all()
    for name, gradient in zip("qkv", torch.autograd.grad(mixed.sum(), [x[name] for name in "qkv"]), strict=True):
        assert gradient.isfinite().all(), name


def arguments(device):
    found = {}
    for rule in ("linear", "delta", "deltanet"):
        layout = Layout(20, ((0, 9), (1, 2)), (20, 15), (3, 0), (True, False), 8, 9, 2, 1, rule=rule)
        plan, x = layout.plan(device), {name: y.requires_grad_() for name, y in layout.inputs(torch.float32, device).items()}
        scale, bias, beta = (torch.randn(size, device=device, requires_grad=True) for size in ((1, 16), (1, 16), (2,)))
        rows, places, kvw = (plan.writes, plan.fresh), (0, plan.segments, plan.segments, 8), (x["k"], x["v"], x["strength"])
        memories = torch.randn(2, plan.segments, 1, 16, 16, device=device, requires_grad=True)
        if rule == "deltanet":
            found["deltanet"] = write_deltanet, (*kvw, x["M"], *places, *rows)
            looks = (x["q"], x["local_output"], memories, scale[0].detach().requires_grad_(), beta, plan.has_memory, 0, 8, False, EPS)
            found["read_deltanet"] = read_deltanet, (*looks, plan.reads, True)
            continue
        write = (*kvw, scale, bias, x["M"], x["z"])
        if rule == "linear":
            found["linear"] = write_linear, (*write, *places, EPS, *rows)
            z = (torch.rand(2, plan.segments, 1, 16, device=device) + 1).requires_grad_()
            both = (scale.detach().expand(2, -1).contiguous().requires_grad_() for _ in range(2))
            read = (x["q"], x["local_output"], memories, z, beta, *both, plan.has_memory, 0, 8, False, EPS, 1e-12)
            found["read"] = read_and_mix, (*read, plan.reads, True)
        else:
            found["delta"] = write_delta, (*write, plan.has_memory, *places, EPS, 1e-12, *rows)
    return found


@pytest.mark.parametrize("which", ["linear", "delta", "read", "deltanet", "read_deltanet"])
@pytest.mark.filterwarnings("default")  # torch's compiler warns about itself
def test_operators_are_registered_in_full(which, kernel_device):
    """Schema, fake tensors, autograd, and both traced with symbols for shapes."""
    torch.library.opcheck(*arguments(kernel_device)[which])


def packed(tokens, mean, rows, seed):
    """Documents of random lengths, one behind the other in every row."""
    make = torch.Generator().manual_seed(seed)
    return tuple((row, int(t)) for row in range(rows) for t in torch.nonzero(torch.rand(tokens, generator=make) < 1 / mean))


FULL = {
    "shipped": Layout(
        4100, packed(4100, 700, 2, 0), (4100, 3900), (100, 0), (True, False), 256, 255, 4, 4, 128
    ),
    "paper": Layout(16384, packed(16384, 5000, 1, 1), None, (0,), (False,), 2048, 0, 8, 8, 128, long=False),
    "narrow": Layout(8192, packed(8192, 300, 2, 2), None, (0, 0), (False, False), 128, 0, 8, 2, 64),
    "padding": Layout(5001, (), (5001, 1, 4999, 2500), (3, 0, 499, 1), (True, False, True, True), 500, 511, 6, 3, 96),
    "wide": Layout(4096, packed(4096, 900, 2, 3), None, (0, 0), (False, False), 512, 0, 4, 1, 256),
    "long-segment": Layout(20000, packed(20000, 15000, 2, 4), None, (5000, 0), (True, True), 8192, 8191, 2, 1, 128),
}
LINEAR = {name: layout for name, layout in FULL.items() if name != "wide"}
FULL |= {f"{rule}-{name}": replace(layout, rule=rule) for name, layout in LINEAR.items() for rule in ("delta", "deltanet")}
FULL["gamma-shipped"] = replace(FULL["shipped"], rule="gamma_delta")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", FULL)
def test_full_sizes_equal_the_plain_code(name, dtype):
    """The plain code in fp64 is the oracle here: loops over tokens would take hours."""
    layout, device = FULL[name], torch.device("cuda")
    if layout.rule == "deltanet" and layout.dim > widest_deltanet(dtype != torch.bfloat16, shared_memory(device)):
        pytest.skip("heads are too wide")
    compare(layout, dtype, device, by_layer("torch"))
