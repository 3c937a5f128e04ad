"""Memorizing Transformers against their equations: retrieval, eviction, values and gradients."""

import pytest
import torch

from baselines.memorizing import reference
from baselines.memorizing.config import MemorizingConfig
from baselines.memorizing.memory import largest, search
from baselines.memorizing.model import MemorizingTransformer
from baselines.transformer_xl import reference as recurrence
from infini.errors import InputError
from infini.testing import assert_equal_to_oracle

VARIANTS = {
    "roomy": {"memory_size": 100, "memory_length": 5},
    "evicting": {"memory_size": 7, "memory_length": 3},  # no multiple of a segment
    "smaller-than-a-segment": {"memory_size": 3, "memory_length": 0},
    "all-retrieved": {"memory_size": 10, "memory_length": 5, "top_k": 50},
    "first-layer": {"memory_size": 8, "memory_layer": 0, "memory_length": 5, "rope_theta": 30.0},
}


@pytest.fixture
def build(small, plain):
    return lambda **changes: plain.moved(MemorizingTransformer(MemorizingConfig(**small | {"top_k": 3} | changes)))


def logits_of(plain, model, tokens):
    """Logits of one document, by the references alone."""
    config = model.config

    def attend(layer, read):
        found = []
        for i, (W_q, W_k, W_v) in enumerate(plain.heads(layer, config.head_dim)):
            retrieves = layer is model.blocks[config.memory_layer].attention
            rows = []
            for t in range(len(read)):
                seen = recurrence.extended(read, t, config.segment_length, config.memory_length)
                q, keys, values = W_q @ read[t], seen @ W_k.T, seen @ W_v.T
                scale = config.head_dim**-0.5
                if retrieves:
                    q, keys = reference.unit(q), torch.stack([reference.unit(k) for k in keys])
                    scale = layer.log_scale[i].exp()
                first, theta = t + 1 - len(seen), config.rope_theta
                turned = recurrence.turned(q, t, theta)
                scores = [scale * (turned @ recurrence.turned(k, first + j, theta)) for j, k in enumerate(keys)]
                row = torch.softmax(torch.stack(scores), dim=0) @ values
                held = reference.entries(t, config.segment_length, config.memory_size)
                if retrieves and len(held):
                    past = read[held.start : held.stop]
                    memory = torch.stack([reference.unit(k) for k in past @ W_k.T])
                    V_m = reference.retrieved(q, memory, past @ W_v.T, scale, config.top_k)
                    row = reference.mix(layer.beta[i], V_m, row)
                rows.append(row)
            found.append(torch.stack(rows))
        return torch.cat(found, dim=-1)

    return plain.decode(model, model.embedding.weight[tokens], attend) @ model.head.weight.T


@pytest.mark.parametrize("variant", VARIANTS)
def test_values_and_gradients_are_the_references(build, plain, variant):
    model = build(**VARIANTS[variant])
    tokens, aim = torch.randint(31, (1, 16)), torch.randn(16, 31, dtype=torch.float64)
    expected = logits_of(plain, model, tokens[0])
    found, _ = model(tokens)
    assert_equal_to_oracle("logits", found[0], expected)
    wanted, got = plain.gradients(model, (expected * aim).sum()), plain.gradients(model, (found[0] * aim).sum())
    assert got.keys() == wanted.keys() == dict(model.named_parameters()).keys()
    for name, gradient in wanted.items():
        assert_equal_to_oracle(name, got[name], gradient)


@pytest.mark.parametrize("sizes", [[1] * 17, [7, 2, 8], [5, 5, 7]], ids=str)
def test_gradients_do_not_know_how_a_text_was_cut(build, plain, sizes):
    model, tokens = build(**VARIANTS["evicting"]), torch.randint(31, (2, 17))
    aim = torch.randn(2, 17, 31, dtype=torch.float64)
    whole = plain.gradients(model, (model(tokens)[0] * aim).sum())
    state, logits = None, []
    for piece in tokens.split(sizes, dim=1):
        found, state = model(piece, state)
        logits.append(found)
    for name, gradient in plain.gradients(model, (torch.cat(logits, dim=1) * aim).sum()).items():
        assert_equal_to_oracle(name, gradient, whole[name])


@pytest.mark.parametrize("size", [1, 4, 5, 7, 12, 100])
def test_the_oldest_leave_first_one_by_one(build, size):
    """The memory is the last `size` tokens of the full segments, in order, however the text came."""
    model, tokens = build(memory_size=size, memory_length=0, memory_layer=0).eval(), torch.randint(31, (2, 18))
    layer = model.blocks[0].attention
    read = model.blocks[0].attention_norm(model.embedding(tokens))
    keys = layer.k_proj(read).unflatten(-1, (2, 8))[:, :15]
    keys = keys / keys.norm(dim=-1, keepdim=True)
    state = None
    for piece in tokens.split([1, 3, 9, 2, 3], dim=1):
        _, state = model(piece, state)
    kept = state.layers[0].keys
    assert kept.shape[1] == min(size, 15)
    assert torch.allclose(kept, keys[:, -size:], atol=1e-12)


@pytest.mark.parametrize("held", [1, 40, 10**6])
def test_the_search_is_exact_in_pieces_of_any_size(held):
    q, keys = torch.randn(2, 3, 2, 4, dtype=torch.float64), torch.randn(2, 57, 2, 4, dtype=torch.float64)
    allowed = torch.rand(2, 57) < 0.7
    found = search(q, keys, allowed, top_k=6, scores_held=held)
    for b in range(2):
        places = allowed[b].nonzero().flatten().tolist()
        for h in range(2):
            for t in range(3):
                wanted = {places[i] for i in reference.nearest(q[b, t, h], keys[b, places, h], 6)}
                assert set(found[b, h, t].tolist()) == wanted


@pytest.mark.parametrize("entries", [8, 31, 64, 257, 1000])
def test_the_largest_scores_are_those_of_a_sort(entries):
    """Among equals any may be taken, and what is hidden only where nothing else is left."""
    scores = torch.randn(3, 40, entries).mul(2).round()
    scores[0] = scores[0].masked_fill(torch.rand(40, entries) < 0.98, float("-inf"))
    scores[1, :, -1] = 99.0
    for count in (1, 2, 5, 8):
        found, places = largest(scores, count)
        assert torch.equal(found.sort(dim=-1, descending=True).values, scores.sort(dim=-1, descending=True).values[..., :count])
        assert torch.equal(scores.gather(-1, places), found)
        assert all(len(set(row)) == count for row in places.flatten(0, 1).tolist())


def test_rows_of_different_memories_retrieve_their_own(build):
    """A short row beside a long one has fewer entries than the state has room for: the others are nobody's."""
    model, tokens = build(memory_size=12, memory_length=0).eval(), torch.randint(31, (3, 22))
    padding = torch.zeros(3, 22, dtype=torch.bool)
    padding[0, :18], padding[1, :11] = True, True
    _, state = model(tokens, padding=padding)
    assert state.layers[1].keys.shape[1] == 12
    on, _ = model(tokens, state)
    for row in range(3):
        _, alone = model(tokens[row : row + 1, ~padding[row]])
        assert torch.allclose(on[row], model(tokens[row : row + 1], alone)[0][0], atol=1e-12)


def test_the_memory_reaches_beyond_the_caches_and_can_be_silenced(build):
    model, tokens = build(memory_size=100, memory_length=0, top_k=100).eval(), torch.randint(31, (1, 23))
    changed = tokens.clone()
    changed[0, 0] = (changed[0, 0] + 1) % 31

    def moves(**options):
        return bool((model(changed, **options)[0] - model(tokens, **options)[0])[0, 20:].abs().max() > 1e-9)

    assert moves() and not moves(memory=False)
    # Silenced, it is written all the same.
    assert torch.equal(model(tokens, memory=False)[1].layers[1].keys, model(tokens)[1].layers[1].keys)


def test_silenced_it_is_the_model_whose_gates_are_closed(build):
    """Caches stay, in the layer with the memory and in the others."""
    model, tokens = build(memory_length=7).eval(), torch.randint(31, (2, 23))
    with torch.no_grad():
        model.blocks[1].attention.beta.fill_(-800)
    assert torch.allclose(model(tokens, memory=False)[0], model(tokens)[0], atol=1e-12)


def test_scores_start_like_those_of_plain_attention(small):
    """q.k / sqrt(d) of queries and keys of unit variance, so of length sqrt(d): sqrt(d) times that of unit ones."""
    layer = MemorizingTransformer(MemorizingConfig(**small)).blocks[1].attention
    torch.testing.assert_close(layer.log_scale.exp(), torch.full((2,), 8**0.5))


@pytest.mark.parametrize(("beta", "share"), [(-800.0, 0.0), (800.0, 1.0)])
def test_what_is_retrieved_has_the_share_of_the_gates(build, beta, share):
    model, trace = build(memory_size=100), {}
    with torch.no_grad():
        model.blocks[1].attention.beta.fill_(beta)
    model(torch.randint(31, (2, 12)), trace=trace)
    assert float(trace["layers"][1]["memory_share"]) == share


def test_what_telemetry_sees(build):
    model, trace = build(memory_size=100), {}
    model(torch.randint(31, (2, 12)), trace=trace)
    first, second = trace["layers"]
    assert first is None and 0 < float(second["memory_share"]) < 1
    assert torch.allclose(second["memory_weight"], model.blocks[1].attention.beta.sigmoid().float())
    assert model.parameter_groups()["memory"] == ["blocks.1.attention.beta", "blocks.1.attention.log_scale"]


def test_options_that_cannot_be_honored_are_refused(small):
    for changes, sentence in [
        ({"memory_layer": 2}, "memory_layer is 2; it must be a layer's index, from 0 to 1"),
        ({"memory_size": 0}, "memory_size is 0; it must be at least 1"),
        ({"top_k": 0}, "top_k is 0; it must be at least 1"),
    ]:
        with pytest.raises(InputError, match=sentence):
            MemorizingConfig(**small | changes)
