"""The same checks on a CUDA device, in bf16: `pytest -m gpu tests/gpu`."""

import warnings

import pytest
import torch

from infini import InfiniConfig, InfiniTransformer, StreamingSession
from infini.testing import assert_witnessed

pytestmark = pytest.mark.gpu

SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "segment_length": 128,
}
VARIANTS = {
    "paper-linear": {},
    "paper-delta": {"update_rule": "delta"},
    "gamma": {"update_rule": "gamma_delta", "qk_norm": True, "write_gate": True},
    "deltanet": {"update_rule": "deltanet", "write_gate": True},
    "long": {"qk_norm": True, "write_gate": True, "local_attention": "sliding", "window": 200},
}


def make(variant, attention="auto", **changes):
    torch.manual_seed(0)
    return InfiniTransformer(InfiniConfig(**SHAPE | VARIANTS[variant] | changes), attention)


def exact(model, tokens):
    """The same weights in fp64 on the CPU."""
    twin = InfiniTransformer(model.config, "eager").double()
    twin.load_state_dict(model.state_dict())
    return twin(tokens.cpu())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_logits_and_state_by_the_witness_rule(variant, dtype):
    fast, plain = (make(variant, backend).to("cuda", dtype) for backend in ("auto", "eager"))
    tokens = torch.randint(256, (2, 1000), device="cuda")
    (found, state), (eager, eager_state), (oracle, oracle_state) = fast(tokens), plain(tokens), exact(fast, tokens)
    assert_witnessed("logits", found, eager, oracle)
    for mine, theirs, true in zip(state.layers, eager_state.layers, oracle_state.layers, strict=True):
        assert mine.memory.matrix.dtype == torch.float32
        assert_witnessed("M", mine.memory.matrix, theirs.memory.matrix, true.memory.matrix, dtype)


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_three_schedules_by_the_witness_rule(variant):
    model = make(variant).to("cuda", torch.bfloat16)
    tokens = torch.randint(256, (2, 300), device="cuda")
    whole, _ = model(tokens)
    oracle, _ = exact(model, tokens)
    for size in (128, 77, 1):
        logits, state = [], None
        for piece in tokens.split(size, dim=1):
            step, state = model(piece, state)
            logits.append(step)
        assert_witnessed(f"pieces of {size}", torch.cat(logits, dim=1), whole, oracle)


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_padding_and_documents(variant):
    model = make(variant).to("cuda", torch.bfloat16)
    tokens = torch.randint(256, (2, 500), device="cuda")
    padding, reset = (torch.zeros(2, 500, dtype=torch.bool, device="cuda") for _ in range(2))
    padding[0, :150], reset[1, 300] = True, True
    logits, _ = model(tokens, padding=padding, reset=reset)
    for row, start, stop in ((0, 150, 500), (1, 0, 300), (1, 300, 500)):
        alone, _ = model(tokens[row : row + 1, start:stop])
        oracle, _ = exact(model, tokens[row : row + 1, start:stop])
        assert_witnessed(f"row {row} from {start}", logits[row : row + 1, start:stop], alone, oracle)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_training_step_has_finite_gradients(variant):
    """bf16 autocast over fp32 weights; gradients near those of fp64."""
    model = make(variant).to("cuda")
    tokens = torch.randint(256, (2, 1025), device="cuda")

    def gradients(model, tokens):
        logits, state = model(tokens[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
        return torch.autograd.grad(loss, list(model.parameters())), state

    with torch.autocast("cuda", dtype=torch.bfloat16):
        found, state = gradients(model, tokens)
    assert all(layer.memory.matrix.dtype == torch.float32 for layer in state.layers)
    twin = InfiniTransformer(model.config, "eager").to("cuda").double()
    twin.load_state_dict(model.state_dict())
    true, _ = gradients(twin, tokens)
    for name, mine, other in zip(dict(model.named_parameters()), found, true, strict=True):
        assert torch.isfinite(mine).all(), name
        apart = (mine.double() - other).norm() / other.norm().clamp(min=1e-12)
        assert apart < 0.1, f"{name}: {apart:.3f}"


@pytest.mark.parametrize("local_attention", ["segment", "sliding"])
def test_backends_are_one_function(local_attention):
    """Forward and backward of the kernel in use against eager attention, both against fp64."""
    window = 200 if local_attention == "sliding" else None
    tokens, found = torch.randint(256, (2, 640), device="cuda"), {}
    for backend in ("auto", "sdpa", "eager", "exact"):
        model = make("paper-linear", "eager" if backend == "exact" else backend, local_attention=local_attention, window=window)
        model = model.to("cuda", torch.bfloat16)
        if backend == "exact":
            model = model.double()
        logits, _ = model(tokens)
        gradient = torch.autograd.grad(logits.double().square().mean(), model.blocks[0].attention.k_proj.weight)[0]
        found[backend] = logits, gradient * 1000
    for backend in ("auto", "sdpa"):
        for name, mine, plain, true in zip(("logits", "gradient"), found[backend], found["eager"], found["exact"], strict=True):
            assert_witnessed(f"{name} of {backend}", mine, plain, true.cpu())


@torch.no_grad()
def test_a_million_tokens_need_no_more_than_64k():
    model = make("long", segment_length=512, window=512).to("cuda", torch.bfloat16).eval()
    peaks = []
    for tokens in (65_536, 65_536, 1_048_576):
        session = StreamingSession(model, piece=8192)
        torch.cuda.reset_peak_memory_stats()
        session.feed(torch.randint(256, (tokens,)))
        peaks.append(torch.cuda.max_memory_allocated())
        assert session.state_bytes == model.state_bytes(tokens)
        assert all(torch.isfinite(layer.memory.matrix).all() for layer in session.state.layers)
    assert peaks[2] <= 1.02 * peaks[1], peaks


@torch.no_grad()
def test_a_state_moves_between_devices(tmp_path):
    on_gpu, on_cpu = make("long").to("cuda"), make("long")
    tokens = torch.randint(256, (1, 700))
    _, state = on_gpu(tokens[:, :650].cuda())
    session = StreamingSession(on_gpu, state=state)
    session.save(tmp_path / "s")
    restored = StreamingSession.restore(tmp_path / "s", on_cpu)
    a, b = session.feed(tokens[:, 650:]).cpu(), restored.feed(tokens[:, 650:])
    assert torch.allclose(a, b, atol=2e-3)


@pytest.mark.parametrize("variant", ["paper-linear", "long"])
def test_reading_never_makes_the_host_wait(variant):
    model = make(variant).to("cuda", torch.bfloat16).eval()
    session = StreamingSession(model, batch_size=2, piece=256)
    text = torch.randint(256, (2, 2000))
    session.feed(text)  # the first pieces allocate and pick kernels, in states that are empty, full and ragged
    try:
        with warnings.catch_warnings(action="ignore"):  # it warns that it is a prototype
            torch.cuda.set_sync_debug_mode("error")
        session.feed(text)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    narrow = StreamingSession(model, batch_size=2, piece=256, state=session.state)
    assert torch.equal(narrow.feed(text.to(torch.uint8)), session.feed(text))
