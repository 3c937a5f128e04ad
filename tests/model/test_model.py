"""Configuration, parameters, and what the model refuses."""

import dataclasses
import math

import pytest
import torch

from infini import InfiniConfig, InfiniTransformer, InputError
from infini.data.tokenizer import ByteTokenizer, load_tokenizer

SHAPE = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def make(**changes):
    torch.manual_seed(0)
    return InfiniTransformer(InfiniConfig(**SHAPE | {"segment_length": 6} | changes)).eval()


def test_presets():
    paper, long = InfiniConfig.paper(**SHAPE), InfiniConfig.long(**SHAPE)
    assert (paper.update_rule, paper.feature_map, paper.local_attention) == ("linear", "elu", "segment")
    assert not (paper.qk_norm or paper.write_gate or paper.gate_when_empty)
    assert long.qk_norm and long.write_gate and long.local_attention == "sliding" and long.window == long.segment_length
    assert InfiniConfig.paper(update_rule="delta").update_rule == "delta"


def test_a_configuration_survives_its_dictionary():
    for config in (InfiniConfig(), InfiniConfig.long(memory_layers=(3, 1), num_key_value_heads=2)):
        assert InfiniConfig.from_dict(config.to_dict()) == config
    with pytest.raises(dataclasses.FrozenInstanceError):
        InfiniConfig().hidden_size = 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"segment_length": 0}, "segment_length is 0; it must be at least 1"),
        ({"num_key_value_heads": 3}, "num_key_value_heads is 3; it must be a divisor of num_attention_heads = 4"),
        ({"hidden_size": 30}, "hidden_size is 30; it must be a multiple of num_attention_heads = 4"),
        ({"head_dim": 7}, "head_dim is 7; it must be even"),
        ({"update_rule": "hebb"}, "update_rule is 'hebb'"),
        ({"feature_map": "relu"}, "feature_map is 'relu'; it must be one of elu, dpfp for linear"),
        ({"update_rule": "deltanet", "feature_map": "elu"}, "feature_map is 'elu'; it must be one of none for deltanet"),
        ({"update_rule": "deltanet", "qk_norm": True}, "qk_norm is True; it must be False for deltanet"),
        ({"memory_layers": (4,)}, r"memory_layers is \(4,\); it must be layer indices from 0 to 3"),
        ({"local_attention": "global"}, "local_attention is 'global'; it must be one of segment, sliding"),
        ({"window": 600}, "window is 600; it must be None"),
        ({"short_conv": -1}, "short_conv is -1; it must be 0 or more tokens"),
        ({"local_attention": "sliding", "window": 100}, "window is 100; it must be at least segment_length = 512"),
        # Values that Python would carry along: "no" is true, 2 gates cost twice the bytes, and positions become NaN.
        ({"write_gate": "no"}, "write_gate is 'no'; it must be true or false"),
        ({"qk_norm": 2}, "qk_norm is 2; it must be true or false"),
        ({"segment_length": 64.5}, "segment_length is 64.5; it must be a whole number"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True; it must be a whole number"),
        ({"hidden_size": "64"}, "hidden_size is '64'; it must be a whole number"),
        ({"memory_layers": (0.5,)}, r"memory_layers is \(0\.5,\); it must be a list, each a whole number or null"),
        ({"rope_theta": -1.0}, "rope_theta is -1.0; it must be greater than 0"),
        ({"rope_theta": float("nan")}, "rope_theta is nan; it must be a number"),
        ({"rms_norm_eps": 0}, "rms_norm_eps is 0; it must be greater than 0"),
        ({"initializer_range": -0.1}, "initializer_range is -0.1; it must be 0 or more"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_impossible_configurations_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        InfiniConfig(**changes)
    with pytest.raises(TypeError, match="positional_embedder"):
        InfiniConfig(positional_embedder="none")


def test_parameters_by_hand():
    """Every choice adds exactly its parameters, and all of them are trained in one group."""
    d, h, g, w = 16, 2, 2, 8

    def count(**changes):
        model = make(**changes)
        groups = model.parameter_groups()
        names = [name for group in groups.values() for name in group]
        assert sorted(names) == sorted(name for name, _ in model.named_parameters())
        return sum(p.numel() for p in model.parameters())

    paper = 20 * d + d + 2 * (2 * d + 4 * d * d + 3 * d * 16 + h)
    assert count() == paper
    assert count(write_gate=True) == paper + 2 * (g * d + g)
    assert count(qk_norm=True) == paper + 2 * 2 * (h + g) * w
    assert count(update_rule="deltanet") == paper + 2 * w
    assert count(memory_layers=(1,)) == paper - h
    assert count(tie_word_embeddings=False) == paper + 20 * d


def test_gates_and_memory_scales_have_a_group_of_their_own():
    groups = make(write_gate=True, qk_norm=True).parameter_groups()
    assert {name.split("attention.")[1] for name in groups["memory"]} == {
        "beta",
        "write_gate.weight",
        "write_gate.bias",
        "query_scale",
        "query_bias",
        "key_scale",
        "key_bias",
    }
    assert all("norm" in name for name in groups["no_decay"]) and len(groups["no_decay"]) == 5
    assert "embedding.weight" in groups["decay"] and not any("norm" in name for name in groups["decay"])
    assert any("read_norm" in name for name in make(update_rule="deltanet").parameter_groups()["memory"])


def test_initial_sizes():
    model = make(hidden_size=256, num_attention_heads=4, num_hidden_layers=8)
    block = model.blocks[3]
    assert block.attention.q_proj.weight.std().item() == pytest.approx(0.02, rel=0.05)
    for last in (block.attention.o_proj, block.mlp.down_proj):
        assert last.weight.std().item() == pytest.approx(0.02 / math.sqrt(16), rel=0.05)


@pytest.mark.parametrize(
    ("tokens", "keywords", "message"),
    [
        (torch.tensor([[3, 20]]), {}, "token id 20 is outside the vocabulary, 0 to 19"),
        (torch.tensor([[-1, 3]]), {}, "token id -1 is outside the vocabulary"),
        (torch.tensor([1, 2]), {}, r"they must be integers \[batch, tokens\]"),
        (torch.tensor([[1.0]]), {}, "tokens are torch.float32"),
        (torch.zeros(1, 0, dtype=torch.long), {}, "at least one row and one token"),
        ([[1, 2]], {}, "tokens are a list; they must be a tensor"),
        (torch.zeros(1, 2, dtype=torch.uint8), {}, r"tokens are torch\.uint8 \[1, 2\]; they must be integers \[batch, tokens\], int64 or int32"),
        (torch.zeros(1, 2, dtype=torch.bool), {}, "tokens are torch.bool"),
        (torch.tensor([[1, 2]]), {"targets": torch.tensor([[1, -100]])}, "target id -100 is outside the vocabulary, 0 to 19"),
        (torch.tensor([[1, 2]]), {"targets": torch.tensor([[1.0, 2.0]])}, "targets are torch.float32"),
        (torch.tensor([[1, 2]]), {"padding": [[False, True]]}, r"padding is a list; it must be a tensor, bool \[1, 2\]"),
        (torch.tensor([[1, 2]]), {"keep": "some"}, "keep is 'some'; choose one of all, last, none"),
        (torch.tensor([[1, 2]]), {"reset": torch.tensor([True])}, r"reset is torch\.bool \[1\]; it must be bool \[1, 2\]"),
        (torch.tensor([[1, 2]]), {"padding": torch.tensor([[0, 1]])}, r"padding is torch\.int64"),
        (
            torch.tensor([[1, 2]]),
            {"reset": torch.tensor([[True, False]]), "padding": torch.tensor([[True, False]])},
            "reset is True at a padding",
        ),
    ],
)
def test_bad_calls_are_refused(tokens, keywords, message):
    with pytest.raises(InputError, match=message):
        make()(tokens, **keywords)


@torch.no_grad()
def test_what_stands_at_padding_is_no_target():
    model, tokens, targets = make(), torch.randint(20, (2, 9)), torch.randint(20, (2, 9))
    padding = torch.zeros(2, 9, dtype=torch.bool)
    padding[0, :3] = True
    expected, _ = model(tokens, targets=targets, padding=padding)
    for other in (-100, -1, 20):
        found, _ = model(tokens, targets=targets.masked_fill(padding, other).int(), padding=padding)
        assert torch.equal(found, expected)
    model.loss_tokens = 0
    with pytest.raises(InputError, match=r"logits of 0 tokens at a time \(loss_tokens\) cannot give a loss"):
        model(tokens, targets=targets)


@torch.no_grad()
def test_what_stands_at_padding_is_in_no_statistic():
    model, tokens, found = make(write_gate=True), torch.randint(20, (2, 15)), []
    padding = torch.arange(15) >= torch.tensor([15, 8])[:, None]
    for other in (tokens, torch.where(padding, (tokens + 7) % 20, tokens)):
        model(other, padding=padding, trace=(trace := {}))
        found.append(trace["layers"])
    for one, same in zip(*found, strict=True):
        assert all(torch.equal(one[name], same[name]) for name in one)


@torch.no_grad()
def test_resets_and_padding_together():
    """Packed documents in padded rows equal each document alone, with a state carried over a cut in the middle."""
    model, tokens = make(update_rule="delta", write_gate=True).double(), torch.randint(20, (2, 26))
    padding, reset = torch.zeros(2, 26, dtype=torch.bool), torch.zeros(2, 26, dtype=torch.bool)
    padding[0, [0, 7, 8, 19]], padding[1, 11:] = True, True
    reset[0, [5, 9, 20]], reset[1, 10] = True, True
    for cut in (1, 10, 20):
        state, logits = None, []
        for now in (slice(cut), slice(cut, 26)):
            found, state = model(tokens[:, now], state, reset=reset[:, now], padding=padding[:, now])
            logits.append(found)
        logits = torch.cat(logits, dim=1)
        for row, starts in ((0, [0, 5, 9, 20, 26]), (1, [0, 10, 26])):
            for start, stop in zip(starts, starts[1:], strict=False):
                real = torch.arange(start, stop)[~padding[row, start:stop]]
                alone, _ = model(tokens[row, real].unsqueeze(0))
                assert torch.allclose(logits[row, real], alone[0], atol=1e-10)


def test_bytes_are_tokens():
    text = "naïve ☃"
    tokenizer = load_tokenizer(InfiniConfig())
    assert isinstance(tokenizer, ByteTokenizer) and tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode(text)) == 10 and tokenizer.vocab_size == 256
    assert tokenizer.decode([255, 65]) == "\ufffdA"
    with pytest.raises(InputError, match="tokenizer is 'spm'"):
        load_tokenizer(InfiniConfig(tokenizer="spm"))
