"""Every rule of infini.memory against the loops of infini.reference: reads, state, and gradients of everything."""

import itertools

import pytest
import torch

from infini import memory, reference
from infini.testing import assert_equal_to_oracle, assert_witnessed

RULES = ("linear", "delta", "gamma_delta", "deltanet")
MAPS = {"elu": reference.elu_plus_one, "dpfp": reference.dpfp, "none": lambda x: x}
# name: segments, tokens of a segment, query heads, key/value heads, d_k, d_v
SIZES = {
    "one-token": (5, 1, 2, 2, 3, 3),
    "awkward": (4, 7, 4, 2, 5, 3),
    "one-segment": (1, 9, 3, 1, 2, 6),
    "several-chunks": (2, 130, 2, 1, 3, 2),
}


def inputs(size, write_gate, dtype=torch.float64):
    """Leaves q, k, v, w, beta and a local output."""
    s, n, heads, groups, d_k, d_v = SIZES[size]
    leaves = {
        "q": torch.randn(2, s, n, heads, d_k, dtype=dtype),
        "k": torch.randn(2, s, n, groups, d_k, dtype=dtype),
        "v": torch.randn(2, s, n, groups, d_v, dtype=dtype),
        "local": torch.randn(2, s, n, heads, d_v, dtype=dtype),
        "beta": torch.randn(heads, dtype=dtype),
    }
    if write_gate:
        leaves["w"] = torch.rand(2, s, n, groups, dtype=dtype)
    for name in "qk":
        # Two positive entries: so each query shares a DPFP feature with each key, and no reference reads 0/0.
        leaves[name][..., :2].abs_()
    return {name: x.requires_grad_() for name, x in leaves.items()}


def start(feature_map, rule, size, dtype):
    """A memory that has been written: fewer pairs than features, as after a short document."""
    _, _, _, groups, d_k, d_v = SIZES[size]
    features = MAPS[feature_map](torch.randn(2, 3, groups, d_k, dtype=dtype))
    values = torch.randn(2, 3, groups, d_v, dtype=dtype)
    M = torch.einsum("btgk,btgv->bgkv", features, values)
    return {"M": M.requires_grad_(), "z": (features.sum(1) + (0.5 if rule != "deltanet" else 0)).requires_grad_()}


def by_library(rule, feature_map, leaves, initial, has_memory, **masks):
    q, k, v = leaves["q"], leaves["k"], leaves["v"]
    if rule == "deltanet":
        g, f = memory.unit(q), memory.unit(k)
    else:
        g, f = memory.feature_map(q, feature_map), memory.feature_map(k, feature_map)
    first = memory.MemoryState(initial["M"], None if rule == "deltanet" else initial["z"])
    before, after = memory.write_segments(rule, first, f, leaves.get("w"), v, has_memory=has_memory, **masks)
    read = memory.retrieve(g, *before)
    if rule == "deltanet":
        read = torch.nn.functional.rms_norm(read, read.shape[-1:], None, 1e-6)
    output = memory.mix(leaves["beta"], read, leaves["local"], has_memory)
    return {"output": output, "M": after.matrix} | ({} if rule == "deltanet" else {"z": after.normalizer})


def by_reference(rule, feature_map, leaves, initial, empty, written=None, fresh=None):
    q, k, v, local, beta = (leaves[name] for name in ("q", "k", "v", "local", "beta"))
    rows, segments, n, heads, _ = q.shape
    groups, sigma = k.shape[3], MAPS[feature_map]
    outputs, matrices, normalizers = {}, [], []
    for b, g in itertools.product(range(rows), range(groups)):
        M, z, bare = initial["M"][b, g], initial["z"][b, g], empty
        for s in range(segments):
            if fresh is not None and fresh[b, s]:
                M, z, bare = torch.zeros_like(M), torch.zeros_like(z), True
            for h in range(g * heads // groups, (g + 1) * heads // groups):
                out = local[b, s, :, h]
                if not bare:
                    if rule == "deltanet":
                        read = reference.retrieve_deltanet(q[b, s, :, h], M)
                    else:
                        read = reference.retrieve(sigma(q[b, s, :, h]), M, z)
                    out = reference.gate(beta[h], read, out)
                outputs[b, s, h] = out
            if written is not None and not written[b, s]:
                continue
            w = leaves["w"][b, s, :, g] if "w" in leaves else torch.ones(n, dtype=q.dtype)
            f = sigma(k[b, s, :, g])
            if rule == "linear":
                M, z = reference.update_linear(f, w, v[b, s, :, g], M, z)
            elif rule == "delta":
                M, z = reference.update_delta(f, w, v[b, s, :, g], M, z, bare)
            elif rule == "gamma_delta":
                M, z = reference.update_gamma_delta(f, w, v[b, s, :, g], M, z, bare)
            else:
                M = reference.update_deltanet(k[b, s, :, g], w, v[b, s, :, g], M)
            bare = False
        matrices.append(M)
        normalizers.append(z)
    output = torch.stack(
        [
            torch.stack([torch.stack([outputs[b, s, h] for h in range(heads)], dim=1) for s in range(segments)])
            for b in range(rows)
        ]
    )
    found = {"output": output, "M": torch.stack(matrices).unflatten(0, (rows, groups))}
    return found if rule == "deltanet" else found | {"z": torch.stack(normalizers).unflatten(0, (rows, groups))}


def gradients(found, leaves, weights):
    total = sum((x * weights[name].to(x.dtype)).sum() for name, x in found.items())
    return dict(zip(leaves, torch.autograd.grad(total, list(leaves.values()), allow_unused=True), strict=True))


CASES = [
    pytest.param(rule, feature_map, write_gate, started, size, id=f"{rule}-{feature_map}-{gate}-{state}-{size}")
    for rule in RULES
    for feature_map in (("none",) if rule == "deltanet" else ("elu", "dpfp"))
    for write_gate, gate in ((False, "paper"), (True, "gated"))
    for started, state in ((False, "empty"), (True, "started"))
    for size in SIZES
    # The long one once for each rule and gate, the rest in full.
    if size != "several-chunks" or (started and feature_map != "dpfp")
]


@pytest.mark.parametrize(("rule", "feature_map", "write_gate", "started", "size"), CASES)
def test_equals_the_reference(rule, feature_map, write_gate, started, size):
    leaves = inputs(size, write_gate)
    initial = start(feature_map, rule, size, torch.float64)
    if not started:
        initial = {name: torch.zeros_like(x).requires_grad_() for name, x in initial.items()}
    segments = leaves["q"].shape[1]
    has_memory = None if started else (torch.arange(segments) > 0).expand(2, -1)
    found = by_library(rule, feature_map, leaves, initial, has_memory)
    oracle = by_reference(rule, feature_map, leaves, initial, empty=not started)
    for name in oracle:
        assert_equal_to_oracle(name, found[name], oracle[name])
    weights = {name: torch.randn_like(x) for name, x in oracle.items()}
    everything = leaves | initial
    ours, theirs = gradients(found, everything, weights), gradients(oracle, everything, weights)
    for name, expected in theirs.items():
        if expected is None:
            assert ours[name] is None or not ours[name].any(), name
        else:
            assert_equal_to_oracle(f"gradient of {name}", ours[name], expected)


@pytest.mark.parametrize("rule", RULES)
def test_unwritten_segments_and_new_documents(rule):
    """Which segments are written and where documents begin may differ from row to row."""
    feature_map = "none" if rule == "deltanet" else "elu"
    leaves = inputs("one-token", True)
    initial = start(feature_map, rule, "one-token", torch.float64)
    written = torch.tensor([[True, False, True, True, False], [False, True, True, False, True]])
    fresh = torch.tensor([[False, False, False, True, False], [True, False, False, True, False]])
    has_memory = torch.tensor([[True, True, True, False, True], [False, False, True, False, False]])
    found = by_library(rule, feature_map, leaves, initial, has_memory, written=written, fresh=fresh)
    oracle = by_reference(rule, feature_map, leaves, initial, False, written, fresh)
    weights = {name: torch.randn_like(x) for name, x in oracle.items()}
    for name in oracle:
        assert_equal_to_oracle(name, found[name], oracle[name])
    everything = leaves | initial
    ours, theirs = gradients(found, everything, weights), gradients(oracle, everything, weights)
    for name, expected in theirs.items():
        if expected is not None:
            assert_equal_to_oracle(f"gradient of {name}", ours[name], expected)


@pytest.mark.parametrize("from_dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("rule", RULES)
def test_low_precision_by_the_witness_rule(rule, from_dtype):
    """Queries, keys and values from fp32 or bf16, the sums in fp32, against the loops in fp32 and in fp64."""
    feature_map = "none" if rule == "deltanet" else "elu"
    exact = inputs("awkward", True)
    rounded = {name: x.detach().to(from_dtype) for name, x in exact.items()}
    zero = {name: torch.zeros_like(x.detach()) for name, x in start(feature_map, rule, "awkward", torch.float64).items()}
    has_memory = (torch.arange(4) > 0).expand(2, -1)
    results = {}
    for witness, run, dtype in (("fast", by_library, None), ("plain", by_reference, None), ("oracle", by_reference, torch.float64)):
        dtype = dtype or torch.float32
        leaves = {name: x.to(dtype).requires_grad_() for name, x in rounded.items()}
        initial = {name: x.to(dtype) for name, x in zero.items()}
        found = run(rule, feature_map, leaves, initial, has_memory if run is by_library else True)
        torch.manual_seed(1)
        weights = {name: torch.randn(x.shape, dtype=torch.float64) for name, x in found.items()}
        results[witness] = found | {f"d{n}": g for n, g in gradients(found, leaves, weights).items()}
    for name, oracle in results["oracle"].items():
        assert_witnessed(name, results["fast"][name], results["plain"][name], oracle)


@pytest.mark.parametrize("rule", ["delta", "gamma_delta", "deltanet"])
def test_the_map_is_what_is_left_of_a_difference(rule):
    """Two memories that differ by D differ by A D after three segments, and by nothing where a document began."""
    keys, values = torch.rand(2, 3, 4, 1, 5, dtype=torch.float64), torch.randn(2, 3, 4, 1, 3, dtype=torch.float64)
    keys = keys / keys.norm(dim=-1, keepdim=True)
    one, other = torch.randn(2, 2, 1, 5, 3, dtype=torch.float64)
    z = None if rule == "deltanet" else 1 + torch.rand(2, 1, 5, dtype=torch.float64)
    fresh = torch.tensor([[False, False, False], [False, True, False]])
    _, after, A = memory.write_segments_with_map(rule, memory.MemoryState(one, z), keys, None, values, fresh=fresh)
    _, then, _ = memory.write_segments_with_map(rule, memory.MemoryState(other, z), keys, None, values, fresh=fresh)
    assert torch.allclose(after.matrix - then.matrix, A @ (one - other), atol=1e-12) and not A[1].any()
