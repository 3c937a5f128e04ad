"""A small model whose next token depends on everything, in the interface of transformers."""

import pytest
import torch

SHAPE = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
LONG = dict(qk_norm=True, write_gate=True, local_attention="sliding")


@pytest.fixture(autouse=True)
def no_progress_bars():
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.disable_progress_bar()


@pytest.fixture
def make():
    from infini.hf import InfiniForCausalLM, InfiniHFConfig

    def build(**changes):
        torch.manual_seed(0)
        model = InfiniForCausalLM(InfiniHFConfig(**SHAPE | {"segment_length": 8, "initializer_range": 0.3} | changes)).eval()
        with torch.no_grad():  # half memory, half local, but not alike in every head
            for block in model.model.blocks:
                if block.attention.has_memory:
                    block.attention.beta.copy_(torch.tensor([0.5, -0.5, 1.0, 0.0]))
        return model

    return build


@pytest.fixture
def model(make):
    return make()


@pytest.fixture
def ids():
    return torch.randint(256, (3, 45), generator=torch.Generator().manual_seed(1))
