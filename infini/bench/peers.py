"""Our layer beside what others publish, in one run: the gated delta rule of flash-linear-attention, and a module that the user names.

Attention alone, the memory's part and both together are as in part `layer`; the operator of flash-linear-attention stands beside both
together, since it takes the same queries, keys and values. A module of somebody else's has projections of its own: it stands beside our
layer with projections, on the same hidden states. `infini.bench.foreign` says what it must be.
"""

import torch

from infini.bench import foreign, gated_delta, layer, projected
from infini.bench.attend import direction
from infini.bench.memory import MemoryCase, Shape
from infini.bench.trial import Row, Trials, fastest
from infini.causal import KERNELS


def trials(
    device: torch.device,
    tokens: int,
    segment_length: int,
    heads: int,
    head_dim: int,
    rules: tuple[str, ...],
    backends: tuple[str, ...],
    kernels: tuple[str, ...] = KERNELS,
    peer: str | None = None,
) -> Trials:
    """Ours as in part `layer`, the gated delta rule; with `peer` our layers with projections, and that module."""
    size = (tokens, segment_length, heads, head_dim)
    whole = yield from layer.trials(device, *size, rules, backends, kernels, part="peers")
    for gradient in (False, True):
        yield gated_delta.trial(device, tokens, heads, head_dim, gradient, _fastest(whole, gradient))
    if peer is None:
        return
    hidden = torch.randn(1, tokens, heads * head_dim, device=device).to(torch.bfloat16)
    ours: list[Row] = []
    for rule in rules:
        case = MemoryCase(Shape(1, tokens, segment_length, heads, heads, head_dim, rule), device)
        for backend in backends:
            if backend != "compiled":  # whether a model's parts are compiled is another choice
                for gradient in (False, True):
                    ours.append((yield projected.trial(case, hidden, backend, gradient)))
        del case
    shape = Shape(1, tokens, segment_length, heads, heads, head_dim)
    for gradient in (False, True):  # last: what fails on a GPU may take the rest with it
        yield foreign.trial(peer, shape, device, hidden, gradient, _fastest(ours, gradient))


def _fastest(rows: list[Row], gradient: bool) -> tuple[str, float] | None:
    """Name and milliseconds of the fastest of our rows of a direction; None where none ran."""
    row = fastest([row for row in rows if row["direction"] == direction(gradient)])
    return None if row is None else (f"{row['what']}, {row['rule']}, {row['backend']}", row["milliseconds"])
