"""Plain attention, whole and sliding, against its equation."""

import pytest
import torch

from baselines.full import reference
from baselines.full.config import FullConfig
from baselines.full.model import FullTransformer
from infini.errors import InputError
from infini.testing import assert_equal_to_oracle, assert_witnessed

WINDOWS = [None, 1, 7, 100]


@pytest.fixture
def build(small, plain):
    return lambda **changes: plain.moved(FullTransformer(FullConfig(**small | changes)))


def logits_of(plain, model, tokens):
    """Logits of one document, by `reference` alone."""
    config = model.config

    def attend(layer, read):
        window = config.window or len(read)
        found = [
            reference.attention(read @ W_q.T, read @ W_k.T, read @ W_v.T, window, config.rope_theta)
            for W_q, W_k, W_v in plain.heads(layer, config.head_dim)
        ]
        return torch.cat(found, dim=-1)

    return plain.decode(model, model.embedding.weight[tokens], attend) @ model.head.weight.T


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("sizes", [[11], [1] * 11, [5, 2, 4]], ids=lambda s: str(len(s)))
def test_values_and_gradients_are_the_references(build, plain, window, sizes):
    """In one call or several: a cache passes gradients on."""
    model = build(window=window)
    tokens, aim = torch.randint(31, (1, 11)), torch.randn(11, 31, dtype=torch.float64)
    expected = logits_of(plain, model, tokens[0])
    state, logits = None, []
    for piece in tokens.split(sizes, dim=1):
        found, state = model(piece, state)
        logits.append(found[0])
    found = torch.cat(logits)
    assert_equal_to_oracle("logits", found, expected)
    wanted, got = plain.gradients(model, (expected * aim).sum()), plain.gradients(model, (found * aim).sum())
    assert got.keys() == wanted.keys() == dict(model.named_parameters()).keys()
    for name, gradient in wanted.items():
        assert_equal_to_oracle(name, got[name], gradient)


@pytest.mark.parametrize("theta", [3.0, 1e6])
def test_rotations_are_as_fast_as_they_are_asked_to_be(build, plain, theta):
    model, tokens = build(rope_theta=theta), torch.randint(31, (1, 11))
    assert_equal_to_oracle("logits", model(tokens)[0][0], logits_of(plain, model, tokens[0]))


def test_a_window_knows_distances_alone_however_long_the_text(build):
    """One layer, a window of 3: what a token gives is what it gives as the third of a text, at any place."""
    model, tokens = build(window=3, num_hidden_layers=1).eval(), torch.randint(31, (1, 300))
    whole, _ = model(tokens)
    alone, _ = model(tokens[0].unfold(0, 3, 1))
    assert torch.allclose(whole[0, 2:], alone[:, 2], atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 7])
def test_it_errs_no_more_than_plain_operations(build, plain, window, dtype):
    model, tokens = build(window=window), torch.randint(31, (1, 13))
    expected = logits_of(plain, model, tokens[0])
    model = model.to(dtype)
    assert_witnessed("logits", model(tokens)[0][0], logits_of(plain, model, tokens[0]), expected)


@pytest.mark.parametrize("window", [None, 7, 3])
def test_memory_false_cuts_at_the_segment(build, window):
    model, tokens = build(window=window), torch.randint(31, (2, 14))
    cut, _ = model(tokens, memory=False)
    for start in (0, 5, 10):
        alone, _ = model(tokens[:, start : start + 5])
        assert torch.allclose(cut[:, start : start + 5], alone, atol=1e-12)
    _, state = model(tokens[:, :7], memory=False)
    assert torch.allclose(model(tokens[:, 7:], state, memory=False)[0], cut[:, 7:], atol=1e-12)


def test_the_cache_forgets_what_no_row_can_see(build):
    """After a reset the longest document that is still read counts, not the longest that ever was."""
    model, tokens = build(), torch.randint(31, (2, 14))
    reset = torch.zeros(2, 14, dtype=torch.bool)
    reset[0, 9], reset[1, 12] = True, True
    _, state = model(tokens, reset=reset)
    assert state.tokens_seen.tolist() == [5, 2] and state.layers[0].keys.shape[1] == 5
    _, state = model(tokens, state.reset(torch.tensor([True, True])))
    assert state.layers[0].keys.shape[1] == 14


def test_long_ragged_rows_are_masked_in_parts(build):
    model, tokens = build().eval(), torch.randint(31, (2, 600))
    padding = torch.zeros(2, 600, dtype=torch.bool)
    padding[0, 3], padding[1, 290:310] = True, True
    found, _ = model(tokens, padding=padding)
    for row in range(2):
        alone, _ = model(tokens[row : row + 1, ~padding[row]])
        assert torch.allclose(found[row, ~padding[row]], alone[0], atol=1e-12)


def test_documents_in_long_rows_are_masked_in_parts(build):
    """Each part of the queries has the documents of its own place."""
    model, tokens = build().eval(), torch.randint(31, (1, 600))
    reset, starts = torch.zeros(1, 600, dtype=torch.bool), [0, 100, 250, 257, 530, 600]
    reset[0, starts[1:-1]] = True
    found, _ = model(tokens, reset=reset)
    for start, stop in zip(starts, starts[1:], strict=False):
        assert torch.allclose(found[:, start:stop], model(tokens[:, start:stop])[0], atol=1e-12)


def test_options_that_cannot_be_honored_are_refused(small):
    with pytest.raises(InputError, match="window is 0; it must be at least 1, or None for the whole text"):
        FullConfig(**small, window=0)
    with pytest.raises(InputError, match="'eager', which this model does not have"):
        FullTransformer(FullConfig(**small), attention="eager")
