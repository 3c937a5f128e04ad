"""The kernels against the loops of infini.reference in fp64, witnessed by infini.memory in the same dtype."""

from dataclasses import dataclass, replace

import pytest
import torch

from infini import memory, reference
from infini.layers.norm import rms_normalize
from infini.testing import assert_witnessed

pytest.importorskip("triton")
from infini.kernels import tiles  # noqa: E402
from infini.kernels.delta import write_delta  # noqa: E402
from infini.kernels.deltanet import write_deltanet  # noqa: E402
from infini.kernels.read import read_and_mix  # noqa: E402
from infini.kernels.read_deltanet import read_deltanet  # noqa: E402
from infini.kernels.tiles import shared_memory, widest_deltanet  # noqa: E402
from infini.kernels.write import write_linear  # noqa: E402

EPS, FLOOR = 1e-6, memory.DENOMINATOR_FLOOR


@dataclass(frozen=True)
class Case:
    """`tokens` new tokens behind `history` old ones, the last `opened` of which are an open segment's."""

    dim: int
    heads: int = 4
    groups: int = 2
    segment: int = 20
    tokens: int = 50
    history: int = 0
    opened: int = 0
    rows: int = 1
    gate: bool = True
    norm: bool = True
    started: bool = True
    summed: int = 1  # keys in the normalizer that is there
    mix_empty: bool = False
    rule: str = "linear"

    @property
    def offset(self):
        return self.history - self.opened

    @property
    def written(self):
        return (self.opened + self.tokens) // self.segment

    @property
    def segments(self):
        return -(-(self.opened + self.tokens) // self.segment)

    def has_memory(self, device):
        if self.started:
            return None
        return (torch.arange(self.segments, device=device) > 0).expand(self.rows, -1)

    def leaves(self, dtype, device):
        """Leaves, in fp64 what they are in `dtype`; what the model keeps in fp32 is left so."""

        def random(*shape, to=dtype, scale=1.0, shift=0.0):
            return (torch.randn(shape, dtype=torch.float64, device=device) * scale + shift).to(to)

        line = self.history + self.tokens
        made = {
            "q": random(self.rows, self.tokens, self.heads, self.dim),
            "local": random(self.rows, self.tokens, self.heads, self.dim),
            "k": random(self.rows, line, self.groups, self.dim),
            "v": random(self.rows, line, self.groups, self.dim),
            "beta": random(self.heads, to=torch.float32),
            "M": random(self.rows, self.groups, self.dim, self.dim, to=torch.float32) * self.started,
        }
        if self.rule == "deltanet":
            made["read_norm"] = random(self.dim, to=torch.float32, scale=0.3, shift=1.0)
        else:
            made["z"] = (random(self.rows, self.groups, self.dim, to=torch.float32).abs() + 1) * self.started * self.summed
        if self.gate:
            made["w"] = random(self.rows, line, self.groups, to=torch.float32).sigmoid()
        if self.norm:
            for which, heads in (("query", self.heads), ("key", self.groups)):
                made[f"{which}_scale"] = random(heads, self.dim, to=torch.float32, scale=0.3, shift=1.5)
                made[f"{which}_bias"] = random(heads, self.dim, to=torch.float32, scale=0.3, shift=-0.5)
        return made


def by_kernels(case, leaves):
    get = leaves.get
    has = case.has_memory(leaves["q"].device)
    if case.rule == "deltanet":
        M, M_after = leaves["M"].unsqueeze(1), leaves["M"]
        if case.written:
            given = (leaves["k"], leaves["v"], get("w"), leaves["M"])
            M, M_after, _ = write_deltanet(*given, case.offset, case.written, case.segments, case.segment)
        given = (leaves["q"], leaves["local"], M, leaves["read_norm"], leaves["beta"], has)
        return {"mixed": read_deltanet(*given, -case.opened, case.segment, case.mix_empty, EPS), "M": M_after}
    M, z, M_after, z_after = leaves["M"].unsqueeze(1), leaves["z"].unsqueeze(1), leaves["M"], leaves["z"]
    if case.written:
        given = (leaves["k"], leaves["v"], get("w"), get("key_scale"), get("key_bias"), leaves["M"], leaves["z"])
        places = (case.offset, case.written, case.segments, case.segment, EPS)
        if case.rule == "linear":
            M, z, M_after, z_after = write_linear(*given, *places)
        else:
            M, z, M_after, z_after, _ = write_delta(*given, has, *places, FLOOR, gamma=case.rule == "gamma_delta")
    mixed = read_and_mix(
        leaves["q"], leaves["local"], M, z, leaves["beta"], get("query_scale"), get("query_bias"), has,
        -case.opened, case.segment, case.mix_empty, EPS, FLOOR,
    )  # fmt: skip
    return {"mixed": mixed, "M": M_after, "z": z_after}


def by_torch(case, leaves):
    full = {name: x.to(torch.promote_types(torch.float32, x.dtype)) for name, x in leaves.items()}

    def sigma(x, which):
        if case.rule == "deltanet":
            return memory.unit(x)
        if case.norm:
            x = rms_normalize(x, EPS) * full[f"{which}_scale"] + full[f"{which}_bias"]
        return memory.feature_map(x, "elu")

    def grid(x, before):
        size = case.segments * case.segment
        x = torch.cat([x.new_zeros(len(x), before, *x.shape[2:]), x], dim=1)
        return torch.cat([x, x.new_zeros(len(x), size - x.shape[1], *x.shape[2:])], dim=1).unflatten(1, (case.segments, -1))

    k, v, w = (None if x is None else grid(x[:, case.offset :], 0) for x in (full["k"], full["v"], full.get("w")))
    q, local = grid(full["q"], case.opened), grid(full["local"], case.opened)
    has = case.has_memory(q.device)
    written = (torch.arange(case.segments, device=q.device) < case.written).expand(case.rows, -1)
    initial = memory.MemoryState(full["M"], full.get("z"))
    before, after = memory.write_segments(case.rule, initial, sigma(k, "key"), w, v, written, has_memory=has)
    read = memory.retrieve(sigma(q, "query"), *before)
    if case.rule == "deltanet":
        read = rms_normalize(read, EPS) * full["read_norm"]
    if case.mix_empty and has is not None:
        read, has = read * has[:, :, None, None, None], None
    mixed = memory.mix(full["beta"], read, local, has).flatten(1, 2)
    mixed = mixed[:, case.opened : case.opened + case.tokens].to(leaves["local"].dtype)
    return {"mixed": mixed, "M": after.matrix} | ({} if after.normalizer is None else {"z": after.normalizer})


def by_reference(case, leaves):
    """fp64 loops over rows, memories, segments and heads."""
    x = {name: leaf.double() for name, leaf in leaves.items()}

    def sigma(y, which, head):
        if case.norm:
            y = y / (y.square().mean(-1, keepdim=True) + EPS).sqrt() * x[f"{which}_scale"][head] + x[f"{which}_bias"][head]
        return reference.elu_plus_one(y)

    rows, states = [], []
    for b in range(case.rows):
        heads = {}
        for g in range(case.groups):
            M, z, empty = x["M"][b, g], None if case.rule == "deltanet" else x["z"][b, g], not case.started
            for s in range(case.segments):
                first = s * case.segment - case.opened
                new = slice(max(0, first), min(case.tokens, first + case.segment))
                for h in range(g * case.heads // case.groups, (g + 1) * case.heads // case.groups):
                    out = x["local"][b, new, h]
                    if not empty and case.rule == "deltanet":
                        read = reference.retrieve_deltanet(x["q"][b, new, h], M, EPS) * x["read_norm"]
                        out = reference.gate(x["beta"][h], read, out)
                    elif not empty:
                        out = reference.gate(x["beta"][h], reference.retrieve(sigma(x["q"][b, new, h], "query", h), M, z), out)
                    elif case.mix_empty:
                        out = reference.gate(x["beta"][h], torch.zeros_like(out), out)
                    heads.setdefault(h, []).append(out)
                if s < case.written:
                    old = slice(first + case.history, first + case.history + case.segment)
                    w = x["w"][b, old, g] if case.gate else torch.ones(case.segment, dtype=torch.float64)
                    keys, values = sigma(x["k"][b, old, g], "key", g), x["v"][b, old, g]
                    if case.rule == "deltanet":
                        M = reference.update_deltanet(x["k"][b, old, g], w, values, M)
                    elif case.rule == "linear":
                        M, z = reference.update_linear(keys, w, values, M, z)
                    else:
                        update = {"delta": reference.update_delta, "gamma_delta": reference.update_gamma_delta}[case.rule]
                        M, z = update(keys, w, values, M, z, empty)
                    empty = False
            states.append((M, z))
        rows.append(torch.stack([torch.cat(heads[h]) for h in range(case.heads)], dim=1))
    found = dict(zip("Mz", zip(*states, strict=True), strict=True))
    if case.rule == "deltanet":
        del found["z"]
    return {"mixed": torch.stack(rows)} | {name: torch.stack(part).unflatten(0, (case.rows, case.groups)) for name, part in found.items()}


def with_gradients(way, case, leaves):
    """Results, and the gradient of a random weighing of them by every leaf."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in leaves.items()}
    found = way(case, leaves)
    torch.manual_seed(1)
    total = 0.0
    for x in found.values():
        weights = torch.randn(x.shape, dtype=torch.float64)
        total = total + (x.double() * weights.to(x.device)).sum()
    gradients = torch.autograd.grad(total, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return {name: x.detach() for name, x in found.items()} | {
        f"gradient of {name}": x for name, x in zip(leaves, gradients, strict=True)
    }


CASES = {
    "paper": Case(16, gate=False, norm=False, started=False),
    "long": Case(32, started=False, rows=2, heads=2, groups=1),
    "open-both-ends": Case(16, history=30, opened=13, tokens=49),
    "inside-one-segment": Case(16, history=19, opened=9, tokens=5),
    "fills-exactly": Case(16, history=19, opened=9, tokens=31, norm=False),
    "uneven-head": Case(24, heads=3, groups=3, gate=False),
    "wide-blocks": Case(160, heads=1, groups=1, tokens=20, segment=16),
    "mix-empty": Case(16, started=False, mix_empty=True),
    "many-parts": Case(16, heads=1, groups=1, segment=1026, tokens=1050, history=1030, opened=50),
}
CASES |= {f"delta-{name}": replace(case, rule="delta") for name, case in CASES.items() if name != "wide-blocks"}
CASES |= {
    f"deltanet-{name}": replace(CASES[name], rule="deltanet", norm=False) for name in ("paper", "long", "open-both-ends", "uneven-head")
}
CASES["deltanet-inside-one-segment"] = replace(CASES["inside-one-segment"], rule="deltanet", norm=False)
CASES["deltanet-mix-empty"] = replace(CASES["mix-empty"], rule="deltanet", norm=False)
CASES["deltanet-chunks"] = Case(16, heads=2, groups=2, segment=75, tokens=160, history=20, opened=9, norm=False, rule="deltanet")
CASES |= {f"gamma-{name}": replace(CASES[name], rule="gamma_delta") for name in ("paper", "long", "open-both-ends", "uneven-head", "many-parts")}
CASES["delta-widest"] = Case(128, heads=1, groups=1, tokens=40, segment=16, rule="delta")


# fp16 takes the way of fp32, bf16 its own.
RUNS = [(name, "float32") for name in CASES]
RUNS += [("long", "bfloat16"), ("open-both-ends", "bfloat16"), ("wide-blocks", "bfloat16"), ("open-both-ends", "float16")]
RUNS += [(f"delta-{name}", "bfloat16") for name in ("long", "open-both-ends", "widest")] + [("delta-open-both-ends", "float16")]
RUNS += [("gamma-long", "bfloat16"), ("gamma-open-both-ends", "float16")]
RUNS += [("deltanet-chunks", "bfloat16"), ("deltanet-long", "bfloat16"), ("deltanet-open-both-ends", "float16")]


@pytest.mark.parametrize(("name", "dtype"), RUNS)
def test_equals_the_reference(name, dtype, kernel_device):
    case, dtype = CASES[name], getattr(torch, dtype)
    leaves = case.leaves(dtype, kernel_device)
    fast, plain = (with_gradients(way, case, leaves) for way in (by_kernels, by_torch))
    oracle = with_gradients(by_reference, case, {key: x.double().cpu() for key, x in leaves.items()})
    for key, true in oracle.items():
        assert fast[key].dtype == plain[key].dtype, key
        assert_witnessed(key, fast[key], plain[key], true, dtype)


@pytest.mark.parametrize("name", ["long", "open-both-ends", "mix-empty", "delta-long"])
def test_other_ways_of_a_kernel_equal_the_reference(name, kernel_device, monkeypatch):
    """Turned products, loads ahead, many parts, and the memory's gradient summed by the read's backward kernel itself."""
    wide = CASES[name].dim
    monkeypatch.setattr(tiles, "HOPPER_SHARED", 0)
    for kernel in ("read", "read_backward", "write_backward", "gram_backward"):
        way = (wide, 16, 4, 1, 16, 0, True, kernel == "read_backward", True)
        monkeypatch.setitem(tiles.TUNED, (kernel, wide, True, "short"), way)
    test_equals_the_reference(name, "float32", kernel_device)


def test_a_needle_in_a_heavy_memory_is_read_in_bf16(kernel_device):
    """Two filler rows of a memory that cancel, and beside them one pair: rounded to bf16 the memory would not hold it."""
    q = torch.zeros(1, 16, 1, 16, dtype=torch.bfloat16, device=kernel_device)  # all features 1
    M = torch.zeros(1, 1, 1, 16, 16, device=kernel_device)
    needle = torch.linspace(-1, 1, 16, device=kernel_device)
    M[..., 0, :], M[..., 1, :] = 1000 + needle, -1000
    z = torch.full((1, 1, 1, 16), 1 / 16, device=kernel_device)
    beta = torch.full((1,), 100.0, device=kernel_device)
    mixed = read_and_mix(q, q, M, z, beta, None, None, None, 0, 16, False, EPS, FLOOR)
    torch.testing.assert_close(mixed[0, 3, 0].float(), needle, atol=0.016, rtol=0)  # 1000 in 16 bits


def test_an_empty_memory_lets_nothing_pass(kernel_device):
    """What is left in the slots of an empty row need not be finite."""
    q = torch.randn(1, 16, 1, 16, device=kernel_device, requires_grad=True)
    M = torch.full((1, 1, 1, 16, 16), float("inf"), device=kernel_device)
    z = torch.full((1, 1, 1, 16), float("nan"), device=kernel_device)
    has = torch.zeros(1, 1, dtype=torch.bool, device=kernel_device)
    beta = torch.zeros(1, device=kernel_device, requires_grad=True)
    mixed = read_and_mix(q, q, M, z, beta, None, None, has, 0, 16, False, EPS, FLOOR)
    assert torch.equal(mixed, q)
    dq, dbeta = torch.autograd.grad(mixed.sum(), [q, beta])
    assert torch.equal(dq, torch.ones_like(q)) and dbeta.item() == 0


def test_strided_inputs_are_read_in_place(kernel_device):
    """Slices of one projection of queries, keys and values, as a fused layer would hand them over."""
    case = Case(16, heads=2, groups=2)
    leaves = case.leaves(torch.float32, kernel_device)
    fused = torch.cat([leaves["q"], leaves["k"], leaves["v"]], dim=-1)
    parts = dict(zip("qkv", fused.split(16, dim=-1), strict=True))
    assert not parts["q"].is_contiguous()
    expected, found = by_kernels(case, leaves), by_kernels(case, leaves | parts)
    for key, x in expected.items():
        assert torch.equal(x, found[key])


@pytest.mark.parametrize("rule", ["linear", "delta", "gamma_delta", "deltanet"])
def test_a_backward_pass_under_autocast_is_no_other(rule, kernel_device):
    case = replace(CASES["fills-exactly"], rule=rule, norm=False)
    leaves = {name: x.requires_grad_() for name, x in case.leaves(torch.float32, kernel_device).items()}
    found = []
    for enabled in (False, True):
        mixed = by_kernels(case, leaves)["mixed"]
        with torch.autocast(kernel_device.type, dtype=torch.bfloat16, enabled=enabled):
            found.append(torch.autograd.grad(mixed.sum(), [leaves["k"], leaves["v"], leaves["M"]]))
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def arguments(device):
    case = Case(16, heads=2, groups=1, segment=8, tokens=20)
    x = {name: leaf.requires_grad_() for name, leaf in case.leaves(torch.float32, device).items()}
    write = (x["k"], x["v"], x["w"], x["key_scale"], x["key_bias"], x["M"], x["z"], 0, 2, 3, 8, EPS)
    memories = [part.detach().requires_grad_() for part in write_linear(*write)[:2]]
    has = torch.tensor([[False, True, True]], device=device)
    read = (x["q"], x["local"], *memories, x["beta"], x["query_scale"], x["query_bias"], has, 0, 8, False, EPS, FLOOR)
    delta = (*write[:7], has, *write[7:], FLOOR)
    deltanet = (*write[:3], x["M"], *write[7:-1])
    M = write_deltanet(*deltanet)[0].detach().requires_grad_()
    looks = (x["q"], x["local"], M, x["query_scale"][0].detach().requires_grad_(), x["beta"], has, 0, 8, False, EPS)
    found = {"write": (write_linear, write), "delta": (write_delta, delta), "read": (read_and_mix, read)}
    found["gamma_delta"] = write_delta, (*delta, None, None, True)
    return found | {"deltanet": (write_deltanet, deltanet), "read_deltanet": (read_deltanet, looks)}


@pytest.mark.parametrize("which", ["write", "delta", "gamma_delta", "read", "deltanet", "read_deltanet"])
@pytest.mark.filterwarnings("default")  # torch's compiler warns about itself
def test_operators_are_registered_in_full(which, kernel_device):
    """Schema, fake tensors, autograd, and both traced with symbols for shapes."""
    operator, given = arguments(kernel_device)[which]
    torch.library.opcheck(operator, given)


GPU_CASES = {
    "shipped": Case(128, heads=4, groups=4, segment=256, tokens=4100, history=255, opened=100, rows=2),
    "paper": Case(128, heads=8, groups=8, segment=2048, tokens=16384, gate=False, norm=False, started=False),
    "narrow": Case(64, heads=8, groups=2, segment=128, tokens=8192, rows=2, started=False),
    "uneven": Case(96, heads=6, groups=3, segment=500, tokens=5001),
    "wide": Case(256, heads=4, groups=1, segment=512, tokens=4096, started=False),
    "long-segment": Case(128, heads=2, groups=1, segment=8192, tokens=20000, history=8191, opened=5000),
}
GPU_CASES |= {f"deltanet-{name}": replace(case, rule="deltanet", norm=False) for name, case in GPU_CASES.items() if name != "wide"}
GPU_CASES |= {f"gamma-{name}": replace(GPU_CASES[name], rule="gamma_delta") for name in ("shipped", "paper", "uneven")}
# Behind a normalizer of fewer keys than a segment has, the memory of gamma_delta grows from segment to segment; two of them show its shares of keys.
GPU_CASES |= {f"gamma-{name}": replace(GPU_CASES[f"gamma-{name}"], summed=GPU_CASES[name].segment) for name in ("shipped", "uneven")}
GPU_CASES["gamma-early"] = Case(128, heads=4, groups=2, segment=256, tokens=600, rows=2, rule="gamma_delta")
GPU_CASES |= {f"delta-{name}": replace(case, rule="delta") for name, case in GPU_CASES.items() if name != "wide" and case.rule == "linear"}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", GPU_CASES)
def test_full_sizes_equal_the_plain_code(name, dtype):
    """The plain code in fp64 is the oracle here: loops over tokens would take hours."""
    case = GPU_CASES[name]
    if case.rule == "deltanet" and case.dim > widest_deltanet(dtype != torch.bfloat16, shared_memory(torch.device("cuda"))):
        pytest.skip("heads are too wide")
    leaves = case.leaves(dtype, torch.device("cuda"))
    fast, plain = (with_gradients(way, case, leaves) for way in (by_kernels, by_torch))
    oracle = with_gradients(by_torch, case, {key: x.double() for key, x in leaves.items()})
    for key, true in oracle.items():
        assert_witnessed(key, fast[key], plain[key], true, dtype)
