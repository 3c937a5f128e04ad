"""A small shape for every baseline, and the decoder around its attention a second time, in plain operations."""

import pytest
import torch


class Plain:
    """One document, one token at a time."""

    @staticmethod
    def rms_norm(x, norm):
        return x / torch.sqrt((x**2).mean(dim=-1, keepdim=True) + norm.eps) * norm.weight

    @staticmethod
    def swiglu(x, mlp):
        gate, up = x @ mlp.gate_proj.weight.T, x @ mlp.up_proj.weight.T
        return (gate * torch.sigmoid(gate) * up) @ mlp.down_proj.weight.T

    @staticmethod
    def heads(layer, dim):
        """The rows of W_q, W_k, W_v of each head."""
        return zip(*(proj.weight.split(dim) for proj in (layer.q_proj, layer.k_proj, layer.v_proj)), strict=True)

    @staticmethod
    def decode(model, x, attend):
        """From embedded tokens `[tokens, D]` to normalised hidden states; `attend(layer, read)` gives what a layer's heads give."""
        for block in model.blocks:
            x = x + attend(block.attention, Plain.rms_norm(x, block.attention_norm)) @ block.attention.o_proj.weight.T
            x = x + Plain.swiglu(Plain.rms_norm(x, block.mlp_norm), block.mlp)
        return Plain.rms_norm(x, model.norm)

    @staticmethod
    def moved(model):
        """The model in fp64 with every parameter away from its initial value, so that none hides behind a 0 or a 1."""
        model = model.double()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
        return model

    @staticmethod
    def gradients(model, loss):
        model.zero_grad()
        loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def plain():
    return Plain


@pytest.fixture
def small():
    return {
        "vocab_size": 31,
        "hidden_size": 16,
        "intermediate_size": 20,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "segment_length": 5,
        "initializer_range": 0.4,
    }
