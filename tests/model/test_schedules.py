"""The model in its three schedules against the oracle: logits, final state, gradients of all parameters and of the initial state."""

import dataclasses

import pytest
import torch

from infini.memory import MemoryState
from infini.state import LayerState
from infini.testing import assert_equal_to_oracle

TOKENS = 18  # three segments of five and an open one


def cuts(schedule, tokens, segment_length):
    return {
        "parallel": [tokens],
        "stream": [segment_length] * (tokens // segment_length) + [tokens % segment_length] * (tokens % segment_length > 0),
        "decode": [1] * tokens,
        "uneven": [3, 1, 9, tokens - 13],
    }[schedule]


def run_pieces(model, tokens, state, sizes, **keywords):
    logits = []
    for piece in tokens.split(sizes, dim=1):
        found, state = model(piece, state, **keywords)
        logits.append(found)
    return torch.cat(logits, dim=1), state


def named(state):
    """The tensors of a state under the oracle's names, row by row."""
    return [
        {"keys": s.keys, "values": s.values}
        | ({} if s.write_strength is None else {"strength": s.write_strength})
        | ({} if s.inputs is None else {"inputs": s.inputs})
        | ({} if s.memory is None else {"M": s.memory.matrix})
        | ({} if s.memory is None or s.memory.normalizer is None else {"z": s.memory.normalizer})
        for s in state.layers
    ]


def leaf_state(state):
    """The state with every tensor a leaf that wants a gradient."""
    layers = tuple(layer.map(lambda x: x.detach().clone().requires_grad_()) for layer in state.layers)
    return dataclasses.replace(state, layers=layers)


def weighted(logits, layers):
    """One number that depends on every logit and every entry of the final state."""
    generator = torch.Generator().manual_seed(3)
    total = 0
    for x in [logits, *(x for layer in layers for _, x in sorted(layer.items()))]:
        total = total + (x * torch.randn(x.shape, dtype=x.dtype, generator=generator)).sum()
    return total


@pytest.mark.parametrize("schedule", ["parallel", "stream", "decode", "uneven"])
def test_from_nothing_equals_the_oracle(model, oracle, schedule):
    tokens = torch.randint(31, (2, TOKENS))
    logits, state = run_pieces(model, tokens, None, cuts(schedule, TOKENS, model.config.segment_length))
    layers = named(state)
    rows = [oracle(model, row) for row in tokens]
    expected = torch.stack([row[0] for row in rows])
    expected_layers = [
        {name: torch.stack([row[1][i][name] for row in rows]) for name in layer} for i, layer in enumerate(layers)
    ]
    assert_equal_to_oracle("logits", logits, expected)
    for i, layer in enumerate(layers):
        for name, found in layer.items():
            assert_equal_to_oracle(f"final {name} of layer {i}", found, expected_layers[i][name])
    parameters = dict(model.named_parameters())
    ours = torch.autograd.grad(weighted(logits, layers), list(parameters.values()))
    theirs = torch.autograd.grad(weighted(expected, expected_layers), list(parameters.values()))
    for name, mine, other in zip(parameters, ours, theirs, strict=True):
        assert other.abs().max() > 0, f"the oracle gives {name} no gradient"
        assert_equal_to_oracle(f"gradient of {name}", mine, other)


@pytest.mark.parametrize("schedule", ["parallel", "stream", "decode"])
@pytest.mark.parametrize("seen", [10, 13])
def test_from_a_state_equals_the_oracle(model, oracle, schedule, seen):
    """Gradients of the initial state too: memory, and the keys and values of the open segment."""
    tokens = torch.randint(31, (1, seen + TOKENS))
    with torch.no_grad():
        _, before = model(tokens[:, :seen])
    before = leaf_state(before)
    logits, state = run_pieces(model, tokens[:, seen:], before, cuts(schedule, TOKENS, model.config.segment_length))
    layers, start = named(state), named(before)
    config = model.config
    # What a layer does not carry: full strength of its recent tokens, no memory.
    none = {"strength": torch.ones(config.span - 1, config.num_key_value_heads, dtype=torch.float64)}
    none |= {name: torch.zeros(config.num_key_value_heads, 1) for name in "Mz"} | {"inputs": torch.zeros(0, config.hidden_size)}
    expected, expected_layers = oracle(
        model, tokens[0, seen:], [none | {name: x[0] for name, x in layer.items()} for layer in start], seen
    )
    expected_layers = [
        {name: expected_layers[i][name].unsqueeze(0) for name in layer} for i, layer in enumerate(layers)
    ]
    assert_equal_to_oracle("logits", logits, expected.unsqueeze(0))
    for i, layer in enumerate(layers):
        for name, found in layer.items():
            assert_equal_to_oracle(f"final {name} of layer {i}", found, expected_layers[i][name])
    leaves = {f"{name} of layer {i}": x for i, layer in enumerate(start) for name, x in layer.items()}
    ours = torch.autograd.grad(weighted(logits, layers), list(leaves.values()), allow_unused=True)
    theirs = torch.autograd.grad(weighted(expected.unsqueeze(0), expected_layers), list(leaves.values()), allow_unused=True)
    for name, leaf, mine, other in zip(leaves, leaves.values(), ours, theirs, strict=True):
        mine, other = (torch.zeros_like(leaf) if x is None else x for x in (mine, other))
        assert_equal_to_oracle(f"gradient of the initial {name}", mine, other)
        if name[0] in "Mz":
            assert other.abs().max() > 0


def test_silenced_memory_equals_the_oracle(model, oracle):
    tokens = torch.randint(31, (1, TOKENS))
    logits, state = model(tokens, memory=False)
    expected, layers = oracle(model, tokens[0], silenced=True)
    assert_equal_to_oracle("logits", logits[0], expected)
    for layer, other in zip(named(state), layers, strict=True):
        if "M" in layer:
            assert_equal_to_oracle("the memory, written all the same", layer["M"][0], other["M"])
            assert other["M"].abs().max() > 0


def test_init_state_is_the_start(model):
    tokens = torch.randint(31, (2, TOKENS))
    explicit, one = model(tokens, model.init_state(2))
    implicit, other = model(tokens)
    assert_equal_to_oracle("logits", explicit, implicit)
    for a, b in zip(named(one), named(other), strict=True):
        for name in a:
            assert_equal_to_oracle(name, a[name], b[name])


def test_paper_layer_gives_the_memory_of_every_segment_its_gradient(make_model):
    """Backpropagation through all writes: a key of the first segment moves the logits of the last."""
    model = make_model("paper-linear")
    embedded = model.embedding.weight[torch.randint(31, (1, TOKENS))].detach().requires_grad_()
    model.embedding.forward = lambda tokens: embedded
    logits, _ = model(torch.zeros(1, TOKENS, dtype=torch.long))
    gradient = torch.autograd.grad(logits[0, -1].sum(), embedded)[0][0].abs().sum(-1)
    assert (gradient[:15] > 0).all(), "a written segment has no gradient"


def test_states_are_values(model):
    """A call changes neither the state that it was given nor an earlier one."""
    tokens = torch.randint(31, (1, TOKENS))
    _, before = model(tokens[:, :7])
    kept = before.clone()
    model(tokens[:, 7:], before)
    for a, b in zip(named(before), named(kept), strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)
    assert torch.equal(before.open_length, kept.open_length) and torch.equal(before.tokens_seen, kept.tokens_seen)
    assert isinstance(before.layers[0], LayerState) and not list(model.buffers())
    memories = [layer.memory for layer in before.layers if layer.memory]
    assert all(isinstance(m, MemoryState) for m in memories)


def test_two_backward_passes_and_another_batch_size(model):
    """Nothing of a graph or of a batch stays behind in the module."""
    for batch in (2, 3):
        for _ in range(2):
            logits, _ = model(torch.randint(31, (batch, TOKENS)))
            logits.sum().backward()
    model.load_state_dict(model.state_dict())
