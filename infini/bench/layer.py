"""Whole Infini-attention against local attention alone, and against attention over the whole text."""

from collections.abc import Callable
from dataclasses import asdict

import torch
from torch import Tensor

from infini.bench.attend import Stretch, assert_attends, best_kernel, direction, trials_of
from infini.bench.clock import LEAD
from infini.bench.memory import MemoryCase, Shape, memory_trial
from infini.bench.trial import Trial, Trials
from infini.bench.work import attention
from infini.bench.work import memory_part as memory_work
from infini.causal import KERNELS, attend

# Longer texts are timed behind a comparison at this length.
COMPARED_TOKENS = 131072


def trials(
    device: torch.device,
    tokens: int,
    segment_length: int,
    heads: int,
    head_dim: int,
    rules: tuple[str, ...],
    backends: tuple[str, ...],
    kernels: tuple[str, ...] = KERNELS,
    part: str = "layer",
) -> Trials:
    """Local attention by every kernel; then for each rule and backend the memory's part, and the whole over the fastest local one.

    The generator returns the rows of the whole.
    """
    stretch, whole = Stretch(1, tokens, heads, heads, head_dim, segment_length), []
    locals_ = yield from trials_of(stretch, device, part, kernels)
    for rule in rules:
        case = MemoryCase(Shape(1, tokens, segment_length, heads, heads, head_dim, rule), device)
        for backend in backends:
            for gradient in (False, True):
                kernel, took = best_kernel(locals_, gradient)
                yield memory_trial(part, case, backend, gradient, None)
                whole.append((yield whole_trial(part, case, backend, kernel, gradient, (f"local attention alone, {kernel}", took))))
        del case
    return whole


def full_trials(
    device: torch.device,
    lengths: tuple[int, ...],
    segment_length: int,
    heads: int,
    head_dim: int,
    rules: tuple[str, ...],
    backends: tuple[str, ...],
    kernels: tuple[str, ...] = KERNELS,
) -> Trials:
    """Forward over 4K to a million tokens: full causal attention by every kernel, then ours over the fastest of them."""
    agreed: dict[tuple[str, str], bool] = {}
    for tokens in lengths:
        full = yield from trials_of(Stretch(1, tokens, heads, heads, head_dim), device, "full", kernels, (False,))
        kernel, took = best_kernel(full, gradient=False)
        segments = Stretch(1, tokens, heads, heads, head_dim, min(segment_length, tokens))
        local, _ = best_kernel((yield from trials_of(segments, device, "full", kernels, (False,))), gradient=False)
        for rule in rules:
            for backend in backends:
                small = None
                if tokens > COMPARED_TOKENS and (rule, backend) not in agreed:
                    small = Shape(1, COMPARED_TOKENS, segment_length, heads, heads, head_dim, rule)
                case = MemoryCase(Shape(1, tokens, min(segment_length, tokens), heads, heads, head_dim, rule), device)
                trial = whole_trial(
                    "full", case, backend, local, False, (f"full attention, {kernel}", took), small, compare=tokens <= COMPARED_TOKENS
                )
                row = yield trial
                agreed[rule, backend] = "milliseconds" in row
                del case, trial


def whole_trial(
    part: str,
    case: MemoryCase,
    backend: str,
    kernel: str,
    gradient: bool,
    against: tuple[str, float] | None,
    compared: Shape | None = None,
    compare: bool = True,
) -> Trial:
    """Local attention by a kernel, then the memory's part by a backend.

    Args:
        compared: a shape at which the memory's part is compared first.
        compare: compare it in the case's own shape.
    """
    shape = case.shape

    def local(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        folded = (x.unflatten(1, (-1, shape.segment_length)).flatten(0, 1) for x in (q, k, v))
        return attend(kernel, *folded).unflatten(0, (shape.rows, -1)).flatten(1, 2)

    def prepare() -> Callable[[], object]:
        if compared is not None:
            MemoryCase(compared, case.device).agree(backend)
        if compare:
            case.agree(backend)
        q, k, v = (case.inputs[name].detach().unflatten(1, (-1, shape.segment_length)).flatten(0, 1) for name in "qkv")
        assert_attends(kernel, q, k, v)
        return case.timed(backend, gradient, local)

    facts = {"part": part, "what": "Infini-attention", "rule": shape.variant, "backend": backend, "kernel": kernel}
    facts |= {"direction": direction(gradient), "shape": asdict(shape)}
    tokens = shape.rows * shape.tokens
    near = attention(tokens, shape.segment_length, shape.heads, shape.groups, shape.head_dim, gradient)
    far = memory_work(tokens, shape.heads, shape.groups, shape.head_dim, case.layer.config.update_rule, gradient)
    # In one kernel the local output would stay inside, and q, k, v be read once.
    return Trial(facts, prepare, tokens, type(near)(near.bytes, near.flop + far.flop), against, lead=LEAD)
