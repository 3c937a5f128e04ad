"""One training batch: the tokens, which are answers, where documents begin, and a long gap that the rows leave out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from infini.errors import InputError


@dataclass(frozen=True)
class Gap:
    """Whole segments of filler between two tokens of a batch's rows, told by their period.

    The filler is a text that repeats, so the gap takes no more room than one period: the token ``i`` of
    row ``r`` of the gap is ``filler[r, i % period]``. A period as long as the gap is a text that does
    not repeat. The gap is read, not predicted; only its first token takes the place of the token behind it
    as the one that follows the text before it.

    Attributes:
        position: the gap comes before token ``position * n`` of the rows; a segment border with text on
            both sides, ``0 < position < segments``.
        segments: length ``k`` of the gap in segments of ``n`` tokens, at least 1.
        filler: token ids ``[rows, period]``, any integer dtype.

    Example:
        >>> gap = Gap(position=1, segments=3, filler=torch.tensor([[7, 8, 9]], dtype=torch.uint8))
        >>> gap.piece(4, 8).tolist()  # tokens 4 to 7 of the gap
        [[8, 9, 7, 8]]
    """

    position: int
    segments: int
    filler: torch.Tensor

    def __post_init__(self):
        if self.position < 1 or self.segments < 1:
            raise InputError(
                f"a gap of {self.segments} segments at segment {self.position}; both must be at least 1: "
                "a batch without a gap has gap=None"
            )
        if self.filler.dim() != 2 or self.filler.shape[1] < 1 or self.filler.is_floating_point():
            raise InputError(
                f"a gap's filler is {self.filler.dtype} {list(self.filler.shape)}; it must be integers [rows, period]"
            )

    def piece(self, start: int, stop: int) -> torch.Tensor:
        """The tokens ``start`` to ``stop - 1`` of the gap, int64 ``[rows, stop - start]`` on the filler's device."""
        place = torch.arange(start, stop, device=self.filler.device) % self.filler.shape[1]
        return self.filler[:, place].long()


@dataclass(frozen=True)
class Batch:
    """Token rows of equal length, one longer than what the model reads.

    The model reads ``tokens[:, :-1]`` and predicts ``tokens[:, 1:]``, so the token at
    position ``t`` is predicted from the tokens up to ``t - 1``.

    Attributes:
        tokens: token ids ``[rows, S * n + 1]`` for ``S`` segments of ``n`` tokens; any integer
            dtype. ``uint8`` is the fast choice for byte models: an eighth of the bytes cross from
            worker to GPU, and :meth:`to` widens them on the device.
        answer: bool ``[rows, S * n + 1]``; True where the token is part of an answer that the text
            before it determines. ``answer[:, 0]`` is predicted by nothing and is ignored.
        segments: ``S``, the number of segments of each row; the gap does not count.
        gap: what stands between two of the segments but is not in ``tokens``; None: nothing.
        stream: the rows go on where those of the last batch of the same stream ended, and their first tokens are the last
            ones of that batch. None: they are texts of their own.
        reset: bool like ``answer``, True where a document begins: it sees nothing before it, and its first token is
            predicted by nothing. Where ``reset[:, 0]`` is False in the first batch of a stream, the text before is
            unknown. It stays on the CPU, where models plan by it. None: no document begins but those of the rows.

    Example:
        >>> bytes_ = torch.tensor([[104, 105, 33]], dtype=torch.uint8)
        >>> batch = Batch(bytes_, bytes_ == 33, segments=1)
        >>> batch.to("cpu").tokens.dtype
        torch.int64
        >>> batch.predicted_tokens
        2
    """

    tokens: torch.Tensor
    answer: torch.Tensor
    segments: int
    gap: Gap | None = None
    stream: int | None = None
    reset: torch.Tensor | None = None

    def __post_init__(self):
        if self.tokens.dim() != 2 or self.tokens.shape[1] < 2:
            raise ValueError(
                f"tokens must be [rows, at least 2], got shape {tuple(self.tokens.shape)}"
            )
        if self.answer.shape != self.tokens.shape or self.answer.dtype != torch.bool:
            raise ValueError(
                f"answer must be bool of shape {tuple(self.tokens.shape)}, "
                f"got {self.answer.dtype} of shape {tuple(self.answer.shape)}"
            )
        if self.reset is not None:
            self._check_reset(self.reset)
        if self.gap is not None:
            self._check_gap(self.gap)

    def _check_reset(self, reset: torch.Tensor) -> None:
        if reset.shape != self.tokens.shape or reset.dtype != torch.bool or reset.device.type != "cpu":
            raise InputError(
                f"reset is {reset.dtype} {list(reset.shape)} on {reset.device}; it must be bool {list(self.tokens.shape)} "
                "on the CPU"
            )
        if self.answer.device.type == "cpu" and bool((reset & self.answer)[:, 1:].any()):
            raise InputError("the first token of a document is an answer; nothing predicts it: answer later")

    def _check_gap(self, gap: Gap) -> None:
        if self.stream is not None or self.reset is not None:
            raise InputError("a batch with a gap has stream or reset; the rows around a gap are texts of their own")
        if gap.position >= self.segments:
            raise InputError(
                f"the gap is at segment {gap.position} of {self.segments}; text must follow it: "
                f"position can be 1 to {self.segments - 1}"
            )
        if len(gap.filler) != len(self.tokens):
            raise InputError(f"the gap has {len(gap.filler)} rows of filler, the batch {len(self.tokens)} rows")
        if (self.tokens.shape[1] - 1) % self.segments:
            raise InputError(
                f"rows of {self.tokens.shape[1]} tokens are not {self.segments} whole segments and one token: "
                "a gap needs whole segments"
            )
        # Asked of the CPU alone, where batches are made: a GPU would have to be waited for.
        border = gap.position * self.segment_length
        if self.answer.device.type == "cpu" and bool(self.answer[:, border].any()):
            raise InputError(
                f"token {border}, the first after the gap, is an answer; nothing predicts it: ask later in the row"
            )

    @property
    def segment_length(self) -> int:
        """Tokens of a segment, ``n``."""
        return (self.tokens.shape[1] - 1) // self.segments

    @property
    def predicted_tokens(self) -> int:
        """Number of tokens that the model is asked to predict."""
        first_ones = 0 if self.reset is None else int(self.reset[:, 1:].sum())
        return self.tokens.shape[0] * (self.tokens.shape[1] - 1) - first_ones

    def to(self, device: torch.device | str) -> Batch:
        """The batch on ``device`` with int64 tokens; widened after the copy, which does not wait.

        The filler stays as narrow as it is, :meth:`Gap.piece` widens what is read of it; ``reset`` stays where it is.
        """
        moved = self._map(lambda x: x.to(device, non_blocking=True))
        return replace(moved, tokens=moved.tokens.long())

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory, from which copies to a GPU do not block.

        ``DataLoader(pin_memory=True)`` calls it by this name.
        """
        pinned = self._map(torch.Tensor.pin_memory)
        return pinned if self.reset is None else replace(pinned, reset=self.reset.pin_memory())

    def _map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        gap = self.gap and replace(self.gap, filler=change(self.gap.filler))
        return replace(self, tokens=change(self.tokens), answer=change(self.answer), gap=gap)
