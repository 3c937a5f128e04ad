"""The shipped model: reading in bf16, and a training step without the optimizer under bf16 autocast, by both backends."""

from collections.abc import Callable

import torch
from torch import Tensor

from infini.bench.trial import Trial, Trials
from infini.model import InfiniTransformer

CLOSE = 0.05


def trials(device: torch.device, model: InfiniTransformer, batch: tuple[int, int]) -> Trials:
    """Plain code, then kernels; results must be the same but for 5 % of their norm.

    Args:
        device: where the model is.
        model: a model of any size.
        batch: rows and tokens that it reads and learns from.
    """
    rows, tokens = batch
    text = torch.randint(model.config.vocab_size, (rows, tokens + 1), device=device)
    half = type(model)(model.config).to(device, torch.bfloat16)
    half.load_state_dict(model.state_dict())

    def learn() -> Tensor:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            losses, _ = model(text[:, :-1], targets=text[:, 1:])
        return torch.autograd.grad(losses.mean(), list(model.parameters()))[0]

    @torch.no_grad()
    def read() -> Tensor:
        _, state = half(text[:, : tokens // 2], keep="none")
        return half(text[:, tokens // 2 : tokens], state, keep="last")[0]

    for what, read_by, call in (("training step", model, learn), ("reading", half, read)):
        plain = None
        for backend in ("torch", "triton"):

            def prepare(read_by=read_by, call=call, backend=backend) -> Callable[[], object]:
                found = {}
                for name in ("torch", backend):
                    read_by.memory_backend = name
                    found[name] = call().double()
                apart = float((found[backend] - found["torch"]).norm() / found["torch"].norm())
                if not apart < CLOSE:
                    raise AssertionError(f"the backends are {apart:.1%} apart")
                return call

            facts = {"part": "shipped", "what": what, "backend": backend, "batch": list(batch), "model": model.config.to_dict()}
            row = yield Trial(facts, prepare, rows * tokens, against=plain)
            if "milliseconds" in row and backend == "torch":
                plain = ("torch", row["milliseconds"])
