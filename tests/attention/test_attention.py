"""One layer against `reference.infini_attention`, and what a layer must do at its limits."""

import pytest
import torch

from infini import InfiniConfig, InputError, reference
from infini.attention import InfiniAttention, empty_memory
from infini.layers.rotary import rotary_table
from infini.memory import MemoryState
from infini.segments import SegmentPlan
from infini.testing import assert_equal_to_oracle

f64 = torch.float64


def make(rule="linear", dtype=f64, **changes):
    torch.manual_seed(1)
    shape = {"hidden_size": 12, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6, "segment_length": 5}
    config = InfiniConfig(**shape | {"update_rule": rule, "num_hidden_layers": 1} | changes)
    layer = InfiniAttention(config, has_memory=True).to(dtype)
    with torch.no_grad():
        layer.beta.copy_(torch.randn(4))
    return layer


def attend(layer, x, carried=None, turned=False, **keywords):
    """Run the layer; `carried` is (LayerState, plan) of the call before. Positions are all 0 unless `turned`."""
    state, before = carried if carried is not None else (None, None)
    config, batch = layer.config, len(x)
    zeros = torch.zeros(batch, dtype=torch.long)
    plan = SegmentPlan(
        tokens=x.shape[1],
        segment_length=config.segment_length,
        span=config.span,
        sliding=config.local_attention == "sliding",
        open_length=zeros if before is None else before.open_length,
        tokens_seen=zeros if before is None else before.tokens_seen,
        empty=torch.ones(batch, dtype=torch.bool) if before is None else before.empty,
        history=0 if before is None else config.span - 1,
        lengths=None,
        reset=None,
        device=x.device,
    )
    positions = plan.positions if turned else torch.zeros_like(plan.positions)
    table = rotary_table(positions, config.head_dim, config.rope_theta, torch.promote_types(torch.float32, x.dtype))
    output, state = layer(x, state, plan, table, **keywords)
    return output, (state, plan)


@pytest.mark.parametrize("schedule", [[18], [5, 5, 5, 3], [1] * 18], ids=["parallel", "stream", "decode"])
@pytest.mark.parametrize("rule", ["linear", "delta"])
def test_equals_the_published_layer(rule, schedule):
    layer = make(rule)
    x = torch.randn(2, 18, 12, dtype=f64, requires_grad=True)
    outputs, carried = [], None
    for piece in x.split(schedule, dim=1):
        output, carried = attend(layer, piece, carried)
        outputs.append(output)
    found, memory = torch.cat(outputs, dim=1), carried[0].memory
    q, k, v = (proj(x).unflatten(-1, (-1, 6)) for proj in (layer.q_proj, layer.k_proj, layer.v_proj))
    mixed, (M, z) = reference.infini_attention(q, k, v, layer.beta, 5, rule)
    oracle = layer.o_proj(mixed.flatten(2))
    assert_equal_to_oracle("output", found, oracle)
    assert_equal_to_oracle("M", memory.matrix, M)
    assert_equal_to_oracle("z", memory.normalizer, z)
    weights = [torch.randn_like(y) for y in (oracle, M, z)]
    leaves = {"x": x, **dict(layer.named_parameters())}
    ours, theirs = (
        torch.autograd.grad(sum((a * w).sum() for a, w in zip(results, weights, strict=True)), list(leaves.values()))
        for results in ((found, memory.matrix, memory.normalizer), (oracle, M, z))
    )
    for name, mine, other in zip(leaves, ours, theirs, strict=True):
        assert_equal_to_oracle(f"gradient of {name}", mine, other)


def test_each_head_has_its_gate_and_its_own_sign():
    """beta far below 0 is local attention alone, far above 0 the memory's reading alone."""
    layer, x = make(), torch.randn(1, 10, 12, dtype=f64)
    with torch.no_grad():
        layer.o_proj = torch.nn.Identity()
        layer.beta.copy_(torch.tensor([-800.0, 800.0, -800.0, 800.0]))
        mixed = attend(layer, x)[0].unflatten(-1, (4, 6))[:, 5:]
        local = attend(layer, x, use_memory=False)[0].unflatten(-1, (4, 6))[:, 5:]
        q, k, v = (proj(x).unflatten(-1, (-1, 6)) for proj in (layer.q_proj, layer.k_proj, layer.v_proj))
        for head in range(4):
            if head % 2 == 0:
                assert torch.equal(mixed[:, :, head], local[:, :, head])
                continue
            f, g = reference.elu_plus_one(k[0, :5, head // 2]), reference.elu_plus_one(q[0, 5:, head])
            expected = reference.retrieve(g, f.T @ v[0, :5, head // 2], f.sum(0))
            assert_equal_to_oracle(f"head {head}", mixed[0, :, head], expected)


def test_positions_turn_local_attention_alone():
    """What is written and read knows no positions; what is attended to does."""
    layer, x = make(), torch.randn(1, 10, 12, dtype=f64)
    with torch.no_grad():
        flat, (flat_state, _) = attend(layer, x)
        turned, (turned_state, _) = attend(layer, x, turned=True)
        assert torch.equal(flat_state.memory.matrix, turned_state.memory.matrix)
        assert torch.equal(flat_state.keys, turned_state.keys)
        assert (flat - turned).abs().max() > 1e-3
        layer.beta.fill_(800.0)
        assert torch.equal(attend(layer, x)[0][:, 5:], attend(layer, x, turned=True)[0][:, 5:])


def test_rotary_angles_are_the_published_ones():
    """theta^(-2i/d) per position, not its d-th power; distances alone count, also far out."""
    cos, sin = rotary_table(torch.tensor([[3]]), 8, 10000.0, f64)
    angle = 3 * 10000.0 ** (-torch.arange(4, dtype=f64) / 4)
    assert torch.allclose(cos[0, 0, 0], angle.cos(), atol=1e-15) and torch.allclose(sin[0, 0, 0], angle.sin(), atol=1e-15)
    near, far = (rotary_table(torch.tensor([[p, p + 7]]), 8, 1e4, torch.float32) for p in (0, 10_000_000))
    turns = [c[0, 0] * c[0, 1] + s[0, 0] * s[0, 1] for c, s in (near, far)]
    assert torch.allclose(*turns, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_gates_start_half_open_and_learn(dtype):
    """At sigmoid(0) = 1/2 the gate has its largest gradient; at -100 it has none, at 10 next to none in bf16."""
    torch.manual_seed(0)
    config = InfiniConfig(hidden_size=16, num_attention_heads=2, num_hidden_layers=1, segment_length=4)
    layer = InfiniAttention(config, has_memory=True).to(dtype)
    assert layer.beta.shape == (2,) and layer.beta.requires_grad
    assert torch.sigmoid(layer.beta.float()).tolist() == [0.5, 0.5]
    x = torch.randn(2, 12, 16, dtype=dtype)
    output, _ = attend(layer, x)
    output.float().square().sum().backward()
    assert (layer.beta.grad.abs() > 1e-3 * layer.o_proj.weight.grad.float().abs().mean()).all()
    for parameter in (layer.k_proj.weight, layer.v_proj.weight, layer.q_proj.weight):
        assert parameter.grad.abs().max() > 0


def test_memory_alone_trains_keys_and_values():
    """With the gate all on memory, only gradients through the writes reach k_proj and v_proj."""
    layer, x = make(), torch.randn(1, 15, 12, dtype=f64)
    with torch.no_grad():
        layer.beta.fill_(800.0)
    attend(layer, x)[0][:, 10:].sum().backward()
    assert layer.k_proj.weight.grad.abs().max() > 1e-6 and layer.v_proj.weight.grad.abs().max() > 1e-6


@pytest.mark.parametrize("rule", ["linear", "delta", "gamma_delta", "deltanet"])
def test_an_empty_memory_leaves_local_attention_whole(rule):
    layer, x = make(rule), torch.randn(2, 5, 12, dtype=f64)
    assert torch.equal(attend(layer, x)[0], attend(layer, x, use_memory=False)[0])
    with torch.no_grad():
        layer.beta.add_(3)
    assert torch.equal(attend(layer, x)[0], attend(layer, x, use_memory=False)[0])


@pytest.mark.parametrize("rule", ["linear", "deltanet"])
def test_the_paper_read_literally(rule):
    """`gate_when_empty`: in the first segment the memory reads 0 and takes its share; later nothing differs."""
    literal, ours = make(rule, gate_when_empty=True), make(rule)
    literal.o_proj = ours.o_proj = torch.nn.Identity()
    x = torch.randn(1, 10, 12, dtype=f64)
    with torch.no_grad():
        first, second = (y.unflatten(-1, (4, 6)) for y in attend(literal, x)[0].split(5, dim=1))
        whole, same = (y.unflatten(-1, (4, 6)) for y in attend(ours, x)[0].split(5, dim=1))
        assert torch.allclose(first, whole * (1 - torch.sigmoid(literal.beta))[:, None], atol=1e-14)
        assert torch.allclose(second, same, atol=1e-14)
        # Silenced, a memory is empty in every segment.
        silenced, local = (attend(layer, x, use_memory=False)[0].unflatten(-1, (4, 6)) for layer in (literal, ours))
        assert torch.allclose(silenced, local * (1 - torch.sigmoid(literal.beta))[:, None], atol=1e-14)


@pytest.mark.parametrize("autocast", [False, True], ids=["weights", "autocast"])
def test_the_memory_is_fp32_under_bf16(autocast):
    layer = make("delta", torch.float32 if autocast else torch.bfloat16, write_gate=True, qk_norm=True)
    x = torch.randn(1, 18, 12, dtype=torch.float32 if autocast else torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        output, carried = attend(layer, x)
        _, carried = attend(layer, x, carried)
    state = carried[0]
    assert output.dtype == torch.bfloat16
    assert state.memory.matrix.dtype == state.memory.normalizer.dtype == state.write_strength.dtype == torch.float32
    # fp32 in name and in digits: a sum of bf16 numbers would survive rounding to bf16.
    assert not torch.equal(state.memory.matrix, state.memory.matrix.bfloat16().float())
    output.float().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters() if p.grad is not None)


def test_a_16_bit_memory_is_refused():
    layer, x = make(dtype=torch.bfloat16), torch.randn(1, 10, 12, dtype=torch.bfloat16)
    _, (state, plan) = attend(layer, x)
    halved = state.map(lambda t: t.bfloat16())
    with pytest.raises(InputError, match=r"memory's matrix is torch\.bfloat16"):
        attend(layer, x, (halved, plan))


def test_statistics():
    layer, x = make(write_gate=True), torch.randn(1, 10, 12, dtype=f64)
    trace: list = []
    attend(layer, x, trace=trace)
    (found,) = trace
    assert torch.allclose(found["memory_weight"], torch.sigmoid(layer.beta.float()))
    assert 0 < found["memory_share"] < 1
    assert found["normalizer_min"] == 0 and found["normalizer_max"] > 0
    assert 0 < found["write_gate_mean"] < 1
    assert not any(value.requires_grad for value in found.values())
    attend(layer, x, trace=trace, use_memory=False)
    assert trace[1]["memory_share"] == 0


def test_empty_memory_has_the_shape_of_its_rule():
    config = InfiniConfig(hidden_size=8, num_attention_heads=2, num_hidden_layers=1, feature_map="dpfp")
    found = empty_memory(config, 3, torch.zeros(1, dtype=torch.bfloat16))
    assert found.matrix.shape == (3, 2, 24, 4) and found.normalizer.shape == (3, 2, 24)
    assert isinstance(found, MemoryState) and found.matrix.dtype == torch.float32
    config = InfiniConfig(hidden_size=8, num_attention_heads=2, num_hidden_layers=1, update_rule="deltanet")
    assert empty_memory(config, 3, torch.zeros(1)).normalizer is None


@torch.no_grad()
def test_statistics_are_of_the_tokens_alone():
    """Not of the slots that the last segment leaves empty, nor of padding: both read the memory, and nobody looks."""
    layer, x = make(write_gate=True, gate_when_empty=True), torch.randn(1, 12, 12, dtype=f64)
    layer.o_proj = torch.nn.Identity()

    def parts(x):
        """What each token reads, and what it attends to."""
        weight = torch.sigmoid(layer.beta.float()).double()[:, None]
        memory, local = ([attend(bent(sign), x)[0].unflatten(-1, (4, 6))] for sign in (800.0, -800.0))
        return (weight * memory[0]).norm(), ((1 - weight) * local[0]).norm()

    def bent(beta):
        other = make(write_gate=True, gate_when_empty=True)
        other.o_proj = torch.nn.Identity()
        other.beta.fill_(beta)
        return other

    trace: list = []
    attend(layer, x, trace=trace)  # two segments and two tokens
    memory, local = parts(x)
    assert trace[0]["memory_share"].item() == pytest.approx((memory / (memory + local)).item(), abs=1e-6)
    gates = torch.sigmoid(layer.write_gate(x))
    assert trace[0]["write_gate_mean"].item() == pytest.approx(gates.mean().item(), abs=1e-6)
