"""Random models, texts and cuts: whatever path a text takes, each document is what it is alone, in one call."""

import dataclasses
import random

import pytest
import torch
import torch.nn.functional as F

from infini import InfiniConfig, InfiniTransformer
from infini.token_step import TokenStep

SEEDS = range(40)
VOCABULARY = 23


def draw(chance, **changes):
    """A small model in fp64 with every parameter away from its initial value."""
    rule, length = chance.choice(["linear", "delta", "gamma_delta", "deltanet"]), chance.choice([1, 2, 3, 5, 7])
    layers, heads = chance.choice([1, 2, 3]), chance.choice([1, 2, 4])
    shape = {"vocab_size": VOCABULARY, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": layers}
    shape |= {"segment_length": length, "update_rule": rule, "head_dim": chance.choice([2, 4, 6]), "initializer_range": 0.5}
    shape |= {"num_attention_heads": heads, "num_key_value_heads": chance.choice([n for n in (1, 2, 4) if heads % n == 0])}
    shape |= {"write_gate": chance.random() < 0.5, "qk_norm": rule != "deltanet" and chance.random() < 0.5}
    shape |= {"gate_when_empty": chance.random() < 0.3, "short_conv": chance.choice([0, 0, 1, 3, 9])}
    shape |= {"tie_word_embeddings": chance.random() < 0.5}
    if chance.random() < 0.3:
        shape["memory_layers"] = tuple(i for i in range(layers) if chance.random() < 0.6)
    if chance.random() < 0.5:
        shape |= {"local_attention": "sliding", "window": length + chance.choice([0, 1, 5, 13])}
    model = InfiniTransformer(InfiniConfig(**shape | changes), attention=chance.choice(["eager", "sdpa"])).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 or any(part in name for part in ("short_conv", "scale", "bias")):
                parameter.add_(0.5 * torch.randn_like(parameter))
    return model


def masks(chance, rows, tokens):
    """Padding anywhere and documents that begin anywhere, or neither."""
    padding = torch.rand(rows, tokens) < chance.choice([0, 0.3, 0.6])
    if chance.random() < 0.3:  # as many tokens in every row
        padding = padding[0].expand(rows, -1).clone()
    padding[:, chance.randrange(tokens)] = False
    return padding, (torch.rand(rows, tokens) < chance.choice([0, 0.1, 0.4])) & ~padding


def alone(model, tokens, padding, reset, memory):
    """Logits `[rows, tokens, vocabulary]`, 0 at padding, and each row's last state: every document in a call of its own."""
    logits, states = torch.zeros(*tokens.shape, VOCABULARY, dtype=torch.float64), []
    for row in range(len(tokens)):
        documents = [[]]
        for t in (~padding[row]).nonzero().flatten().tolist():
            if reset[row, t] and documents[-1]:
                documents.append([])
            documents[-1].append(t)
        for document in documents:
            logits[row, document], state = model(tokens[row : row + 1, document], memory=memory)
        states.append(state)
    return logits, states


def in_pieces(model, chance, tokens, targets, padding, reset, memory):
    """Losses or logits piece by piece, with every option that must change nothing; all as losses `[rows, tokens]`."""
    size, losses, state = tokens.shape[1], [], None if chance.random() < 0.5 else model.init_state(len(tokens))
    cuts = sorted({0, size, *(chance.randrange(size) for _ in range(chance.randrange(5)))})
    for start, stop in zip(cuts, cuts[1:], strict=False):
        now, options = slice(start, stop), {"memory": memory}
        if padding[:, now].any() or chance.random() < 0.3:
            options["padding"] = padding[:, now]
        if reset[:, now].any() or chance.random() < 0.3:
            options["reset"] = reset[:, now]
        options |= {name: {} for name in ("trace", "maps") if chance.random() < 0.3}
        model.enable_recompute(chance.random() < 0.5)
        model.loss_tokens = chance.choice([None, 1, 3])
        if chance.random() < 0.5:
            options["targets"] = targets[:, now]
        found, state = model(tokens[:, now], state, **options)
        losses.append(found if "targets" in options else loss_of(found, targets[:, now], padding[:, now]))
    return torch.cat(losses, dim=1), state


def loss_of(logits, targets, padding):
    assert not logits[padding].any()
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets).masked_fill(padding, 0)


def close(what, found, expected):
    scale = max(1, expected.abs().max().item()) if expected.numel() else 1
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-8 * scale, msg=lambda text: f"{what}: {text}")


@pytest.mark.parametrize("seed", SEEDS)
def test_losses_state_and_gradients_of_any_split(seed):
    chance = random.Random(seed)
    torch.manual_seed(seed)
    model, rows, size = draw(chance), chance.choice([1, 2, 3]), chance.randint(2, 25)
    tokens, targets = torch.randint(VOCABULARY, (2, rows, size))
    padding, reset = masks(chance, rows, size)
    memory = chance.random() < 0.75
    logits, states = alone(model, tokens, padding, reset, memory)
    expected = loss_of(logits, targets, padding)
    found, state = in_pieces(model, chance, tokens, targets, padding, reset, memory)
    close("losses", found, expected)
    weights, totals = torch.randn_like(expected), [0, 0]
    pairs = [(found * weights, expected * weights)]
    for i, layer in enumerate(state.layers):
        for name, tensor in layer.tensors().items():
            if name in ("matrix", "normalizer", "inputs"):
                pairs.append((tensor, torch.cat([one.layers[i].tensors()[name] for one in states])))
                close(f"{i}.{name}", *pairs[-1])
    for name in ("open_length", "tokens_seen", "empty"):
        assert torch.equal(getattr(state, name), torch.cat([getattr(one, name) for one in states])), name
    for mine, other in pairs:
        pattern = torch.randn_like(other)
        totals = [total + (x * pattern).sum() for total, x in zip(totals, (mine, other), strict=True)]
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = [torch.autograd.grad(total, parameters, allow_unused=True, materialize_grads=True) for total in totals]
    for name, mine, other in zip(names, *gradients, strict=True):
        close(f"gradient of {name}", mine, other)


@pytest.mark.parametrize("seed", SEEDS)
@torch.no_grad()
def test_maps_and_steps_from_rows_at_different_places(seed):
    """A is what a change of the memory becomes; the step of fixed shape and a change of rows are the ordinary call."""
    chance = random.Random(seed)
    torch.manual_seed(seed)
    model, rows, size = draw(chance), chance.choice([1, 2, 3]), chance.randint(1, 20)
    tokens = torch.randint(VOCABULARY, (rows, size))
    padding, reset = masks(chance, rows, size)
    logits, state = model(tokens, padding=padding, reset=reset, keep="last")

    more = torch.randint(VOCABULARY, (rows, size))
    padding, reset = masks(chance, rows, size)
    _, end = model(more, state, padding=padding, reset=reset, maps=(maps := {}))
    for i, (layer, carried) in enumerate(zip(state.layers, maps["layers"], strict=True)):
        if layer.memory is None:
            assert carried is None
            continue
        change = torch.randn_like(layer.memory.matrix) * ~state.empty[:, None, None, None]
        layers = list(state.layers)
        layers[i] = dataclasses.replace(layer, memory=layer.memory._replace(matrix=layer.memory.matrix + change))
        _, other = model(more, dataclasses.replace(state, layers=tuple(layers)), padding=padding, reset=reset)
        became = other.layers[i].memory.matrix - end.layers[i].memory.matrix
        close(f"map {i}", became, change if carried is None else carried @ change)

    chosen, begun = torch.randint(rows, (4,)), torch.rand(rows) < 0.5
    whole, _ = model(more, state)
    close("select", model(more[chosen], state.select(chosen))[0], whole[chosen])
    first = torch.zeros_like(reset)
    first[:, 0] = begun
    close("reset", model(more, state.reset(begun))[0], model(more, state, reset=first)[0])

    step, logits = TokenStep(model, state, capture=False), logits[:, 0]
    step.load(state, logits)
    for i in range(chance.randint(1, 15)):
        token, active = torch.randint(VOCABULARY, (rows,)), torch.rand(rows) < 0.7
        found = step.step(token, active)
        if active.any():
            new, state = model(token[:, None], state, padding=~active[:, None], keep="last")
            logits = torch.where(active[:, None], new[:, 0], logits)
        close(f"step {i}", found, logits)
    for mine, other in zip(step.state().layers, state.layers, strict=True):
        for name, tensor in other.tensors().items():
            close(name, mine.tensors()[name], tensor)
