"""Every baseline on a GPU: the numbers of the CPU, in training without a wait of the host."""

import warnings

import pytest
import torch

from baselines.full.model import FullTransformer
from baselines.gated_deltanet.model import GatedDeltaNet
from baselines.memorizing.model import MemorizingTransformer
from baselines.rmt.model import RecurrentMemoryTransformer
from baselines.transformer_xl.model import TransformerXL
from infini.testing import assert_witnessed

pytestmark = pytest.mark.gpu

MODELS = {
    "xl": (TransformerXL, {"memory_length": 96}),
    "xl-rotary": (TransformerXL, {"memory_length": 64, "positions": "rotary"}),
    "memorizing": (MemorizingTransformer, {"memory_length": 32, "memory_size": 100, "top_k": 200}),
    "full": (FullTransformer, {}),
    "sliding": (FullTransformer, {"window": 70}),
    "rmt": (RecurrentMemoryTransformer, {"num_memory_tokens": 4}),
    "gated-deltanet": (GatedDeltaNet, {"window": 70}),
}
SHAPE = {"vocab_size": 256, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture(params=MODELS)
def model(request):
    model_class, changes = MODELS[request.param]
    return model_class(model_class.config_class(**SHAPE, segment_length=64, **changes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_it_errs_no_more_than_on_the_cpu(model, dtype):
    """In one call, in pieces with a state, and token by token; all entries are retrieved, so that no tie changes the set."""
    tokens = torch.randint(256, (2, 300))
    oracle = model.double()(tokens)[0]
    plain, on_cuda = model.to(dtype)(tokens)[0], model.to("cuda")
    for sizes in ([300], [130, 1, 1, 168]):
        state, found = None, []
        for piece in tokens.cuda().split(sizes, dim=1):
            logits, state = on_cuda(piece, state)
            found.append(logits)
        assert_witnessed(str(sizes), torch.cat(found, dim=1).cpu(), plain, oracle)
        assert state.nbytes == on_cuda.state_bytes(300, 2) and state.device.type == "cuda"


def test_training_never_makes_the_host_wait(model):
    model, tokens = model.cuda(), torch.randint(256, (2, 256), device="cuda")

    def step():
        with torch.autocast("cuda", torch.bfloat16):
            logits, _ = model(tokens)
        logits.float().square().mean().backward()

    step()  # the first picks kernels
    try:
        with warnings.catch_warnings(action="ignore"):  # it warns that it is a prototype
            torch.cuda.set_sync_debug_mode("error")
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
