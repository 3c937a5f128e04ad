"""Transformer-XL against its equations: values, gradients, and what a cache may and may not do."""

from functools import partial

import pytest
import torch

from baselines.transformer_xl import reference
from baselines.transformer_xl.attention import shift, sinusoids
from baselines.transformer_xl.config import TransformerXLConfig
from baselines.transformer_xl.model import TransformerXL
from infini.errors import InputError
from infini.testing import assert_equal_to_oracle, assert_witnessed

VARIANTS = {
    "relative": {"memory_length": 5},
    "short-cache": {"memory_length": 3},
    "long-cache": {"memory_length": 12},
    "no-cache": {"memory_length": 0},
    "rotary": {"positions": "rotary", "memory_length": 7, "rope_theta": 30.0},
    "post-norm": {"norm": "post", "memory_length": 5},
    "clamped": {"memory_length": 12, "clamp_length": 6},
}


@pytest.fixture
def build(small, plain):
    return lambda **changes: plain.moved(TransformerXL(TransformerXLConfig(**small | changes)))


def logits_of(plain, model, tokens):
    """Logits of one document, by `reference` alone."""
    config = model.config

    def attend(layer, read):
        found = []
        for i, weights in enumerate(plain.heads(layer, config.head_dim)):
            if config.positions == "rotary":
                score = partial(reference.rotary_score, theta=config.rope_theta)
            else:
                W_r = layer.r_proj.weight.split(config.head_dim)[i]
                u, v = model.content_bias[i], model.position_bias[i]

                def score(q, k, t, j, W_r=W_r, u=u, v=v):
                    distance = min(t - j, config.clamp_length or t - j)
                    r = W_r @ reference.sinusoid(distance, config.hidden_size).to(W_r.dtype)
                    return reference.relative_score(q, k, r, u, v)

            found.append(reference.attention_head(read, *weights, config.segment_length, config.memory_length, score))
        return torch.cat(found, dim=-1)

    x = model.embedding.weight[tokens]
    if config.norm == "pre":
        x = plain.decode(model, x, attend)
    else:
        for block in model.blocks:
            x = plain.rms_norm(x + attend(block.attention, x) @ block.attention.o_proj.weight.T, block.attention_norm)
            x = plain.rms_norm(x + plain.swiglu(x, block.mlp), block.mlp_norm)
        x = plain.rms_norm(x, model.norm)
    return x @ model.head.weight.T


@pytest.mark.parametrize("variant", VARIANTS)
def test_values_and_gradients_are_the_references(build, plain, variant):
    model = build(**VARIANTS[variant])
    tokens = torch.randint(31, (1, 16))
    aim = torch.randn(16, 31, dtype=torch.float64)
    expected = logits_of(plain, model, tokens[0])
    found, _ = model(tokens)
    assert_equal_to_oracle("logits", found[0], expected)
    wanted, got = plain.gradients(model, (expected * aim).sum()), plain.gradients(model, (found[0] * aim).sum())
    assert got.keys() == wanted.keys() == dict(model.named_parameters()).keys()
    for name, gradient in wanted.items():
        assert_equal_to_oracle(name, got[name], gradient)


@pytest.mark.parametrize("variant", ["relative", "long-cache", "rotary"])
@pytest.mark.parametrize("sizes", [[1] * 18, [7, 2, 9], [5, 5, 8]], ids=str)
def test_gradients_do_not_know_how_a_text_was_cut(build, plain, variant, sizes):
    """The open segment passes gradients on from call to call, a cache none: borders are the text's, not the calls'."""
    model, tokens = build(**VARIANTS[variant]), torch.randint(31, (2, 18))
    aim = torch.randn(2, 18, 31, dtype=torch.float64)
    whole = plain.gradients(model, (model(tokens)[0] * aim).sum())
    state, logits = None, []
    for piece in tokens.split(sizes, dim=1):
        found, state = model(piece, state)
        logits.append(found)
    for name, gradient in plain.gradients(model, (torch.cat(logits, dim=1) * aim).sum()).items():
        assert_equal_to_oracle(name, gradient, whole[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", ["relative", "rotary"])
def test_it_errs_no_more_than_plain_operations(build, plain, variant, dtype):
    model, tokens = build(**VARIANTS[variant]), torch.randint(31, (1, 13))
    expected = logits_of(plain, model, tokens[0])
    model = model.to(dtype)
    assert_witnessed("logits", model(tokens)[0][0], logits_of(plain, model, tokens[0]), expected)


def test_no_gradient_crosses_a_border_through_hidden_states(build):
    model, tokens = build(memory_length=5), torch.randint(31, (1, 15))
    x = model.embedding(tokens).detach().requires_grad_()
    model.embedding.forward = lambda _: x
    logits, _ = model(tokens)
    logits[:, 10:].sum().backward()
    assert not x.grad[:, :10].any() and (x.grad[:, 10:] != 0).any(dim=-1).all()


def test_how_far_back_a_token_sees(build):
    """Each layer reaches `memory_length` tokens farther back than a segment's start: 20 - 4 = 16, then 15 - 4 = 11."""
    model, tokens = build(memory_length=4).eval(), torch.randint(31, (1, 25))
    whole, _ = model(tokens)
    for t, sees in [(11, True), (10, False)]:
        changed = tokens.clone()
        changed[0, t] = (changed[0, t] + 1) % 31
        assert ((model(changed)[0] - whole)[0, 20:].abs().max() > 1e-12) == sees, t


def test_memory_false_is_a_model_without_a_cache(build):
    with_cache, tokens = build(memory_length=7), torch.randint(31, (2, 18))
    without = TransformerXL(TransformerXLConfig.from_dict(with_cache.config.to_dict() | {"memory_length": 0})).double()
    without.load_state_dict(with_cache.state_dict())
    assert torch.allclose(with_cache(tokens, memory=False)[0], without(tokens)[0], atol=1e-12)
    assert not torch.allclose(with_cache(tokens)[0], without(tokens)[0], atol=1e-3)


def test_a_longer_cache_at_evaluation(build, plain, tmp_path):
    model, tokens = build(memory_length=5), torch.randint(31, (1, 23))
    model.save_pretrained(tmp_path)
    longer = TransformerXL.from_pretrained(tmp_path, dtype=torch.float64, memory_length=11)
    assert longer.config.memory_length == 11 and not longer.training
    assert_equal_to_oracle("logits", longer(tokens)[0][0], logits_of(plain, longer, tokens[0]))
    with pytest.raises(InputError, match="belongs to another model"):
        longer(tokens, model(tokens)[1])
    with pytest.raises(InputError, match="belongs to another configuration: .* is"):
        TransformerXL.from_pretrained(tmp_path, hidden_size=18)


def test_shift_and_sinusoids_agree_on_the_distances():
    table = sinusoids(7, 6, None, torch.float64, torch.device("cpu"))
    term = shift(table.sum(dim=-1).expand(3, -1))
    for i in range(3):
        for j in range(4 + i + 1):  # the last query, 2, stands at the last key, 6
            assert term[i, j] == pytest.approx(float(reference.sinusoid(4 + i - j, 6).sum()))


def test_options_that_cannot_be_honored_are_refused(small):
    for changes, sentence in [
        ({"positions": "learned"}, "positions is 'learned'; it must be one of relative, rotary"),
        ({"memory_length": -1}, "memory_length is -1; it must be at least 0"),
        ({"positions": "rotary", "clamp_length": 4}, "clamp_length is 4; it must be None for rotary"),
        ({"clamp_length": 0}, "clamp_length is 0; it must be at least 1"),
        ({"num_attention_heads": 3}, "hidden_size is 16; it must be a multiple of num_attention_heads = 3"),
    ]:
        with pytest.raises(InputError, match=sentence):
            TransformerXLConfig(**small | changes)
    for backend in ("flash", "eager"):
        with pytest.raises(InputError, match=f"'{backend}'; this model has 'sdpa' alone"):
            TransformerXL(TransformerXLConfig(**small), attention=backend)


def test_the_two_presets():
    paper, modern = TransformerXLConfig.paper(), TransformerXLConfig.modern()
    assert (paper.positions, paper.norm, modern.positions, modern.norm) == ("relative", "post", "rotary", "pre")
