"""The models that must conform: a new one adds a builder here and, where it can do less, says so."""

from dataclasses import dataclass

import pytest
import torch

from baselines.full.model import FullTransformer
from baselines.gated_deltanet.model import GatedDeltaNet
from baselines.memorizing.model import MemorizingTransformer
from baselines.rmt.model import RecurrentMemoryTransformer
from baselines.transformer_xl.model import TransformerXL
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
    reach: int | None = None
    """Tokens back that it is sure to see; None: all."""
    tolerance: float = 1e-9
    """Larger where the model itself computes in fp32."""

    def close(self, a: torch.Tensor, b: torch.Tensor) -> bool:
        return torch.allclose(a, b, rtol=0, atol=self.tolerance)


def infini(**changes):
    shape = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    shape |= {"num_key_value_heads": 2, "segment_length": 6, "initializer_range": 0.4, "tie_word_embeddings": False}
    config = InfiniConfig(**shape | changes)
    model = InfiniTransformer(config).double().eval()
    for name, parameter in model.named_parameters():
        if "short_conv" in name:  # zeros at the start, which would show nothing
            torch.nn.init.normal_(parameter, std=0.5)
    return Subject(model)


def baseline(model_class, reach=None, bounded=True, **changes):
    shape = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    shape |= {"segment_length": 6, "initializer_range": 0.4, "tie_word_embeddings": False}
    model = model_class(model_class.config_class(**shape | changes)).double().eval()
    return Subject(model, reach=reach, bounded=bounded)


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
    "conv": lambda: infini(short_conv=4, write_gate=True),
    "long-conv": lambda: infini(short_conv=9, qk_norm=True, write_gate=True, local_attention="sliding", window=8),
    "one-memory-layer": lambda: infini(memory_layers=(0,), num_key_value_heads=1),
    "hf-llama": hugging_face_llama,
    "xl": lambda: baseline(TransformerXL, memory_length=9),
    "xl-short-cache": lambda: baseline(TransformerXL, memory_length=4, norm="post", reach=8),
    "xl-rotary": lambda: baseline(TransformerXL, memory_length=12, positions="rotary"),
    "memorizing": lambda: baseline(MemorizingTransformer, memory_length=6, memory_size=32, top_k=40),
    "memorizing-evicting": lambda: baseline(MemorizingTransformer, memory_length=2, memory_size=7, top_k=3, memory_layer=0, reach=4),
    "full": lambda: baseline(FullTransformer, bounded=False),
    "sliding": lambda: baseline(FullTransformer, window=8, reach=14),
    "rmt": lambda: baseline(RecurrentMemoryTransformer, num_memory_tokens=3),
    "gated-deltanet": lambda: baseline(GatedDeltaNet, window=8, num_hidden_layers=3),
    "gated-deltanet-alone": lambda: baseline(GatedDeltaNet, num_hidden_layers=1, conv_size=2),
}


@pytest.fixture(params=SUBJECTS)
def subject(request):
    return SUBJECTS[request.param]()
