"""Compiled blocks compute the same, for any number of rows and segments."""

import pytest
import torch

from infini import InfiniConfig, InfiniTransformer

SHAPES = [(3, 64), (2, 96), (4, 33)]


def outputs(model: InfiniTransformer, device: str) -> list[torch.Tensor]:
    """Logits and one gradient for every shape."""
    found = []
    for batch, tokens in SHAPES:
        text = torch.arange(batch * tokens).reshape(batch, tokens).to(device) * 7 % 256
        model.zero_grad()
        logits, _ = model(text)
        logits.square().mean().backward()
        found += [logits.detach(), model.blocks[0].attention.beta.grad.clone()]
    return found


@pytest.mark.parametrize(
    "device",
    [
        pytest.param("cpu", marks=pytest.mark.slow),  # minutes: shapes are symbols, and two cores compile
        pytest.param("cuda", marks=pytest.mark.gpu),
    ],
)
@pytest.mark.filterwarnings("default")  # torch's compiler warns about itself
def test_compiled_blocks_compute_the_same(device):
    config = InfiniConfig.long(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, segment_length=16, initializer_range=0.3
    )
    model = InfiniTransformer(config).to(device)
    plain = outputs(model, device)
    model.enable_compile()
    for expected, got in zip(plain, outputs(model, device), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
