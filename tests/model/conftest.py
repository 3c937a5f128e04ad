"""The whole model a second time: one document, one head, one token after the other, on infini.reference alone."""

import pytest
import torch

from infini import InfiniConfig, InfiniTransformer, reference

SIGMA = {"elu": reference.elu_plus_one, "dpfp": reference.dpfp, "none": lambda x: x}

# Two layers, four query heads on two memories, segments of five tokens, a window that reaches over the border.
SMALL = {
    "vocab_size": 31,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "segment_length": 5,
    "initializer_range": 0.4,
}
SLIDING = {"local_attention": "sliding", "window": 7}
VARIANTS = {
    "paper-linear": {"update_rule": "linear"},
    "paper-delta": {"update_rule": "delta"},
    "gamma": {"update_rule": "gamma_delta", "write_gate": True},
    "gamma-sliding": {"update_rule": "gamma_delta", "qk_norm": True, **SLIDING},
    "deltanet": {"update_rule": "deltanet", "write_gate": True},
    "deltanet-sliding": {"update_rule": "deltanet", **SLIDING},
    "long": {"update_rule": "linear", "qk_norm": True, "write_gate": True, **SLIDING},
    "delta-gated-sliding": {"update_rule": "delta", "write_gate": True, "head_dim": 6, **SLIDING},
    "dpfp": {"update_rule": "linear", "feature_map": "dpfp", "qk_norm": True, "head_dim": 6},
    "dpfp-delta-gated": {"update_rule": "delta", "feature_map": "dpfp", "write_gate": True, "qk_norm": True, "head_dim": 6},
    "one-memory-layer": {"update_rule": "linear", "memory_layers": (1,), "num_key_value_heads": 1, "tie_word_embeddings": False},
    "literal-empty": {"update_rule": "delta", "gate_when_empty": True},
    "conv": {"update_rule": "linear", "short_conv": 3},
    "long-conv": {"update_rule": "linear", "qk_norm": True, "write_gate": True, "short_conv": 6, **SLIDING},
    "segment-of-one": {"update_rule": "delta", "segment_length": 1},
}


def build(name, **changes):
    """A variant in fp64, with every parameter away from its initial value."""
    torch.manual_seed(7)
    model = InfiniTransformer(InfiniConfig(**SMALL | VARIANTS[name] | changes), attention="eager").double()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "short_conv" in parameter_name or parameter.dim() == 1 or "scale" in parameter_name or "bias" in parameter_name:
                parameter.add_(0.5 * torch.randn_like(parameter))
        if model.config.feature_map == "dpfp":
            # Two entries that are always positive: else sparse features may share nothing, and the oracle reads 0/0.
            for block in model.blocks:
                for which in ("query", "key"):
                    getattr(block.attention, f"{which}_scale").div_(3)
                    getattr(block.attention, f"{which}_bias")[:, :2] += 8
    return model


@pytest.fixture
def make_model():
    return build


@pytest.fixture(params=VARIANTS)
def model(request):
    return build(request.param)


def norm(x, weight, eps):
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def turn(x, position, theta):
    """Rotary position of one vector: pairs (i, i + d/2) as complex numbers."""
    half = x.shape[-1] // 2
    angle = position * theta ** (-torch.arange(half, dtype=torch.float64) / half)
    turned = torch.complex(x[:half], x[half:]) * torch.polar(torch.ones(half, dtype=torch.float64), angle)
    return torch.cat([turned.real, turned.imag])


def attend(layer, config, has_memory, x, start, seen, empty, silenced):
    """One attention layer over the tokens `x` of one document, after `start`."""
    n, d, sliding = config.segment_length, config.head_dim, config.local_attention == "sliding"
    heads, groups, kept = config.num_attention_heads, config.num_key_value_heads, config.span - 1
    taps = config.short_conv
    line = torch.cat([start["inputs"], x])  # zeros where the document has no such token
    if taps:
        back = layer.short_conv.weight
        x = torch.stack([line[taps + t] + sum(back[i - 1] * line[taps + t - i] for i in range(1, taps + 1)) for t in range(len(x))])
    q, k, v = ((x @ p.weight.T).reshape(len(x), -1, d) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    strength = torch.ones(len(x), groups, dtype=x.dtype)
    if has_memory and config.write_gate:
        strength = torch.sigmoid(x @ layer.write_gate.weight.T + layer.write_gate.bias)
    # Recent text that the state holds, oldest first; the newest `opened` of it are the open segment.
    held, opened = min(seen, kept), seen % n
    k = torch.cat([start["keys"][kept - held :], k])
    v = torch.cat([start["values"][kept - held :], v])
    strength = torch.cat([start["strength"][kept - held :], strength])

    def position(i):
        return seen - held + i if sliding else (seen - held + i) % n

    outputs, after = {}, {"M": [], "z": []}
    for g in range(groups):
        M, z, bare = start["M"][g], start["z"][g], empty
        group = range(g * heads // groups, (g + 1) * heads // groups)
        turned = torch.stack([turn(k[i, g], position(i), config.rope_theta) for i in range(len(k))])
        if sliding:
            for h in group:
                query = torch.zeros_like(turned)
                new = torch.stack([turn(q[t, h], position(held + t), config.rope_theta) for t in range(len(x))])
                query = torch.cat([query[:held], new])
                local = reference.sliding_attention(query, turned, v[:, g], config.window)
                for t in range(len(x)):
                    outputs[t, h] = local[held + t]
        for first in range(held - opened, len(k), n):
            now = range(first, min(first + n, len(k)))
            fresh = [i - held for i in now if i >= held]
            for h in group:
                if not sliding:
                    query = [turn(q[max(i - held, 0), h], position(i), config.rope_theta) for i in now]
                    local = reference.local_attention(torch.stack(query), turned[now.start : now.stop], v[now.start : now.stop, g])
                    outputs |= {(t, h): local[t + held - first] for t in fresh}
                if not has_memory or ((bare or silenced) and not config.gate_when_empty):
                    continue
                for t in fresh:
                    read = torch.zeros(d, dtype=x.dtype)
                    if not bare and not silenced:
                        read = retrieve(layer, config, q[t, h], h, M, z)
                    outputs[t, h] = reference.gate(layer.beta[h], read, outputs[t, h])
            if has_memory and len(now) == n:
                segment = (line[now.start : now.stop, g] for line in (k, strength, v))
                M, z = write(layer, config, *segment, g, M, z, bare)
                bare = False
        after["M"].append(M)
        after["z"].append(z)
    mixed = torch.stack([torch.cat([outputs[t, h] for h in range(heads)]) for t in range(len(x))])

    def recent(line):
        line = line[max(0, len(line) - kept) :]
        return torch.cat([line.new_zeros(kept - len(line), *line.shape[1:]), line])

    state = {"keys": recent(k), "values": recent(v), "strength": recent(strength), "inputs": line[len(line) - taps :]}
    return mixed @ layer.o_proj.weight.T, state | {name: torch.stack(found) for name, found in after.items()}


def normalized(layer, config, x, which, index):
    if not config.qk_norm:
        return x
    scale, bias = getattr(layer, f"{which}_scale"), getattr(layer, f"{which}_bias")
    return norm(x, scale[index], config.rms_norm_eps) + bias[index]


def retrieve(layer, config, q, head, M, z):
    if config.update_rule == "deltanet":
        return reference.retrieve_deltanet(q[None], M, config.rms_norm_eps)[0] * layer.read_norm.weight
    features = SIGMA[config.feature_map](normalized(layer, config, q, "query", head))
    return reference.retrieve(features[None], M, z)[0]


def write(layer, config, k, w, v, group, M, z, empty):
    if config.update_rule == "deltanet":
        return reference.update_deltanet(k, w, v, M), z
    features = SIGMA[config.feature_map](normalized(layer, config, k, "key", group))
    if config.update_rule == "linear":
        return reference.update_linear(features, w, v, M, z)
    rule = {"delta": reference.update_delta, "gamma_delta": reference.update_gamma_delta}[config.update_rule]
    return rule(features, w, v, M, z, empty)


def nothing(config):
    groups, d, kept = config.num_key_value_heads, config.head_dim, config.span - 1
    features = 6 * d if config.feature_map == "dpfp" else d

    def zeros(*shape):
        return torch.zeros(*shape, dtype=torch.float64)

    layer = {"keys": zeros(kept, groups, d), "values": zeros(kept, groups, d), "strength": zeros(kept, groups)}
    layer |= {"inputs": zeros(config.short_conv, config.hidden_size)}
    layer |= {"M": zeros(groups, features, d), "z": zeros(groups, features)}
    return [layer] * config.num_hidden_layers


def run(model, tokens, start=None, seen=0, silenced=False):
    """Logits `[tokens, vocab]` and the layers' states of one document, `seen` tokens of which were read before."""
    config = model.config
    x, layers = model.embedding.weight[tokens], []
    for block, has_memory, old in zip(model.blocks, config.has_memory, start or nothing(config), strict=True):
        normed = norm(x, block.attention_norm.weight, config.rms_norm_eps)
        empty = seen < config.segment_length
        attended, new = attend(block.attention, config, has_memory, normed, old, seen, empty, silenced)
        x = x + attended
        normed, mlp = norm(x, block.mlp_norm.weight, config.rms_norm_eps), block.mlp
        gate = normed @ mlp.gate_proj.weight.T
        x = x + (gate * torch.sigmoid(gate) * (normed @ mlp.up_proj.weight.T)) @ mlp.down_proj.weight.T
        layers.append(new)
    head = model.embedding.weight if config.tie_word_embeddings else model.head.weight
    return norm(x, model.norm.weight, config.rms_norm_eps) @ head.T, layers


@pytest.fixture
def oracle():
    return run
