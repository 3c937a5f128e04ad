"""The shipped model: reading in bf16, and a training step without the optimizer under bf16 autocast, by both backends."""

import copy
import functools
from collections.abc import Callable

import torch
from torch import Tensor

from infini.bench.trial import Trial, Trials
from infini.model import InfiniTransformer

CLOSE = 0.05


def trials(device: torch.device, model: InfiniTransformer, batch: tuple[int, int], compiled: bool = False) -> Trials:
    """Plain code, then kernels, then what is between them compiled; results must be the same but for 5 % of their norm.

    Args:
        device: where the model is.
        model: a model of any size.
        batch: rows and tokens that it reads and learns from.
        compiled: whether the last is asked for.
    """
    rows, tokens = batch
    text = torch.randint(model.config.vocab_size, (rows, tokens + 1), device=device)
    half = type(model)(model.config).to(device, torch.bfloat16)
    half.load_state_dict(model.state_dict())

    def learn(model: InfiniTransformer) -> Tensor:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            losses, _ = model(text[:, :-1], targets=text[:, 1:])
        return torch.autograd.grad(losses.mean(), list(model.parameters()))[0]

    @torch.no_grad()
    def read(model: InfiniTransformer) -> Tensor:
        _, state = model(text[:, : tokens // 2], keep="none")
        return model(text[:, tokens // 2 : tokens], state, keep="last")[0]

    ways = [("torch", False), ("triton", False), *([("triton", True)] if compiled else [])]
    for what, given, call in (("training step", model, learn), ("reading", half, read)):
        plain = None
        for backend, compile in ways:

            def prepare(given=given, call=call, backend=backend, compile=compile) -> Callable[[], object]:
                given.memory_backend, tried = "torch", given
                expected = call(given).double()
                if compile:
                    torch._dynamo.reset()  # graphs of other models
                    tried = copy.deepcopy(given)
                    tried.enable_compile()
                tried.memory_backend = backend
                apart = float((call(tried).double() - expected).norm() / expected.norm())
                if not apart < CLOSE:
                    raise AssertionError(f"the backends are {apart:.1%} apart")
                return functools.partial(call, tried)

            facts = {"part": "shipped", "what": what, "backend": backend, "batch": list(batch), "model": model.config.to_dict()}
            row = yield Trial(facts | ({"compiled": True} if compile else {}), prepare, rows * tokens, against=plain)
            if "milliseconds" in row and backend == "torch":
                plain = ("torch", row["milliseconds"])
