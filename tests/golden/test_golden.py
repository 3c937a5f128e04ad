"""Committed logits: a change of numerics that changes the model and its reference together shows here.

The weights come from a formula, not from a random generator, so the numbers hold for every version of torch. After an
intended change: `python tests/golden/test_golden.py` writes the file anew; the change log says why.
"""

import json
import math
from pathlib import Path

import pytest
import torch

from infini import InfiniConfig, InfiniTransformer

FILE = Path(__file__).with_name("logits.json")
SHAPE = {
    "vocab_size": 11,
    "hidden_size": 12,
    "intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "segment_length": 4,
}
CASES = {
    "paper-linear": InfiniConfig.paper(**SHAPE),
    "paper-delta": InfiniConfig.paper(**SHAPE, update_rule="delta"),
    "gamma-delta": InfiniConfig(**SHAPE, update_rule="gamma_delta", write_gate=True),
    "deltanet": InfiniConfig(**SHAPE, update_rule="deltanet", write_gate=True),
    "dpfp": InfiniConfig(**SHAPE, feature_map="dpfp"),
    "long": InfiniConfig.long(**SHAPE, window=6),
}


@torch.no_grad()
def logits_of(config: InfiniConfig) -> list[float]:
    """The last logits of 19 tokens, weights a cosine of their place."""
    model = InfiniTransformer(config).double().eval()
    for i, (_, parameter) in enumerate(sorted(model.named_parameters())):
        place = torch.arange(parameter.numel(), dtype=torch.float64).reshape(parameter.shape)
        parameter.copy_(0.5 * torch.cos(place * math.sqrt(2 + i) + i) + (parameter.dim() == 1))
    tokens = torch.tensor([[(t * t + 3 * t) % 11 for t in range(19)]])
    return model(tokens)[0][0, -1].tolist()


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_committed(case):
    assert logits_of(CASES[case]) == pytest.approx(json.loads(FILE.read_text())[case], abs=1e-9)


def test_the_cases_differ():
    committed = json.loads(FILE.read_text())
    assert set(committed) == set(CASES)
    assert len({round(values[0], 6) for values in committed.values()}) == len(CASES)


if __name__ == "__main__":
    FILE.write_text(json.dumps({case: logits_of(config) for case, config in CASES.items()}, indent=1) + "\n")
