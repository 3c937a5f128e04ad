"""The whole model in fp32 and bf16: the witness rule, fp32 states, and training steps that keep their gradients."""

import pytest
import torch

from infini import InfiniConfig, InfiniTransformer
from infini.testing import assert_witnessed

SHAPE = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
PRESETS = {"paper": InfiniConfig.paper, "long": InfiniConfig.long}


def make(preset, attention="auto", **changes):
    torch.manual_seed(0)
    config = PRESETS[preset](**SHAPE | {"num_key_value_heads": 2, "segment_length": 8} | changes)
    return InfiniTransformer(config, attention)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("preset", PRESETS)
@torch.no_grad()
def test_logits_and_state_by_the_witness_rule(preset, dtype):
    """All segments at once against token by token in eager attention, both against fp64 with the same weights."""
    fast, plain, oracle = make(preset).to(dtype), make(preset, "eager").to(dtype), make(preset, "eager").to(dtype).double()
    tokens = torch.randint(50, (2, 29))
    found, state = fast(tokens)
    logits, plain_state = [], None
    for t in range(29):
        step, plain_state = plain(tokens[:, t : t + 1], plain_state)
        logits.append(step)
    exact, exact_state = oracle(tokens)
    assert_witnessed("logits", found, torch.cat(logits, dim=1), exact)
    for i in range(2):
        mine, theirs, true = (s.layers[i].memory for s in (state, plain_state, exact_state))
        for name in ("matrix", "normalizer"):
            assert getattr(mine, name).dtype == torch.float32
            assert_witnessed(name, getattr(mine, name), getattr(theirs, name), getattr(true, name), dtype)


@pytest.mark.parametrize("preset", PRESETS)
def test_autocast_keeps_an_fp32_state_and_gives_gradients(preset):
    model, tokens = make(preset), torch.randint(50, (2, 29))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        first, state = model(tokens)
        logits, state = model(tokens, state)
    assert logits.dtype == torch.bfloat16
    for layer in state.layers:
        assert layer.memory.matrix.dtype == layer.memory.normalizer.dtype == torch.float32
        assert layer.write_strength is None or layer.write_strength.dtype == torch.float32
    (first.float().square().mean() + logits.float().square().mean()).backward()
    for name, parameter in model.named_parameters():
        assert torch.isfinite(parameter.grad).all() and parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("preset", PRESETS)
def test_backends_are_one_function(preset):
    tokens = torch.randint(50, (2, 29))
    logits, gradients = [], []
    for backend in ("sdpa", "eager"):
        model = make(preset, backend).double()
        found, _ = model(tokens)
        logits.append(found)
        gradients.append(torch.autograd.grad(found.square().sum(), list(model.parameters())))
    assert torch.allclose(*logits, atol=1e-11)
    assert all(torch.allclose(a, b, atol=1e-10) for a, b in zip(*gradients, strict=True))


def test_recomputation_changes_nothing():
    tokens, found = torch.randint(50, (2, 29)), []
    for recompute in (False, True):
        model = make("long").double()
        model.enable_recompute(recompute)
        trace = {}
        _, state = model(tokens[:, :13])
        logits, state = model(tokens[:, 13:], state, trace=trace)
        loss = logits.square().sum() + state.layers[0].memory.matrix.sum()
        found.append((loss, *torch.autograd.grad(loss, list(model.parameters()))))
        assert len(trace["layers"]) == 2
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("sizes", [[1] * 19, [5, 11, 3]], ids=str)
def test_gradients_do_not_know_how_a_text_was_cut(sizes):
    """The open segment's keys, values, write strengths and inputs of convolutions pass gradients on."""
    model, tokens = make("long", short_conv=3).double(), torch.randint(50, (2, 19))
    for block in model.blocks:
        torch.nn.init.normal_(block.attention.short_conv.weight, std=0.5)
    aim, found = torch.randn(2, 19, 50, dtype=torch.float64), []
    for pieces in ([19], sizes):
        state, logits = None, []
        for piece in tokens.split(pieces, dim=1):
            some, state = model(piece, state)
            logits.append(some)
        found.append(torch.autograd.grad((torch.cat(logits, dim=1) * aim).sum(), list(model.parameters())))
    assert all(torch.allclose(a, b, atol=1e-10) for a, b in zip(*found, strict=True))


def test_a_trace_is_of_the_calls_own_tokens():
    model, tokens, means, state = make("long", num_hidden_layers=1).double(), torch.randint(50, (2, 29)), [], None
    torch.nn.init.normal_(model.blocks[0].attention.write_gate.weight)
    for piece in (tokens, tokens[:, :13], tokens[:, 13:]):
        _, state = model(piece, None if len(means) < 2 else state, trace=(trace := {}))
        means.append(trace["layers"][0]["write_gate_mean"])
    torch.testing.assert_close(29 * means[0], 13 * means[1] + 16 * means[2])


def test_memory_keys_start_small():
    attention = make("long").blocks[0].attention
    assert (attention.key_bias == -3).all() and not attention.query_bias.any()


def test_trace_describes_every_layer():
    model, tokens = make("long", memory_layers=(1,)), torch.randint(50, (2, 29))
    trace = {}
    model(tokens, trace=trace)
    assert trace["layers"][0] is None
    assert set(trace["layers"][1]) == {
        "memory_weight",
        "memory_share",
        "normalizer_min",
        "normalizer_max",
        "write_gate_mean",
    }
    assert trace["layers"][1]["memory_weight"].shape == (4,)


def test_one_batch_can_be_learned():
    """Digits stated in the first segment and asked for in the fourth: only the memory can know them."""
    model = make("paper", hidden_size=32)
    torch.manual_seed(0)
    tokens = torch.randint(10, 50, (4, 32))
    tokens[:, 0:4] = torch.randint(10, (4, 4))
    tokens[:, 4:28] = tokens[0, 4:28]
    tokens[:, 28] = 11
    tokens[:, 29:32] = tokens[:, 0:3]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    def loss(memory=True):
        logits, _ = model(tokens[:, :-1], memory=memory)
        return torch.nn.functional.cross_entropy(logits[:, 28:30].flatten(0, 1), tokens[:, 29:31].flatten())

    for _ in range(60):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    with torch.no_grad():
        assert loss() < 0.1
        assert loss(memory=False) > 0.5
