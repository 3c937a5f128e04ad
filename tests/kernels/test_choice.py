"""Which calls run on the kernels, and that a model computes the same whatever the choice."""

import logging

import pytest
import torch

from infini import InfiniConfig, InfiniTransformer, InputError
from infini.kernels import choice
from infini.kernels.choice import choose_memory_backend
from infini.testing import assert_witnessed

CASE = {"update_rule": "linear", "feature_map": "elu", "head_dim": 64, "traced": False}
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
GATED = {"update_rule": "deltanet", "feature_map": "none", "write_gate": True, "local_attention": "sliding"}
LONG = {"write_gate": True, "qk_norm": True, "local_attention": "sliding"}
RULES = {"paper": {}, "long": LONG, "delta": LONG | {"update_rule": "delta"}, "gamma": LONG | {"update_rule": "gamma_delta"}, "deltanet": GATED}


def make(backend, device, **changes):
    torch.manual_seed(3)
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 16}
    config = InfiniConfig(**shape | {"segment_length": 16, "num_key_value_heads": 1, "initializer_range": 0.3} | changes)
    model = InfiniTransformer(config, "eager", backend).to(device)
    with torch.no_grad():
        for block in model.blocks:
            block.attention.beta.normal_()
    return model


@pytest.mark.parametrize(
    ("changes", "dtype", "why"),
    [
        ({"update_rule": "delta", "head_dim": 130}, torch.float32, "128 wide with update_rule 'delta', not 130"),
        ({"feature_map": "dpfp"}, torch.float32, "not for 'linear' with 'dpfp'"),
        ({"head_dim": 258}, torch.float32, "256 wide with update_rule 'linear', not 258"),
        ({"update_rule": "deltanet", "head_dim": 130}, torch.float32, "128 wide with update_rule 'deltanet', not 130"),
        ({"traced": True}, torch.float32, "statistics"),
        ({}, torch.float64, "not torch.float64"),
    ],
)
def test_what_kernels_cannot_do_is_refused_or_logged(changes, dtype, why, caplog):
    with pytest.raises(InputError, match=why):
        choose_memory_backend("triton", CUDA, dtype, **CASE | changes)
    choice.announce.cache_clear()
    with caplog.at_level(logging.INFO, logger="infini"):
        assert choose_memory_backend("auto", CUDA, dtype, **CASE | changes) == "torch"
    assert why in caplog.text


def test_a_machine_without_triton(monkeypatch):
    monkeypatch.setattr(choice, "HAS_TRITON", False)
    choice._machine_lacks.cache_clear()
    with pytest.raises(InputError, match="triton is not installed"):
        choose_memory_backend("triton", CPU, torch.float32, **CASE)
    assert choose_memory_backend("auto", CPU, torch.float32, **CASE) == "torch"
    choice._machine_lacks.cache_clear()


def test_an_unknown_name_is_refused():
    with pytest.raises(InputError, match="choose one of auto, triton, torch"):
        choose_memory_backend("cuda", CPU, torch.float32, **CASE)


def test_on_a_cpu_auto_is_the_plain_code():
    assert choose_memory_backend("auto", CPU, torch.float32, **CASE) == "torch"


def test_a_traced_model_falls_back(kernel_device):
    tokens = torch.randint(256, (2, 20), device=kernel_device)
    with pytest.raises(InputError, match="statistics"):
        make("triton", kernel_device)(tokens, trace={})
    with torch.no_grad():
        found, plain = (make(backend, kernel_device)(tokens, trace={})[0] for backend in ("auto", "torch"))
    assert torch.equal(found, plain)


class Spy:
    """Counts calls of the operators."""

    def __init__(self, monkeypatch):
        from infini.kernels import delta, deltanet, read, read_deltanet, write

        self.calls = {"read": 0, "write": 0}
        operators = [("read", read, "read_and_mix"), ("write", write, "write_linear"), ("write", delta, "write_delta")]
        operators += [("read", read_deltanet, "read_deltanet"), ("write", deltanet, "write_deltanet")]
        for name, module, function in operators:
            monkeypatch.setattr(module, function, self.counted(name, getattr(module, function)))

    def counted(self, name, function):
        def call(*arguments):
            self.calls[name] += 1
            return function(*arguments)

        return call


@pytest.mark.parametrize("changes", RULES.values(), ids=RULES)
def test_logits_state_and_gradients_of_a_model(changes, kernel_device, monkeypatch):
    """A first piece that ends inside a segment, then one that fills it and opens another."""
    spy = Spy(monkeypatch)
    tokens = torch.randint(256, (1, 45), device=kernel_device)

    def run(model):
        first, state = model(tokens[:, :23])
        rest, state = model(tokens[:, 23:], state)
        logits = torch.cat([first, rest], dim=1)
        layer = state.layers[1].memory
        loss = logits.double().square().mean() + layer.matrix.double().mean()
        state_of = {name: x for name, x in zip("Mz", layer, strict=True) if x is not None}
        loss = loss + sum(x.double().mean() for x in state_of.values())
        names, parameters = zip(*model.named_parameters(), strict=True)
        gradients = dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))
        return {"logits": logits} | state_of | gradients

    found = run(make("triton", kernel_device, **changes))
    assert spy.calls == {"read": 4, "write": 4}
    plain, oracle = run(make("torch", kernel_device, **changes)), run(make("torch", "cpu", **changes).double())
    for name, true in oracle.items():
        assert_witnessed(name, found[name], plain[name], true)


def rows_that_differ(device):
    """Two pieces of rows with padding on the left or inside, documents that begin anywhere, and segments open to different lengths."""
    torch.manual_seed(6)
    for length in (29, 22):
        tokens, padding, reset = torch.randint(256, (3, length)), torch.zeros(3, length, dtype=torch.bool), torch.zeros(3, length, dtype=torch.bool)
        padding[0, :7] = padding[2, 10:15] = True
        reset[1, 4] = reset[1, 21] = reset[2, 2] = True
        yield tokens.to(device), {"padding": padding.to(device), "reset": reset.to(device)}


@pytest.mark.parametrize("changes", RULES.values(), ids=RULES)
def test_rows_that_differ(changes, kernel_device, monkeypatch):
    spy = Spy(monkeypatch)

    def run(model, device):
        state, loss, found = None, 0.0, {}
        for i, (tokens, given) in enumerate(rows_that_differ(device)):
            logits, state = model(tokens, state, **given)
            found[f"logits {i}"] = logits
            loss = loss + logits[~given["padding"]].double().square().mean()
        found |= {name: x for name, x in zip("Mz", state.layers[1].memory, strict=True) if x is not None}
        loss = loss + sum(found[name].double().mean() for name in "Mz" if name in found)
        names, parameters = zip(*model.named_parameters(), strict=True)
        return found | dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))

    found = run(make("triton", kernel_device, **changes), kernel_device)
    assert spy.calls == {"read": 4, "write": 4}
    plain, oracle = run(make("torch", kernel_device, **changes), kernel_device), run(make("torch", "cpu", **changes).double(), "cpu")
    for name, true in oracle.items():
        assert_witnessed(name, found[name], plain[name], true)


@torch.no_grad()
def test_token_by_token(kernel_device, monkeypatch):
    spy = Spy(monkeypatch)
    fast, plain = make("triton", kernel_device, **LONG), make("torch", kernel_device, **LONG)
    tokens = torch.randint(256, (1, 21), device=kernel_device)
    whole, state = plain(tokens)
    steps, now = [], None
    logits, now = fast(tokens[:, :14], now)
    for token in tokens[:, 14:].split(1, dim=1):
        step, now = fast(token, now)
        steps.append(step)
    torch.testing.assert_close(torch.cat([logits, *steps], dim=1), whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(now.layers[0].memory.matrix, state.layers[0].memory.matrix)
    assert spy.calls == {"read": 2 * 5, "write": 2}


@torch.no_grad()
@pytest.mark.parametrize("rule", ["linear", "delta", "gamma_delta", "deltanet"])
def test_the_map_that_a_text_lays_on_the_memory(rule, kernel_device):
    """It begins inside a segment; of `delta` the first write of an empty memory erases nothing. At the end one row gets a new document."""
    tokens, found = torch.randint(256, (2, 61), device=kernel_device), {}
    reset = torch.zeros(2, 12, dtype=torch.bool, device=kernel_device)
    reset[1, 5] = True
    for backend in ("triton", "torch"):
        model, state, found[backend] = make(backend, kernel_device, **GATED if rule == "deltanet" else LONG | {"update_rule": rule}), None, []
        for piece in tokens.split([7, 40, 2, 12], dim=1):
            maps = {}
            _, state = model(piece, state, maps=maps, reset=reset if piece.shape[1] == 12 else None)
            found[backend] += maps["layers"]
    for mine, other in zip(found["triton"], found["torch"], strict=True):
        if rule == "linear" and (mine is None or other is None):
            assert mine is other is None
        else:
            identity = torch.eye(16, device=kernel_device).expand(2, 1, 16, 16)
            torch.testing.assert_close(identity if mine is None else mine, identity if other is None else other)
    if rule != "linear":
        assert not torch.allclose(found["triton"][2], identity)
    assert not found["triton"][-1][1].any() and found["triton"][-1][0].any()


def test_a_silenced_memory_is_written_and_not_read(kernel_device):
    fast, plain = make("triton", kernel_device, gate_when_empty=True), make("torch", kernel_device, gate_when_empty=True)
    tokens = torch.randint(256, (1, 35), device=kernel_device)
    (found, state), (expected, other) = (model(tokens, memory=False) for model in (fast, plain))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state.layers[0].memory.matrix, other.layers[0].memory.matrix)


def test_recomputed_gradients_are_the_same(kernel_device):
    tokens, found = torch.randint(256, (1, 35), device=kernel_device), []
    for recompute in (False, True):
        model = make("triton", kernel_device, num_hidden_layers=1, **LONG)
        model.enable_recompute(recompute)
        model(tokens)[0].square().mean().backward()
        found.append(model.blocks[0].attention.k_proj.weight.grad)
    assert torch.equal(*found)


def test_under_autocast_the_state_is_fp32(kernel_device):
    model, tokens = make("triton", kernel_device, num_hidden_layers=1, **LONG), torch.randint(256, (1, 35), device=kernel_device)
    with torch.autocast(kernel_device.type, dtype=torch.bfloat16):
        logits, state = model(tokens)
    logits.float().square().mean().backward()
    assert state.layers[0].memory.matrix.dtype == torch.float32
    exact = make("torch", "cpu", num_hidden_layers=1, **LONG).double()
    exact(tokens.cpu())[0].square().mean().backward()
    for (name, mine), other in zip(model.named_parameters(), exact.parameters(), strict=True):
        apart = (mine.grad.double().cpu() - other.grad).norm() / other.grad.norm()
        assert apart < 0.1, f"{name}: {apart:.3f}"


@pytest.mark.filterwarnings("default")  # torch's compiler warns about itself
@pytest.mark.parametrize(
    ("dynamic", "lengths", "rule"),
    [(False, [35], "linear"), (False, [35], "delta"), (False, [35], "deltanet"), pytest.param(True, [35, 52], "linear", marks=pytest.mark.slow)],
    ids=["one-length", "delta", "deltanet", "any-length"],  # any length is a minute: shapes are symbols
)
@pytest.mark.parametrize("documents", [False, True], ids=["alike", "documents"])
def test_a_block_compiles_to_one_graph(dynamic, lengths, rule, documents, kernel_device):
    """Forward and backward."""
    torch._dynamo.reset()  # graphs of other cases count against the limit of one function
    changes = {"num_hidden_layers": 1} | (GATED if rule == "deltanet" else LONG | {"update_rule": rule})
    plain, compiled = (make("triton", kernel_device, **changes) for _ in range(2))
    compiled.blocks[0].compile(backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for length in lengths:
        tokens, found = torch.randint(256, (1, length), device=kernel_device), []
        reset = (torch.arange(length, device=kernel_device) == 21).unsqueeze(0) if documents else None
        for model in (plain, compiled):
            model.zero_grad()
            logits, _ = model(tokens, reset=reset)
            logits.square().mean().backward()
            found.append((logits, model.blocks[0].attention.k_proj.weight.grad))
        for mine, other in zip(*found, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)
