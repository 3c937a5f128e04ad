"""Gated DeltaNet against its equations: the rule in chunks, the operator behind the door, the whole model."""

import logging
import re
import sys
import types

import pytest
import torch
import torch.nn.functional as F

from baselines.full import reference as window
from baselines.gated_deltanet import operator, reference
from baselines.gated_deltanet.config import GatedDeltaNetConfig
from baselines.gated_deltanet.layer import project
from baselines.gated_deltanet.model import GatedDeltaNet
from baselines.gated_deltanet.rule import CHUNK, gated_delta_rule
from infini import gated_delta
from infini.errors import InputError
from infini.testing import assert_equal_to_oracle, assert_witnessed

BATCH, HEADS, KEYS, VALUES = 2, 2, 5, 3
NAMES = ("q", "k", "v", "log_decay", "strength", "initial")


def draw(tokens, decay=1.0, keys=KEYS, values=VALUES):
    """Inputs of the rule in fp64; keys repeat, so that writes replace each other."""
    q, k = torch.randn(2, BATCH, tokens, HEADS, keys, dtype=torch.float64)
    k[:, tokens // 2 :] = k[:, : tokens - tokens // 2] + 0.1 * k[:, tokens // 2 :]
    v = torch.randn(BATCH, tokens, HEADS, values, dtype=torch.float64)
    log_decay = -decay * torch.rand(BATCH, tokens, HEADS, dtype=torch.float64)
    strength = torch.rand(BATCH, tokens, HEADS, dtype=torch.float64)
    initial = torch.randn(BATCH, HEADS, keys, values, dtype=torch.float64)
    return dict(zip(NAMES, (q, k, v, log_decay, strength, initial), strict=True))


def documents(tokens):
    """Rows that begin anew: at the first token, twice in a row, in the last chunk, not at all."""
    begins = torch.zeros(BATCH, tokens, dtype=torch.bool)
    for t in (0, 2, 3, CHUNK + 1, tokens - 1):
        begins[0, min(t, tokens - 1)] = True
    return begins


def by_reference(q, k, v, log_decay, strength, initial, begins=None):
    """Row by row, head by head, document by document."""
    batch, tokens, heads = log_decay.shape
    rows, last = [], []
    for b in range(batch):
        for h in range(heads):
            M, found = initial[b, h], []
            cuts = [] if begins is None else begins[b].nonzero().flatten().tolist()
            for start, stop in zip([0, *cuts], [*cuts, tokens], strict=True):
                M = M if start == 0 and 0 not in cuts else torch.zeros_like(M)
                inside = slice(start, stop)
                if start < stop:
                    now = (x[b, inside, h] for x in (q, k, v, log_decay.exp(), strength))
                    o, M = reference.recur(*now, M)
                    found.append(o)
            rows.append(torch.cat(found))
            last.append(M)
    o = torch.stack(rows).unflatten(0, (batch, heads)).transpose(1, 2)
    return o, torch.stack(last).unflatten(0, (batch, heads))


def with_gradients(rule, inputs, dtype=torch.float64, **options):
    """Outputs, last matrix, and the gradients of all inputs for an aim that is the same for every rule."""
    leaves = {name: x.detach().to(dtype).requires_grad_() for name, x in inputs.items()}
    o, last = rule(**leaves, **options)
    generator = torch.Generator().manual_seed(1)
    aims = (torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in (o, last))
    sum((x.double() * aim.to(x.device)).sum() for x, aim in zip((o, last), aims, strict=True)).backward()
    return {"o": o, "last": last} | {f"d{name}": leaf.grad for name, leaf in leaves.items()}


@pytest.mark.parametrize("packed", [False, True], ids=["one", "packed"])
@pytest.mark.parametrize("tokens", [1, 2, 7, CHUNK, CHUNK + 1, 2 * CHUNK + 5])
def test_the_rule_in_chunks_is_the_references(tokens, packed):
    inputs, options = draw(tokens), {"begins": documents(tokens)} if packed else {}
    expected = with_gradients(by_reference, inputs, **options)
    for name, found in with_gradients(gated_delta_rule, inputs, **options).items():
        assert_equal_to_oracle(name, found, expected[name])


@pytest.mark.parametrize("case", ["mild", "strong", "abrupt", "none", "repeated"])
def test_the_rule_errs_no_more_than_token_by_token(case):
    """Also where a decay of exp(-100) stands beside weak ones, and where one key is written a hundred times at full strength."""
    inputs = draw(100, decay={"mild": 0.1, "strong": 20.0}.get(case, 0.01))
    if case == "abrupt":
        inputs["log_decay"][:, 3::10] = -100
    if case in ("none", "repeated"):
        inputs["log_decay"] *= 0
    if case == "repeated":
        inputs["k"], inputs["strength"] = inputs["k"][:, :1].expand_as(inputs["k"]), torch.ones_like(inputs["strength"])
    inputs = {name: x.float().double() for name, x in inputs.items()}
    expected = with_gradients(by_reference, inputs)
    fast, plain = (with_gradients(rule, inputs, torch.float32) for rule in (gated_delta_rule, by_reference))
    for name, oracle in expected.items():
        assert_witnessed(name, fast[name], plain[name], oracle)


def test_sixteen_bit_inputs_are_summed_in_fp32():
    inputs = {name: x.bfloat16() for name, x in draw(150).items()}
    o, last = gated_delta_rule(**inputs)
    expected, wanted = by_reference(**{name: x.double() for name, x in inputs.items()})
    assert o.dtype == last.dtype == torch.float32
    assert_witnessed("o", o, expected, expected)
    assert_witnessed("last", last, wanted, wanted)


@pytest.fixture
def build(small, plain):
    return lambda **changes: plain.moved(GatedDeltaNet(GatedDeltaNetConfig(**small | {"num_hidden_layers": 3} | changes)))


VARIANTS = {
    "alternating": {"window": 4},
    "one-layer": {"num_hidden_layers": 1, "key_head_dim": 3},
    "no-convolution": {"conv_size": 1, "window": 1},
    "wide": {"conv_size": 9, "key_head_dim": 11, "window": 100},
}


def logits_of(plain, model, tokens, cut=None):
    """Logits of one document, by the references alone, and the last matrices; `cut`: tokens after which matrices are emptied."""
    config, matrices = model.config, []

    def recurrent(layer, read):
        projected = torch.cat([read @ proj.weight.T for proj in (layer.q_proj, layer.k_proj, layer.v_proj)], dim=-1)
        convolved = reference.silu(reference.convolved(projected, layer.short_conv.weight))
        wide = config.num_attention_heads * config.key_head_dim
        parts = convolved.split([wide, wide, config.num_attention_heads * config.head_dim], dim=-1)
        q, k, v = (x.unflatten(-1, (config.num_attention_heads, -1)) for x in parts)
        a, b = read @ layer.decay_proj.weight.T, read @ layer.strength_proj.weight.T
        gates, found = (read @ layer.gate_proj.weight.T).unflatten(-1, (config.num_attention_heads, -1)), []
        for h in range(config.num_attention_heads):
            alpha, beta = reference.decay(a[:, h], layer.log_rate[h], layer.time_bias[h]), torch.sigmoid(b[:, h])
            rows = []
            for piece in range(0, len(read), cut or len(read)):
                now = slice(piece, piece + (cut or len(read)))
                M = torch.zeros(config.key_head_dim, config.head_dim, dtype=read.dtype)
                o, M = reference.recur(q[now, h], k[now, h], v[now, h], alpha[now], beta[now], M)
                rows.append(o)
            matrices.append(M)
            found.append(reference.gated(torch.cat(rows), gates[:, h], layer.read_norm.weight, config.rms_norm_eps))
        return torch.cat(found, dim=-1)

    def attending(layer, read):
        found = [
            window.attention(read @ W_q.T, read @ W_k.T, read @ W_v.T, config.window, config.rope_theta)
            for W_q, W_k, W_v in plain.heads(layer, config.head_dim)
        ]
        return torch.cat(found, dim=-1)

    mixers = [attending if i % 2 else recurrent for i in range(config.num_hidden_layers)]
    of_layer = {id(block.attention): mixer for block, mixer in zip(model.blocks, mixers, strict=True)}
    hidden = plain.decode(model, model.embedding.weight[tokens], lambda layer, read: of_layer[id(layer)](layer, read))
    return hidden @ model.head.weight.T, torch.stack(matrices).unflatten(0, (-1, config.num_attention_heads))


def in_pieces(model, tokens, sizes, **options):
    state, logits = None, []
    for piece in tokens.split(sizes, dim=1):
        found, state = model(piece, state, **options)
        logits.append(found)
    return torch.cat(logits, dim=1), state


@pytest.mark.parametrize("sizes", [[13], [1] * 13, [5, 2, 6]], ids=lambda s: str(len(s)))
@pytest.mark.parametrize("variant", VARIANTS)
def test_values_gradients_and_state_are_the_references(build, plain, variant, sizes):
    model = build(**VARIANTS[variant])
    tokens, aim = torch.randint(31, (1, 13)), torch.randn(13, 31, dtype=torch.float64)
    expected, matrices = logits_of(plain, model, tokens[0])
    found, state = in_pieces(model, tokens, sizes)
    assert_equal_to_oracle("logits", found[0], expected)
    for layer, matrix in zip(state.layers[::2], matrices, strict=True):
        assert_equal_to_oracle("matrix", layer.matrix[0], matrix)
    wanted, got = plain.gradients(model, (expected * aim).sum()), plain.gradients(model, (found[0] * aim).sum())
    assert got.keys() == wanted.keys() == dict(model.named_parameters()).keys()
    for name, gradient in wanted.items():
        assert_equal_to_oracle(name, got[name], gradient)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_errs_no_more_than_plain_operations(build, plain, dtype):
    model, tokens = build(), torch.randint(31, (1, 13))
    expected, _ = logits_of(plain, model, tokens[0])
    model = model.to(dtype)
    assert_witnessed("logits", model(tokens)[0][0], logits_of(plain, model, tokens[0])[0], expected)


@pytest.mark.parametrize("sizes", [[14], [1] * 14, [7, 2, 5]], ids=lambda s: str(len(s)))
def test_memory_false_empties_the_matrices_at_each_segment(build, plain, sizes):
    model, tokens = build(window=4), torch.randint(31, (1, 14))
    found, _ = in_pieces(model, tokens, sizes, memory=False)
    assert_equal_to_oracle("logits", found[0], logits_of(plain, model, tokens[0], cut=5)[0])
    assert not torch.allclose(found[:, 5:], model(tokens)[0][:, 5:], atol=1e-3)


def test_a_knock_out_knows_documents_and_padding(build):
    model, tokens = build(window=4), torch.randint(31, (1, 19))
    padding, reset = torch.zeros(2, 1, 19, dtype=torch.bool)
    padding[0, [0, 7, 18]], reset[0, [9, 10]] = True, True
    found, _ = model(tokens, padding=padding, reset=reset, memory=False)
    parts = ([1, 2, 3, 4, 5, 6, 8], [9], list(range(10, 18)))
    for part in parts:
        alone, _ = model(tokens[:, part], memory=False)
        assert torch.allclose(found[:, part], alone, atol=1e-12)
    # A row that ends in the middle of a segment while another goes on: nothing is emptied where it has no tokens.
    rows, shorter = torch.randint(31, (2, 12)), torch.zeros(2, 12, dtype=torch.bool)
    shorter[0, 8:] = True
    _, state = model(rows, padding=shorter, memory=False)
    on, _ = model(tokens[:, :2].expand(2, -1), state, memory=False)
    straight, _ = model(torch.cat([rows[:1, :8], tokens[:, :2]], dim=1), memory=False)
    assert torch.allclose(on[0], straight[0, 8:], atol=1e-12)


def test_the_state_is_kept_exactly_where_the_weights_are_not():
    """In bf16 a matrix keeps what a thousand weak writes add up to."""
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "segment_length": 5, "initializer_range": 0.4}
    model = GatedDeltaNet(GatedDeltaNetConfig(**shape)).bfloat16().eval()
    state, tokens = None, torch.randint(256, (1, 64))
    with torch.no_grad():
        whole = model(tokens)[1].layers[0]
        for token in tokens.split(1, dim=1):
            _, state = model(token, state)
    assert state.layers[0].matrix.dtype == torch.float32
    torch.testing.assert_close(state.layers[0].matrix, whole.matrix, rtol=1e-4, atol=1e-5)


def test_decays_start_as_mamba2s():
    torch.manual_seed(0)
    many = GatedDeltaNetConfig(hidden_size=8, num_attention_heads=1000, head_dim=2, num_hidden_layers=1)
    layer = GatedDeltaNet(many).blocks[0].attention
    rates, steps = layer.log_rate.exp(), F.softplus(layer.time_bias)
    assert 0 < rates.min() < 0.1 and 15.9 < rates.max() <= 16 and 7.5 < rates.mean() < 8.5
    assert 0.999e-3 < steps.min() < 1.02e-3 and 0.098 < steps.max() < 0.1001 and 0.009 < steps.median() < 0.011


def test_convolutions_start_around_zero():
    weight = GatedDeltaNet(GatedDeltaNetConfig(hidden_size=512, num_hidden_layers=1)).blocks[0].attention.short_conv.weight
    assert -0.5 <= weight.min() < -0.49 and 0.49 < weight.max() <= 0.5 and weight.mean().abs() < 0.02


def test_write_strengths_are_not_rounded_to_16_bit(small):
    model = GatedDeltaNet(GatedDeltaNetConfig(**small)).bfloat16()
    layer, x = model.blocks[0].attention, torch.randn(1, 7, 16).bfloat16()
    before = x.new_zeros(1, 3, len(layer.short_conv.weight[0]))
    *_, strength = project(layer, x, before, None)
    assert torch.equal(strength, torch.sigmoid(layer.strength_proj(x).float()))


@pytest.mark.parametrize("name", ["window", "key_head_dim", "conv_size"])
def test_options_that_cannot_be_honored_are_refused(small, name):
    with pytest.raises(InputError, match=f"{name} is 0; it must be at least 1"):
        GatedDeltaNetConfig(**small, **{name: 0})


CUDA = torch.device("cuda")


@pytest.fixture
def machine(monkeypatch):
    """A Hopper with everything installed, and what to change about it."""

    def changed(packages=("fla",), triton=(3, 7, 1), capability=(9, 0)):
        monkeypatch.setattr(gated_delta, "_installed", lambda package: package in packages)
        monkeypatch.setattr(gated_delta, "_triton_version", lambda: triton)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)

    changed()
    return changed


def chosen(backend="auto", device=CUDA, dtype=torch.bfloat16, key_head_dim=64, gradients=True):
    return operator.choose_recurrence(backend, device, dtype, key_head_dim, gradients)


def test_the_operator_is_taken_where_it_can_run(machine):
    assert chosen() == chosen("fla") == chosen(dtype=torch.float16) == "fla"
    assert chosen("torch") == "torch" and chosen(key_head_dim=256) == "fla"
    machine(triton=(3, 6, 0))
    assert chosen(gradients=False) == "fla"
    for other in ((8, 0), (10, 0)):
        machine(triton=(3, 6, 0), capability=other)
        assert chosen() == "fla"
    machine(triton=(3, 6, 0), packages=("fla", "tilelang"))
    assert chosen() == "fla"


@pytest.mark.parametrize(
    ("call", "changes", "why"),
    [
        ({"device": torch.device("cpu")}, {}, "needs a CUDA device, not cpu"),
        ({"dtype": torch.float32}, {}, "needs float16 or bfloat16, not torch.float32"),
        ({"key_head_dim": 257}, {}, "keys of at most 256, not 257"),
        ({}, {"packages": ()}, r"flash-linear-attention is not installed \(pip install 'infini-attention\[fla\]'\)"),
        ({}, {"triton": (3, 6, 0)}, "gradients are wrong on Hopper with Triton 3.6.0"),
        ({}, {"triton": (3, 4)}, "gradients are wrong on Hopper with Triton 3.4"),
    ],
)
def test_where_it_cannot_run_force_is_an_error_and_auto_says_why(machine, caplog, call, changes, why):
    machine(**changes)
    with pytest.raises(InputError, match=f"the recurrence backend 'fla' cannot run: .*{why}.* Use 'auto' or 'torch'"):
        chosen("fla", **call)
    operator._announce.cache_clear()
    with caplog.at_level(logging.INFO, logger="baselines.gated_deltanet.operator"):
        assert chosen(**call) == "torch"
    assert re.search("gated delta rule on c.*: torch" + ("" if "device" in call else rf" \(.*{why}"), caplog.messages[-1])


def test_a_model_refuses_a_backend_that_cannot_run(small):
    for backend, why in (("fla", "'fla' cannot run: .* CUDA"), ("triton", "is 'triton'; choose one of auto, fla, torch")):
        model = GatedDeltaNet(GatedDeltaNetConfig(**small), recurrence=backend)
        with pytest.raises(InputError, match=why):
            model(torch.zeros(1, 3, dtype=torch.long))


@pytest.fixture
def stand_in(monkeypatch):
    """The library's operator as its documentation has it: layouts, log decays, unit norms inside, sequences by their borders."""

    def chunk_gated_delta_rule(
        q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False, use_qk_l2norm_in_kernel=False, cu_seqlens=None
    ):
        assert use_qk_l2norm_in_kernel and output_final_state and q.dtype == k.dtype == v.dtype
        assert all(x.is_contiguous() for x in (q, k, v, g, beta))
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        if cu_seqlens is None:
            if initial_state is None:
                initial_state = v.new_zeros(len(q), *k.shape[2:], v.shape[-1])
            o, last = by_reference(q, k, v, g, beta, initial_state)
            return o * scale, last
        assert len(q) == 1 and len(initial_state) == len(cu_seqlens) - 1 and cu_seqlens[-1] == q.shape[1]
        found = []
        for i, (start, stop) in enumerate(zip(cu_seqlens[:-1], cu_seqlens[1:], strict=True)):
            found.append(by_reference(*(x[:, start:stop] for x in (q, k, v, g, beta)), initial_state[i : i + 1]))
        o, last = (torch.cat(parts, dim=dim) for parts, dim in zip(zip(*found, strict=True), (1, 0), strict=True))
        return o * scale, last

    names = ("fla", "fla.ops", "fla.ops.gated_delta_rule")
    for name in names:
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules[names[-1]].chunk_gated_delta_rule = chunk_gated_delta_rule


@pytest.mark.parametrize("packed", [False, True], ids=["one", "packed"])
def test_the_operator_is_called_as_it_wants_to_be(stand_in, packed):
    inputs, begins = draw(70), documents(70) if packed else None
    expected = with_gradients(gated_delta_rule, inputs, begins=begins)
    found = with_gradients(lambda **leaves: operator.recur("fla", **leaves), inputs, begins=begins)
    for name, oracle in expected.items():
        assert_equal_to_oracle(name, found[name], oracle)


def test_the_operators_first_matrices_are_never_of_16_bits(monkeypatch):
    seen = []
    monkeypatch.setattr(operator, "gated_delta_by_fla", lambda q, k, v, g, b, initial, borders: seen.append(initial.dtype) or (v, initial))
    q, k, v, log_decay, strength, _ = (x.bfloat16() for x in draw(7).values())
    operator.recur("fla", q, k, v, log_decay.float(), strength.float(), None, documents(7))
    assert seen == [torch.float32]


def test_gradients_are_expected_wherever_they_are_recorded(build, monkeypatch):
    """Also in evaluation mode: an operator whose gradients are wrong must not be taken there."""
    asked, model, tokens = [], build().eval(), torch.randint(31, (1, 6))
    monkeypatch.setattr("baselines.gated_deltanet.model.choose_recurrence", lambda *call: asked.append(call[-1]) or "torch")
    model(tokens)
    with torch.no_grad():
        model.train()(tokens)
    assert asked == [True, False]


def test_a_model_on_the_operator_gives_the_same(stand_in, build, monkeypatch):
    """Documents, padding, a state and the knock-out reach it too."""
    model, tokens = build(window=4), torch.randint(31, (3, 19))
    padding, reset = torch.zeros(2, 3, 19, dtype=torch.bool)
    padding[0, :5], padding[1, 12:] = True, True
    reset[0, 9], reset[1, 0], reset[2, [6, 18]] = True, True, True
    calls = [{}, {"padding": padding}, {"padding": padding, "reset": reset}, {"memory": False}, {"reset": reset, "memory": False}]
    _, before = model(tokens[:, :7])
    expected = [model(tokens, state, **options) for options in calls for state in (None, before)]
    monkeypatch.setattr("baselines.gated_deltanet.model.choose_recurrence", lambda *_: "fla")
    operated, called = operator.gated_delta_by_fla, []
    monkeypatch.setattr(operator, "gated_delta_by_fla", lambda *given: called.append(given) or operated(*given))
    found = [model(tokens, state, **options) for options in calls for state in (None, before)]
    for (one, after), (other, then) in zip(found, expected, strict=True):
        assert_equal_to_oracle("logits", one, other)
        assert_equal_to_oracle("matrix", after.layers[0].matrix, then.layers[0].matrix)
    assert len(called) >= len(expected)


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [False, True], ids=["one", "packed"])
@pytest.mark.parametrize("tokens", [1, 63, 200])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_operator_of_the_library_is_the_references(dtype, tokens, packed):
    """By the witness rule, the plain witness being the equations in the operator's dtype; gradients where it can give them."""
    pytest.importorskip("fla")
    gradients = operator.why_not(CUDA, dtype, 16, gradients=True) is None
    inputs = draw(tokens, decay=0.2, keys=16, values=32)
    inputs = {name: x.to(dtype).double() for name, x in inputs.items()}
    options = {"begins": documents(tokens)} if packed else {}

    def by_operator(q, k, v, log_decay, strength, initial, begins=None):
        q, k, v = (x.to("cuda", dtype) for x in (q, k, v))
        log_decay, strength, initial = (x.to("cuda", torch.float32) for x in (log_decay, strength, initial))
        return operator.recur("fla", q, k, v, log_decay, strength, initial, begins)

    def by_equations(begins=None, **leaves):
        return by_reference(**{name: x.to(dtype) for name, x in leaves.items()}, begins=begins)

    if gradients:
        expected = with_gradients(by_reference, inputs, **options)
        found, plain = with_gradients(by_operator, inputs, **options), with_gradients(by_equations, inputs, **options)
    else:
        with torch.no_grad():
            results = (rule(**inputs, **options) for rule in (by_reference, by_operator, by_equations))
            expected, found, plain = ({"o": o, "last": last} for o, last in results)
    for name, oracle in expected.items():
        assert_witnessed(name, found[name].cpu(), plain[name].cpu(), oracle, dtype)
    if not gradients:
        pytest.skip("outputs and matrices agree; gradients cannot be had: " + operator.why_not(CUDA, dtype, 16, gradients=True))
