"""The drift of a memory, measured where it is known."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from infini.tasks.drift import DriftSettings, drift
from infini.tasks.recall.text import FILLER_BYTES

from infini import InfiniConfig, InfiniTransformer
from infini.errors import InputError

N = 16


def build(rule="linear", **changes):
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
    options = dict(segment_length=N, update_rule=rule, initializer_range=0.2, local_attention="sliding") | changes
    return InfiniTransformer(InfiniConfig(**sizes, **options)).eval()


def settings(**changes):
    return DriftSettings(**dict(lengths=(64, 400), probe=40, haystack="repeat", seed=1, piece=64) | changes)


class Rounding(InfiniTransformer):
    """A model whose memories are rounded to bf16 after every call, unless it is in fp64."""

    def forward(self, *arguments, **keywords):
        logits, state = super().forward(*arguments, **keywords)
        if self.embedding.weight.dtype == torch.float32:

            def rounded(layer):
                memory = type(layer.memory)(*(x if x is None else x.bfloat16().float() for x in layer.memory))
                return dataclasses.replace(layer, memory=memory)

            state = dataclasses.replace(state, layers=tuple(map(rounded, state.layers)))
        return logits, state


@pytest.mark.parametrize("rule", ["linear", "delta", "deltanet"])
def test_fp32_keeps_its_digits_and_bf16_is_found_out(rule):
    good = build(rule)
    bad = Rounding(good.config).eval()
    bad.load_state_dict(good.state_dict())
    for model, low, high in ((good, 1e-9, 1e-4), (bad, 1e-4, 1)):
        rows = drift(model, settings())
        assert [row["tokens"] for row in rows] == [64, 400]
        for row in rows:
            assert low < row["read_error"] < high and low < row["matrix_error"] < high
            assert (row["normalizer_error"] is None) == (rule == "deltanet")
            assert row["matrix_error"] == max(layer["matrix_error"] for layer in row["layers"])
    assert good.embedding.weight.dtype == torch.float32


def test_the_error_of_the_read_is_what_its_words_say():
    model = build()
    (row,) = drift(model, settings(lengths=(100,)))
    exact = copy.deepcopy(model).double()
    phase = int(np.random.default_rng(1).integers(len(FILLER_BYTES)))
    text = torch.tensor([FILLER_BYTES[(phase + i) % len(FILLER_BYTES)] for i in range(140)]).long()[None]
    with torch.no_grad():
        single, double = (one(text[:, :100])[1] for one in (model, exact))
        swapped = [
            dataclasses.replace(layer, memory=type(layer.memory)(*(x.double() for x in other.memory)))
            for layer, other in zip(double.layers, single.layers, strict=True)
        ]
        ours = exact(text[:, 100:], dataclasses.replace(double, layers=tuple(swapped)), hidden=True)[0]
        theirs, silenced = (exact(text[:, 100:], double, hidden=True, memory=on)[0] for on in (True, False))
    expected = ((ours - theirs).norm() / (theirs - silenced).norm()).item()
    # Read in pieces and at once an fp32 memory is rounded differently: errors of one size.
    assert expected / 3 < row["read_error"] < 3 * expected


def test_both_read_one_stream_and_then_the_probe():
    model, seen = build(), []
    model.register_forward_pre_hook(lambda _, arguments: seen.append((model is not _, arguments[0][0])))
    drift(model, settings(lengths=(150,), probe=30))
    begin = int(np.random.default_rng(1).integers(len(FILLER_BYTES)))
    expected = torch.tensor([FILLER_BYTES[(begin + i) % len(FILLER_BYTES)] for i in range(180)]).long()
    assert torch.equal(torch.cat([text for is_copy, text in seen if not is_copy]), expected[:150])
    of_copy = [text for is_copy, text in seen if is_copy]
    assert torch.equal(torch.cat(of_copy[:-3]), expected[:150])
    assert all(torch.equal(text, expected[150:]) for text in of_copy[-3:])


def test_layers_without_memory_are_left_out():
    (row,) = drift(build(memory_layers=(1,)), settings(lengths=(64,)))
    assert len(row["layers"]) == 1 and row["read_error"] > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(lengths=()), r"lengths are \[\] tokens"),
        (dict(lengths=(0,)), r"lengths are \[0\]"),
        (dict(probe=0), "probe is 0"),
        (dict(seed=-1), "seed is -1"),
        (dict(haystack="essays"), "haystack is 'essays'"),
        (dict(lengths=(N - 1,), probe=1), "nothing is read from the memory yet"),
    ],
)
def test_what_cannot_be_measured_is_refused(change, message):
    with pytest.raises(InputError, match=message):
        drift(build(), settings(**change))


def test_models_that_have_nothing_to_compare_are_refused():
    with pytest.raises(InputError, match="the model is torch.bfloat16; .* set dtype=float32"):
        drift(build().bfloat16(), settings())
    with pytest.raises(InputError, match="no memory in any layer"):
        drift(build(memory_layers=()), settings())
