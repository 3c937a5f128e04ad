"""Long gap: learn to answer across a text that is far too long to back-propagate through.

The text before the gap and the questions behind it are read with gradient; the gap, filler of up to thousands of segments,
is read without. So the questions meet the states of long texts for the price of a forward pass. The gradient crosses the
gap where it is sure to be right and cheap: along what the memory of each layer still holds of the text before. Over the
whole gap that is one affine map,

    M_after = A M + B,    A = A_k ... A_2 A_1    (identity for ``linear``),

and the state goes on with the values of the gap's end and the gradient of the map alone (sg: no gradient through it):

    M' = sg(A) M + sg(M_after - A M),    z' = z + sg(z_after - z).

What is left out: that the text before also changes what the filler's tokens compute, and through z the map itself.
Recent keys, values and counters are those of the gap's end.

A gap of which only the last segments are read is stretched, see :mod:`infini.train.stretch`: so the read-out meets the noise
of a million tokens for the price of some thousand. Its noise is that of real filler, in M and z together.

So far training learns to read in spite of what filler writes; what it writes does not learn. Where the last segments of the gap are
read with gradient (`gradient_segments`), their writes learn too, and each as often as it counts:

    M' = M + t (M_after - M),    dM' = dM + t d(M_after).

This is for ``linear``, where it is the whole gradient of repeated filler as far as filler does not depend on the memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch

from infini.data.batch import Batch
from infini.errors import InputError
from infini.memory import MemoryState
from infini.state import InfiniState
from infini.train.loss import LossSums, loss_of_span
from infini.train.stretch import stretch

# Tokens of a gap that are read at a time, in all rows together.
READ_TOKENS = 65536


class Crossing(NamedTuple):
    """A gap that was read: the state at its end, and A `[rows, kv_heads, k, k]` per layer (None: identity or no memory)."""

    end: InfiniState
    maps: tuple[torch.Tensor | None, ...]


def gap_loss_of(model: Callable, batch: Batch, read_segments: int | None = None, gradient_segments: int | None = None) -> LossSums:
    """:func:`infini.train.loss.loss_of` for a batch with a gap.

    The value is that of all tokens read in one text; the gradient ends at the gap but for each memory's direct path, and for
    what the gap's last ``gradient_segments`` write.

    Args:
        model: called as ``model(tokens, targets=...)``, ``model(tokens, state, targets=...)`` and
            ``model(tokens, state, keep="none", maps=...)``, see :class:`infini.InfiniTransformer`.
        batch: on the model's device, with a gap.
        read_segments, gradient_segments: most segments of a gap that are read, and that are read with gradient, see :func:`cross`.

    Raises:
        InputError: the gap does not stand on a segment border of the model, or the model has no such state.
    """
    border = batch.gap.position * batch.segment_length
    before, state = loss_of_span(model, batch, 0, border)
    state = carry_on(state, cross(model, batch, state, read_segments, gradient_segments))
    after, _ = loss_of_span(model, batch, border, batch.tokens.shape[1] - 1, state)
    return before.plus(after)


def cross(
    model: Callable, batch: Batch, state: InfiniState, read_segments: int | None = None, gradient_segments: int | None = None
) -> Crossing:
    """Read the batch's gap after ``state`` without gradient to it, at most `READ_TOKENS` tokens at a time, or as many as the
    batch has if that is more.

    Memory does not depend on the gap's length: its pieces are made when they are read, and of a piece only the
    state and A stay.

    Of a gap of k segments, more than ``read_segments``, the last r are read and count t times, t as small as may be and
    r = k / t rounded, see :func:`infini.train.stretch.stretch`. None: all are read.

    Of those that are read the last ``gradient_segments``, at one time, have gradient to the parameters, through what they
    write and leave; None, or in a call without gradient: none of them.
    """
    if not isinstance(state, InfiniState):
        raise InputError(
            f"a batch has a long gap, but the model carries a {type(state).__name__} and not an InfiniState: "
            "use an InfiniTransformer or a task without gaps"
        )
    if read_segments is not None and read_segments < 1:
        raise InputError(f"read_segments is {read_segments}; at least 1 segment of a gap must be read, or None for all")
    n, border = batch.segment_length, batch.gap.position * batch.segment_length
    if bool(state.open_length.any()):
        raise InputError(
            f"the gap stands before token {border}, {int(state.open_length.max())} tokens into a segment of the model; "
            f"it must stand on a segment border: give the task (now {n}) and the model the same segment_length"
        )
    product, first = None, state.detach()
    # Long gaps come with few rows, which read as many tokens at a time as a full batch would.
    length, most = batch.gap.segments * n, max(batch.segments, READ_TOKENS // (len(batch.tokens) * n)) * n
    times = 1 if read_segments is None else -(-batch.gap.segments // read_segments)
    read = round(batch.gap.segments / times)
    learned = min(read, gradient_segments or 0) if torch.is_grad_enabled() else 0
    pieces = [(start, min(start + most, length - learned * n)) for start in range(length - read * n, length - learned * n, most)]
    state = first
    for start, stop in pieces + [(length - learned * n, length)] * (learned > 0):
        maps: dict = {}
        with torch.set_grad_enabled(learned > 0 and stop == length):
            _, state = model(batch.gap.piece(start, stop), state, keep="none", maps=maps)
        if learned:
            require_linear(maps["update_rule"])
        layers = maps["layers"]
        product = layers if product is None else [_then(*pair) for pair in zip(product, layers, strict=True)]
    return Crossing(state, tuple(product)) if times == 1 else _stretched(maps["update_rule"], first, state, product, times)


def require_linear(rule: str) -> None:
    """An `InputError` for rules in which a write depends on what is held: their later turns have another gradient than the first."""
    if rule != "linear":
        raise InputError(
            f"gap_gradient_segments is set, but in the update rule {rule} what filler writes depends on what the memory holds, and its "
            "gradient changes from turn to turn: set gap_gradient_segments=null, or use linear"
        )


def carry_on(state: InfiniState, crossing: Crossing) -> InfiniState:
    """The state at the gap's end, with the gradient of the direct path to ``state``, the one before the gap."""
    layers = tuple(
        end if end.memory is None else replace(end, memory=_carried(layer.memory, end.memory, carried))
        for layer, end, carried in zip(state.layers, crossing.end.layers, crossing.maps, strict=True)
    )
    return replace(crossing.end, layers=layers)


def _stretched(rule: str, first: InfiniState, end: InfiniState, maps: list[torch.Tensor | None], times: int) -> Crossing:
    layers, powers = [], []
    for before, after, carried in zip(first.layers, end.layers, maps, strict=True):
        if after.memory is not None:
            memory, carried = stretch(rule, before.memory, after.memory, carried, times)
            after = replace(after, memory=memory)
        layers.append(after)
        powers.append(carried)
    return Crossing(replace(end, layers=tuple(layers)), tuple(powers))


def _carried(memory: MemoryState, end: MemoryState, carried: torch.Tensor | None) -> MemoryState:
    matrix = memory.matrix if carried is None else carried @ memory.matrix
    normalizer = None if end.normalizer is None else _with_gradient_of(end.normalizer, memory.normalizer)
    return MemoryState(_with_gradient_of(end.matrix, matrix), normalizer)


def _with_gradient_of(value: torch.Tensor, path: torch.Tensor) -> torch.Tensor:
    """``path + sg(value - path)``, written so that not one bit of ``value`` is lost in the difference."""
    return value + (path - path.detach())


def _then(first: torch.Tensor | None, second: torch.Tensor | None) -> torch.Tensor | None:
    """The map of two pieces in a row; None is the identity."""
    return second if first is None else first if second is None else second @ first
