"""Recurrent Memory Transformer against its equations."""

import pytest
import torch

from baselines.full.reference import turned
from baselines.rmt import reference
from baselines.rmt.config import RMTConfig
from baselines.rmt.model import RecurrentMemoryTransformer
from infini.errors import InputError
from infini.testing import assert_equal_to_oracle, assert_witnessed


@pytest.fixture
def build(small, plain):
    return lambda **changes: plain.moved(RecurrentMemoryTransformer(RMTConfig(**small | {"num_memory_tokens": 3} | changes)))


def logits_of(plain, model, tokens):
    """Logits of one document, by `reference` alone."""
    config = model.config

    def transformer(x, length):
        def attend(layer, read):
            found = []
            for W_q, W_k, W_v in plain.heads(layer, config.head_dim):
                k, v = read @ W_k.T, read @ W_v.T
                k = torch.stack([turned(row, j, config.rope_theta) for j, row in enumerate(k)])
                rows = []
                for i, row in enumerate(read @ W_q.T):
                    seen = reference.visible(i, config.num_memory_tokens, length)
                    scores = k[seen] @ turned(row, i, config.rope_theta) / config.head_dim**0.5
                    rows.append(torch.softmax(scores, dim=0) @ v[seen])
                found.append(torch.stack(rows))
            return torch.cat(found, dim=-1)

        return plain.decode(model, x, attend)

    segments = list(model.embedding.weight[tokens].split(config.segment_length))
    return torch.cat(reference.recur(segments, model.initial_memory, transformer)) @ model.head.weight.T


@pytest.mark.parametrize("length", [15, 13, 4])
@pytest.mark.parametrize("memory", [1, 3])
def test_values_and_gradients_are_the_references(build, plain, length, memory):
    model = build(num_memory_tokens=memory)
    tokens, aim = torch.randint(31, (1, length)), torch.randn(length, 31, dtype=torch.float64)
    expected = logits_of(plain, model, tokens[0])
    found, _ = model(tokens)
    assert_equal_to_oracle("logits", found[0], expected)
    wanted, got = plain.gradients(model, (expected * aim).sum()), plain.gradients(model, (found[0] * aim).sum())
    assert got.keys() == wanted.keys() == dict(model.named_parameters()).keys()
    for name, gradient in wanted.items():
        assert_equal_to_oracle(name, got[name], gradient)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_errs_no_more_than_plain_operations(build, plain, dtype):
    model, tokens = build(), torch.randint(31, (1, 13))
    expected = logits_of(plain, model, tokens[0])
    model = model.to(dtype)
    assert_witnessed("logits", model(tokens)[0][0], logits_of(plain, model, tokens[0]), expected)


@pytest.mark.parametrize("sizes", [[1] * 13, [7, 2, 4], [5, 5, 3]], ids=str)
def test_gradients_do_not_know_how_a_text_was_cut(build, plain, sizes):
    model, tokens = build(), torch.randint(31, (2, 13))
    aim = torch.randn(2, 13, 31, dtype=torch.float64)
    whole = plain.gradients(model, (model(tokens)[0] * aim).sum())
    state, logits = None, []
    for piece in tokens.split(sizes, dim=1):
        found, state = model(piece, state)
        logits.append(found)
    for name, gradient in plain.gradients(model, (torch.cat(logits, dim=1) * aim).sum()).items():
        assert_equal_to_oracle(name, gradient, whole[name])


def test_memory_false_gives_every_segment_the_first_memory(build):
    model, tokens = build(), torch.randint(31, (2, 14))
    cut, _ = model(tokens, memory=False)
    for start in (0, 5, 10):
        assert torch.allclose(cut[:, start : start + 5], model(tokens[:, start : start + 5])[0], atol=1e-12)
    assert not torch.allclose(cut[:, 5:], model(tokens)[0][:, 5:], atol=1e-3)


def test_memory_tokens_are_at_least_one(small):
    with pytest.raises(InputError, match="num_memory_tokens is 0; it must be at least 1"):
        RMTConfig(**small, num_memory_tokens=0)
