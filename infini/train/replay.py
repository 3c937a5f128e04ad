"""Exact back-propagation through rows of any length while the activations of one group of segments are held.

All that crosses a segment border is the state. So a row can be read without gradient, keeping only states; then the groups
of segments are taken from the last to the first: read again, now with gradient, from the state kept before it; its loss and
the gradient of the state behind it are propagated back to the parameters and to the state before it. The gradient is that of
the parallel schedule, for one more forward pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from infini.data.batch import Batch
from infini.errors import InputError
from infini.state import LayerTensors, StreamState
from infini.train.long_gap import Crossing, carry_on, cross
from infini.train.loss import LossSums, loss_of_span, read_span

Span = tuple[int, int]


@dataclass(frozen=True)
class Replay:
    """A schedule for :func:`infini.train.step.take_step` that holds the activations of one group of segments.

    Memory beside parameters and the row's tokens: activations of ``group`` segments, and states, one for each group
    (``every``) or some ``2 sqrt(groups)`` (``sqrt``). Passes per token: one backward, and one (``every``) or two (``sqrt``)
    forward passes beside that of the parallel schedule; none more where ``bptt_segments == group``.

    Attributes:
        segment_length: of the model.
        group: segments whose activations are held at a time.
        bptt_segments: the gradient stops at every ``bptt_segments``-th segment border from the row's start, so it flows
            through at most so many segments and from a loss to none before the last such border. A multiple of ``group``.
            None: through the whole row. A gap counts nothing.
        checkpoints: ``every`` or ``sqrt``, which groups' states are kept.
        gap_read_segments: most segments of a gap that are read, see :func:`infini.train.long_gap.cross`.
    """

    segment_length: int
    group: int
    bptt_segments: int | None = None
    checkpoints: str = "every"
    gap_read_segments: int | None = None

    def __post_init__(self):
        if self.checkpoints not in ("every", "sqrt"):
            raise InputError(f"checkpoints is {self.checkpoints!r}; choose every or sqrt")
        for name in ("segment_length", "group"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.bptt_segments is not None and (self.bptt_segments < 1 or self.bptt_segments % self.group):
            raise InputError(f"bptt_segments is {self.bptt_segments}; it must be a multiple of group = {self.group}: gradients stop between groups")

    def loss(self, model: Callable, batch: Batch, state: StreamState | None = None) -> LossSums:
        """The batch's loss, group after group; without gradient, or it would hold everything after all."""
        total = None
        with torch.no_grad():
            for span in self._spans(batch):
                if self._follows_gap(batch, span):
                    state = cross(model, batch, state, self.gap_read_segments).end
                sums, state = loss_of_span(model, batch, *span, state)
                total = sums if total is None else total.plus(sums)
        return total

    def learn(
        self, model: Callable, batch: Batch, weigh: Callable[[LossSums], torch.Tensor], state: StreamState | None = None
    ) -> tuple[LossSums, StreamState]:
        """Add the gradient of ``weigh(sums)`` to the parameters.

        Args:
            model: see :func:`infini.train.long_gap.gap_loss_of`.
            batch: on the model's device, with or without a gap.
            weigh: makes the sums one number; must be linear in them, because it is taken group by group.
            state: what the model carries of the text before, detached; None at the start of a text.

        Returns:
            The batch's sums and the state behind it, detached.
        """
        total = None
        for block in self._blocks(batch):
            sums, state = self._learn_block(model, batch, weigh, block, state)
            total = sums if total is None else total.plus(sums)
        return total, state

    def _spans(self, batch: Batch) -> list[Span]:
        """First and last border of each group; a gap parts the group that it falls into."""
        end = batch.tokens.shape[1] - 1
        borders = {*range(0, end, self.group * self.segment_length), end}
        if batch.gap is not None:
            borders.add(batch.gap.position * batch.segment_length)
        borders = sorted(borders)
        return list(zip(borders, borders[1:], strict=False))

    def _blocks(self, batch: Batch) -> list[list[Span]]:
        """The groups, parted where the gradient stops."""
        if self.bptt_segments is None:
            return [self._spans(batch)]
        blocks: dict[int, list[Span]] = {}
        for span in self._spans(batch):
            blocks.setdefault(span[0] // (self.bptt_segments * self.segment_length), []).append(span)
        return list(blocks.values())

    def _learn_block(
        self,
        model: Callable,
        batch: Batch,
        weigh: Callable[[LossSums], torch.Tensor],
        spans: list[Span],
        state: StreamState | None,
    ) -> tuple[LossSums, StreamState]:
        """Gradients of the spans' losses from the detached ``state`` on; the sums and the detached state behind."""
        last = len(spans) - 1
        spacing = 1 if self.checkpoints == "every" else math.isqrt(last) + 1
        crossing: Crossing | None = None
        kept: dict[int, StreamState | None] = {}  # states before spans, and before the gap that they may follow
        for i, span in enumerate(spans):
            if i % spacing == 0:
                kept[i] = state
            if self._follows_gap(batch, span):
                crossing = cross(model, batch, state, self.gap_read_segments)
            if i < last:  # the last is read with gradient straight away
                state = self._read(model, batch, span, state, crossing)

        total, gradients, end = None, None, None
        while kept:
            first, state = kept.popitem()
            states = [state]
            for i in range(first, min(first + spacing, last + 1) - 1):
                states.append(self._read(model, batch, spans[i], states[-1], crossing))
            while states:
                i = first + len(states) - 1
                # Before the first span the gradient stops: there the text or the batch begins, or it is truncated.
                state, leaves = (states.pop(), []) if i == 0 else _leaves(states.pop())
                if self._follows_gap(batch, spans[i]):
                    state = carry_on(state, crossing)
                sums, after = loss_of_span(model, batch, *spans[i], state)
                if gradients is None:
                    end, gradients = _stored(after), []
                _propagate(weigh(sums), after, gradients)
                gradients = [leaf.grad for leaf in leaves]
                total = sums.detach() if total is None else total.plus(sums.detach())
                # What hangs on them and was not propagated to, such as the row's last write, would outlive its group.
                del state, after, sums
        return total, end

    @staticmethod
    def _follows_gap(batch: Batch, span: Span) -> bool:
        return batch.gap is not None and span[0] == batch.gap.position * batch.segment_length

    @torch.no_grad()
    def _read(
        self, model: Callable, batch: Batch, span: Span, state: StreamState | None, crossing: Crossing | None
    ) -> StreamState:
        """The state behind a span."""
        if self._follows_gap(batch, span):
            state = crossing.end
        return _stored(read_span(model, batch, *span, state, keep="none")[1])


def _stored(state: StreamState) -> StreamState:
    """A detached copy: the state itself may be a view into the activations of a whole group, which it would keep alive."""
    if not isinstance(state, StreamState):
        raise InputError(
            f"the model carries a {type(state).__name__} and not a StreamState; its gradient cannot be replayed: "
            "set replay_segments=null and bptt_segments=null"
        )
    return state.detach().clone()


def _leaves(state: StreamState) -> tuple[StreamState, list[torch.Tensor]]:
    """The state with tensors that collect gradients, and these tensors in order."""
    layers = tuple(layer.map(lambda x: x.detach().requires_grad_(x.is_floating_point())) for layer in state.layers)
    return replace(state, layers=layers), _tensors(layers)


def _tensors(layers: tuple[LayerTensors, ...]) -> list[torch.Tensor]:
    return [x for layer in layers for x in layer.tensors().values()]


def _propagate(loss: torch.Tensor, after: StreamState, gradients: list[torch.Tensor | None]) -> None:
    """Back-propagate a group's loss and the gradients of the state behind it, in the order of `_tensors`."""
    tensors = _tensors(after.layers) if gradients else []
    pairs = [(x, g) for x, g in zip(tensors, gradients, strict=True) if g is not None and x.requires_grad]
    torch.autograd.backward([loss, *(x for x, _ in pairs)], [None, *(g for _, g in pairs)])
