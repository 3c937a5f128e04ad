"""Compiled blocks compute the same, for any number of rows and segments, from a state or not."""

from copy import deepcopy

import pytest
import torch

from infini import InfiniConfig, InfiniTransformer
from infini.testing import assert_witnessed

SHAPES = [(3, 64), (2, 96), (4, 33), (1, 40)]


def outputs(model: InfiniTransformer, device: str) -> list[torch.Tensor]:
    """Logits of a text in two pieces, and gradients, for every shape; and logits without gradient."""
    found = []
    for batch, tokens in SHAPES:
        text = torch.arange(batch * tokens).reshape(batch, tokens).to(device) * 7 % 256
        model.zero_grad()
        first, state = model(text[:, :24])
        rest, _ = model(text[:, 24:], state)
        logits = torch.cat([first, rest], dim=1)
        logits.square().mean().backward()
        layer = model.blocks[0].attention
        found += [logits.detach(), layer.beta.grad.clone(), layer.short_conv.weight.grad.clone()]
        with torch.no_grad():
            found.append(model(text)[0])
    return found


@pytest.mark.parametrize(
    "device",
    [
        pytest.param("cpu", marks=pytest.mark.slow),  # a minute: the compiler makes C++ of every part
        pytest.param("cuda", marks=pytest.mark.gpu),
    ],
)
@pytest.mark.filterwarnings("default")  # torch's compiler warns about itself
def test_compiled_blocks_compute_the_same(device):
    config = InfiniConfig.long(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, segment_length=16, initializer_range=0.3,
        short_conv=4,
    )  # fmt: skip
    model = InfiniTransformer(config).to(device)
    for block in model.blocks:
        torch.nn.init.normal_(block.attention.short_conv.weight, std=0.5)  # zeros at the start, which would show nothing
    oracle, plain = outputs(deepcopy(model).double(), device), outputs(model, device)
    model.enable_compile()
    for i, compiled in enumerate(outputs(model, device)):
        assert_witnessed(f"output {i}", compiled, plain[i], oracle[i])


def test_what_is_compiled_computes_the_same_and_sees_one_kind_of_input(monkeypatch):
    """Without a compiler: every part is replaced, tokens of several rows come back to their places, nothing fixed is a view."""
    config = InfiniConfig.long(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, segment_length=16, short_conv=4)
    model, calls = InfiniTransformer(config).double(), []
    for block in model.blocks:
        torch.nn.init.normal_(block.attention.short_conv.weight, std=0.5)
    text = torch.arange(120).reshape(3, 40) * 7 % 256

    def read():
        _, state = model(text[:, :23])
        return model(text[:, 23:], state)[0], model(text, targets=text)[0]

    def compiler(function):
        def compiled(*arguments):
            calls.append((function, [x for x in arguments if isinstance(x, torch.Tensor)]))
            return function(*arguments)

        return compiled

    expected = read()
    monkeypatch.setattr(torch, "compile", compiler)
    model.enable_compile()
    for mine, other in zip(read(), expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-12)
    assert {function.__name__ for function, _ in calls} == {"project", "rotate", "finish", "losses_of"}
    for function, tensors in calls:
        if function.__name__ == "finish":
            assert all(x.dim() == 2 for x in tensors)
        else:
            assert all(x.requires_grad or not (x._is_view() or x.storage_offset()) for x in tensors)
