"""Random models read a text by kernels where they can, by plain PyTorch where rows differ: every output is that of PyTorch alone."""

import random

import pytest
import torch

from infini import InfiniConfig, InfiniTransformer
from infini.testing import assert_witnessed

ROWS = 2


def draw(chance):
    rule, length = chance.choice(["linear", "delta", "gamma_delta", "deltanet"]), chance.choice([3, 7])
    shape = {"vocab_size": 23, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "initializer_range": 0.5}
    shape |= {"num_attention_heads": 2, "num_key_value_heads": chance.choice([1, 2]), "head_dim": 16, "segment_length": length}
    shape |= {"update_rule": rule, "write_gate": chance.random() < 0.5, "qk_norm": rule != "deltanet" and chance.random() < 0.5}
    shape |= {"gate_when_empty": chance.random() < 0.3, "short_conv": chance.choice([0, 3]), "memory_layers": chance.choice([None, (1,)])}
    if chance.random() < 0.5:
        shape |= {"local_attention": "sliding", "window": length + 2}
    return InfiniConfig(**shape)


def read(config, dtype, device, backend, seed, pieces, memory):
    torch.manual_seed(seed)
    model = InfiniTransformer(config, "eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 or any(part in name for part in ("short_conv", "scale", "bias")):
                parameter.add_(0.5 * torch.randn_like(parameter))
    model = model.to(device, dtype)
    model.enable_recompute(seed % 2 == 0)
    tokens, state, found, total = torch.randint(23, (ROWS, sum(size for size, _ in pieces))).to(device), None, {}, 0.0
    for i, (size, kind) in enumerate(pieces):
        now, tokens = tokens[:, :size], tokens[:, size:]
        uneven = torch.zeros(ROWS, size, dtype=torch.bool, device=device)
        uneven[1, size // 2] = True
        options = {"padding": {"padding": uneven}, "reset": {"reset": uneven}, "trace": {"trace": {}}}.get(kind, {})
        model.memory_backend = "torch" if options else backend
        logits, state = model(now, state, memory=memory, maps=(maps := {}), **options)
        found[f"logits {i}"] = logits
        if "padding" in options or "reset" in options:  # rows that are alike again
            state = state.select(torch.tensor([1, 1]))
        for layer, carried in enumerate(maps["layers"]):
            identity = torch.eye(16, dtype=dtype, device=device).expand(ROWS, config.num_key_value_heads, 16, 16)
            found[f"map {i}.{layer}"] = identity if carried is None else carried
    found |= {f"{i}.{name}": x for i, layer in enumerate(state.layers) for name, x in layer.tensors().items()}
    for x in found.values():
        total = total + (x.double() * torch.randn(x.shape, dtype=torch.float64).to(device)).sum()
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(total, parameters, allow_unused=True, materialize_grads=True)
    return {name: x.detach() for name, x in found.items()} | {f"gradient of {n}": g for n, g in zip(names, gradients, strict=True)}


@pytest.mark.parametrize("seed", range(6))
def test_any_order_of_kernels_and_plain_code(seed, kernel_device):
    chance = random.Random(seed)
    config, memory = draw(chance), chance.random() < 0.8
    pieces = [(chance.randint(2, 12), chance.choice(["plain", "padding", "reset", "trace"])) for _ in range(2)]
    pieces.insert(chance.randrange(3), (chance.randint(config.segment_length, 12), "plain"))
    given = (seed, pieces, memory)
    found = read(config, torch.float32, kernel_device, "triton", *given)
    plain = read(config, torch.float32, kernel_device, "torch", *given)
    oracle = read(config, torch.float64, kernel_device, "torch", *given)
    for name, true in oracle.items():
        assert_witnessed(name, found[name], plain[name], true)
