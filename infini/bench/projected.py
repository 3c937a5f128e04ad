"""Our whole layer with its projections, from hidden states to hidden states, as a model runs it under bf16 autocast."""

from collections.abc import Callable
from dataclasses import asdict

import torch
from torch import Tensor, nn

from infini.bench.agree import assert_agree
from infini.bench.attend import direction
from infini.bench.memory import MemoryCase, Shape
from infini.bench.trial import Trial
from infini.bench.work import HALF, Work, attention
from infini.bench.work import memory_part as memory_work
from infini.kernels.choice import choose_memory_backend
from infini.layers.rotary import rotary_table
from infini.local import choose_backend

# Segments are compared up to this length: fp64 scores of longer ones do not fit. Memory's part and local attention have been compared
# in the shape that is timed by the rows without projections.
COMPARED_SEGMENT = 2048
FULL = 4


def trial(case: MemoryCase, hidden: Tensor, backend: str, gradient: bool, against: tuple[str, float] | None = None) -> Trial:
    """One layer over the hidden states `[1, tokens, hidden_size]`; its gradient is that of hidden states and parameters."""
    shape, device = case.shape, case.device
    kernel = choose_backend("auto", device.type, torch.bfloat16)

    def prepare() -> Callable[[], object]:
        config = case.layer.config
        choose_memory_backend(
            backend, device, torch.bfloat16,
            update_rule=config.update_rule, feature_map=config.feature_map, head_dim=config.head_dim, traced=False,
        )  # fmt: skip
        assert_layer(shape, device, kernel, backend)
        return timed(layer_of(case, kernel, backend), case.layer, hidden, gradient)

    facts = {"part": "peers", "what": "layer with projections", "rule": shape.variant, "backend": backend, "kernel": kernel}
    facts |= {"direction": direction(gradient), "shape": asdict(shape)}
    return Trial(facts, prepare, shape.tokens, work(shape, case.layer.config.update_rule, gradient), against, counts_use=True)


def work(shape: Shape, update_rule: str, gradient: bool) -> Work:
    """Hidden states in and out, four projections' weights, and the products of all parts; what is between would stay inside.

    Example:
        >>> one = Shape(1, 1, 1, 1, 1, 16)
        >>> work(one, "linear", gradient=False).flop == 2 * 4 * 16 * 16 + 4 * 16 + 4 * 16 * 16
        True
    """
    tokens, size = shape.rows * shape.tokens, shape.heads * shape.head_dim
    weights = size * 2 * (shape.heads + shape.groups) * shape.head_dim
    flop = attention(tokens, shape.segment_length, shape.heads, shape.groups, shape.head_dim).flop
    flop += memory_work(tokens, shape.heads, shape.groups, shape.head_dim, update_rule).flop + 2 * tokens * weights
    forward = Work(2 * HALF * tokens * size + FULL * weights, flop)
    return forward + Work(3 * HALF * tokens * size + 2 * FULL * weights, 2 * flop) if gradient else forward


def layer_of(case: MemoryCase, kernel: str, backend: str) -> Callable[[Tensor], Tensor]:
    """The layer of a case by a kernel of local attention and a backend of the memory, from hidden states to hidden states."""
    config = case.layer.config
    dtype = next(case.layer.parameters()).dtype
    rotary = rotary_table(case.plan.positions, config.head_dim, config.rope_theta, dtype)
    return lambda x: case.layer(x, None, case.plan, rotary, kernel, memory_backend=backend)[0]


def assert_layer(shape: Shape, device: torch.device, kernel: str, backend: str) -> None:
    """Assert that three segments of the layer are right, output and gradients, by the rule of `infini.testing`.

    Raises:
        AssertionError: they are not.
    """
    length = min(shape.segment_length, COMPARED_SEGMENT)
    case = MemoryCase(Shape(1, 3 * length, length, shape.heads, shape.groups, shape.head_dim, shape.variant), device)
    hidden = torch.randn(1, 3 * length, shape.heads * shape.head_dim, device=device).to(torch.bfloat16)
    along = torch.randn_like(hidden)
    names = [name for name, _ in case.layer.named_parameters() if "proj" in name]

    def results(kernel: str, backend: str, exact: bool = False) -> dict[str, Tensor]:
        case.layer.to(torch.float64 if exact else torch.float32)
        x = hidden.to(torch.float64 if exact else hidden.dtype).requires_grad_()
        with torch.autocast(device.type, torch.bfloat16, enabled=not exact):
            y = layer_of(case, kernel, backend)(x)
        leaves = [x, *(case.layer.get_parameter(name) for name in names)]
        gradients = torch.autograd.grad(y, leaves, along.to(y.dtype))
        found = {f"gradient of {name}": g for name, g in zip(["hidden states", *names], gradients, strict=True)}
        return {"output": y.detach()} | found

    assert_agree(results(kernel, backend), results("eager", "torch"), results("eager", "torch", exact=True))


def timed(forward: Callable[[Tensor], Tensor], module: nn.Module, hidden: Tensor, gradient: bool) -> Callable[[], object]:
    """A call without arguments: `forward` of the hidden states under bf16 autocast, or the gradient of all that has one."""
    hidden = hidden.detach().requires_grad_(gradient)
    leaves = [hidden, *(p for p in module.parameters() if p.requires_grad)]

    def call() -> object:
        with torch.set_grad_enabled(gradient), torch.autocast(hidden.device.type, torch.bfloat16):
            y = forward(hidden)
        return torch.autograd.grad(y, leaves, y.detach(), allow_unused=True) if gradient else y

    return call
