"""The models that must conform: a new one adds a builder here and, where it can do less, says so."""

from dataclasses import dataclass

import pytest
import torch

from infini import InfiniConfig, InfiniTransformer


@dataclass(frozen=True)
class Subject:
    """A model in fp64 with a short segment, and what it promises beyond the protocol."""

    model: torch.nn.Module
    bounded: bool = True
    """Its state does not grow with the text."""
    resets_inside: bool = True
    """A document may begin anywhere in a piece, not only at its first token."""
    saves: bool = True
    """Its sessions can be saved."""
    tolerance: float = 1e-9
    """Larger where the model itself computes in fp32."""

    def close(self, a: torch.Tensor, b: torch.Tensor) -> bool:
        return torch.allclose(a, b, rtol=0, atol=self.tolerance)


def infini(**changes):
    shape = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    shape |= {"num_key_value_heads": 2, "segment_length": 6, "initializer_range": 0.4, "tie_word_embeddings": False}
    config = InfiniConfig(**shape | changes)
    return Subject(InfiniTransformer(config).double().eval())


def hugging_face_llama():
    transformers = pytest.importorskip("transformers")
    from infini.hf.causal_lm import HuggingFaceCausalLM

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=6,
        initializer_range=0.4,
    )
    model = HuggingFaceCausalLM(transformers.LlamaForCausalLM(config).double()).eval()
    return Subject(model, bounded=False, resets_inside=False, saves=False, tolerance=1e-4)


SUBJECTS = {
    "paper-linear": lambda: infini(update_rule="linear"),
    "paper-delta": lambda: infini(update_rule="delta"),
    "gamma": lambda: infini(update_rule="gamma_delta", write_gate=True),
    "delta-dpfp": lambda: infini(update_rule="delta", feature_map="dpfp", write_gate=True, qk_norm=True),
    "deltanet-sliding": lambda: infini(update_rule="deltanet", write_gate=True, local_attention="sliding", window=8),
    "long": lambda: infini(qk_norm=True, write_gate=True, local_attention="sliding", window=8),
    "one-memory-layer": lambda: infini(memory_layers=(0,), num_key_value_heads=1),
    "hf-llama": hugging_face_llama,
}


@pytest.fixture(params=SUBJECTS)
def subject(request):
    return SUBJECTS[request.param]()
