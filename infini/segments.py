"""Where every token of one call stands: its document, its segment and its slot there.

A call brings `tokens` new tokens per row, after an open segment of `open_length` tokens that the state carries. The plan
says which segments they make, which of those are full and so get written, where a document begins, and how far back each
token may look. It is made once per call, on the CPU, and every layer follows it.

Two layouts occur:

    line   [batch, history + tokens]            what the state carries of the recent text, then the new tokens
    grid   [batch, segments, segment_length]    the same tokens, each in its segment; slots may stay empty

Rows in which all counts agree (`uniform`, the usual case) go from line to grid by padding and a view. Otherwise, with
documents that begin inside a row or rows of different length, an index moves them. In both, the real tokens of a segment fill
its slots from the left, so causality alone hides the empty ones. The kernels of the memory stay in the line:
`reads` and `writes` tell them where each segment begins and ends there.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor


class SegmentPlan:
    """The places of one call's tokens. Attributes are plain numbers or tensors that all layers share.

    Args:
        tokens: new tokens per row.
        segment_length: slots of a segment.
        span: how far local attention reaches, itself included (`InfiniConfig.span`).
        sliding: local attention crosses segment borders.
        open_length: int64 `[batch]` on the CPU, tokens of the open segment before the call.
        tokens_seen: int64 `[batch]` on the CPU, tokens of the document before the call.
        empty: bool `[batch]` on the CPU, nothing has been written for this document.
        history: tokens that the state carries in front of the new ones: 0 or span - 1.
        lengths: int64 `[batch]` on the CPU, real tokens of each row (they come first); None: all.
        reset: bool `[batch, tokens]` on the CPU, a document begins at this token; None: nowhere.
        device: where the model computes.
    """

    def __init__(
        self,
        tokens: int,
        segment_length: int,
        span: int,
        sliding: bool,
        open_length: Tensor,
        tokens_seen: Tensor,
        empty: Tensor,
        history: int,
        lengths: Tensor | None,
        reset: Tensor | None,
        device: torch.device,
    ):
        self.tokens, self.segment_length, self.span, self.sliding = tokens, segment_length, span, sliding
        self.history, self.device, self.batch = history, device, len(open_length)
        # Of rows that differ, for the kernels: int32 `[batch, segments, 2]`, the first token of each segment and the one behind its
        # last; among the new tokens, and among the line's where it is written (an empty stretch where it is not).
        self.reads: Tensor | None = None
        self.writes: Tensor | None = None
        self.padded = False
        self.real: Tensor | None = None
        """bool `[batch, tokens]`, True at tokens, None where all are: what is behind a row's length is none."""
        self.uniform = lengths is None and reset is None and _all_equal(open_length) and _all_equal(tokens_seen)
        # Place of each new token in its document `[batch, tokens]`; None where no document begins inside the call.
        self.in_document: Tensor | None = None
        if self.uniform:
            self._plan_uniform(int(open_length[0]), int(tokens_seen[0]), empty)
        else:
            self._plan_ragged(open_length, tokens_seen, empty, lengths, reset)

    @functools.cached_property
    def seen_by_one(self) -> Tensor:
        """What a single new token sees of the line, bool `[batch or 1, 1, 1, history + 1]`; the same in every layer."""
        places = torch.arange(self.history + 1, device=self.device)
        return (places >= self.earliest)[:, None, None]

    def _plan_uniform(self, opened: int, seen: int, empty: Tensor) -> None:
        n, total = self.segment_length, opened + self.tokens
        self.opened, self.visible = opened, min(seen, self.history)
        self.segments = -(-total // n)
        full = torch.arange(1, self.segments + 1) * n <= total
        self._follow(full.expand(self.batch, -1), None, empty)
        self.open_length = torch.full((self.batch,), total % n)
        self.tokens_seen = torch.full((self.batch,), seen + self.tokens)
        # Positions of the line, and the first index of the line that each new token may see.
        start = seen if self.sliding else opened
        positions = torch.arange(start - self.history, start + self.tokens, device=self.device)
        self.positions = (positions if self.sliding else positions % n).unsqueeze(0)
        place = torch.arange(self.tokens, device=self.device)
        if self.sliding:
            document = self.history - self.visible
            self.earliest = (self.history + place - self.span + 1).clamp(min=document).unsqueeze(0)
        else:
            self.earliest = (self.history + place - (opened + place) % n).unsqueeze(0)

    def _plan_ragged(
        self, open_length: Tensor, tokens_seen: Tensor, empty: Tensor, lengths: Tensor | None, reset: Tensor | None
    ) -> None:
        n, rows = self.segment_length, torch.arange(self.batch)
        lengths = torch.full((self.batch,), self.tokens) if lengths is None else lengths
        reset = torch.zeros(self.batch, self.tokens, dtype=torch.bool) if reset is None else reset
        place = torch.arange(self.tokens).expand(self.batch, -1)
        real = place < lengths[:, None]
        reset = reset & real
        # The latest document start at or before each token; -1 while the document of the state goes on.
        begun = torch.where(reset, place, -1).cummax(dim=1).values
        in_document = torch.where(begun < 0, tokens_seen[:, None] + place, place - begun)
        if bool(reset.any()):
            self.in_document = in_document.to(self.device)
        in_segments = torch.where(begun < 0, open_length[:, None] + place, in_document)
        slot = in_segments % n
        # A segment begins at slot 0, or where a document interrupts an open one (a reset is always at slot 0).
        segment = (slot == 0).long().cumsum(dim=1) - 1 + ((open_length > 0) & ~reset[:, 0]).long()[:, None]
        self.segments = max(1, int(segment[real].max()) + 1) if bool(real.any()) else 1

        continues = ~reset[:, 0]
        count = torch.zeros(self.batch, self.segments, dtype=torch.long)
        count.scatter_add_(1, segment.clamp(max=self.segments - 1), real.long())
        stretches = torch.stack([count.cumsum(dim=1) - count, count.cumsum(dim=1)], dim=2)
        self.reads = self._send(stretches.int())
        self.padded = bool((lengths < self.tokens).any())
        opened = torch.where(continues, open_length, 0)
        count[:, 0] += opened
        stretches = stretches + self.history
        stretches[:, 0, 0] -= opened
        stretches[..., 1] = torch.where(count == n, stretches[..., 1], stretches[..., 0])
        self.writes = self._send(stretches.int())
        fresh = torch.zeros(self.batch, self.segments, dtype=torch.long)
        fresh.scatter_add_(1, segment.clamp(max=self.segments - 1), reset.long())
        self._follow(count == n, fresh > 0, empty)

        last = (lengths - 1).clamp(min=0)
        some = lengths > 0
        self.open_length = torch.where(some, (in_segments[rows, last] + 1) % n, open_length)
        self.tokens_seen = torch.where(some, in_document[rows, last] + 1, tokens_seen)

        h = self.history
        back = torch.arange(h) - h
        old = (tokens_seen if self.sliding else open_length)[:, None] + back
        self.positions = torch.cat([old, in_document if self.sliding else slot], dim=1).to(self.device)
        if self.sliding:
            earliest = (h + place - in_document).clamp(min=0).maximum(h + place - self.span + 1)
        else:
            earliest = h + place - slot
        # What is not a token looks at itself alone, so that no softmax is over nothing.
        self.earliest = torch.where(real, earliest, h + place).to(self.device)
        self.real = None if bool(real.all()) else real.to(self.device)

        # Line to grid: where each entry of the line goes; what has no place goes to one slot behind the last.
        nowhere = self.segments * n
        into = torch.where(real, segment * n + slot, nowhere)
        carried = torch.where((back + open_length[:, None] >= 0) & continues[:, None], back + open_length[:, None], nowhere)
        self._index = torch.cat([carried, into], dim=1).to(self.device)
        # The recent text after the call: the last entries of the line that are real.
        # Without a carried history a row may be shorter than what is kept: zeros stand in front then.
        kept = self.span - 1
        self._missing = kept - h
        self._recent = (lengths[:, None] + torch.arange(kept)).to(self.device)
        self._lengths = lengths

    def _follow(self, full: Tensor, fresh: Tensor | None, empty: Tensor) -> None:
        """Follow each row's memory through the segments: which are written, and before which it holds something."""
        if fresh is None:
            before = full.long().cumsum(dim=1) - full.long()
            has_memory = ~empty[:, None] | (before > 0)
            self.empty = empty & ~full.any(dim=1)
        else:
            has = []
            for s in range(self.segments):
                empty = empty | fresh[:, s]
                has.append(~empty)
                empty = empty & ~full[:, s]
            has_memory, self.empty = torch.stack(has, dim=1), empty
        self.any_written, self.any_memory = bool(full.any()), bool(has_memory.any())
        # None where the mask would say nothing: then no kernel is spent on it.
        self.written = None if bool(full.all()) else self._send(full)
        self.has_memory = None if bool(has_memory.all()) else self._send(has_memory)
        self.fresh = None if fresh is None or not bool(fresh.any()) else self._send(fresh)

    def _send(self, mask: Tensor) -> Tensor:
        """A mask or table on the device. From pinned memory: any other copy makes the host wait for all kernels before it."""
        if self.device.type == "cuda":
            return mask.contiguous().pin_memory().to(self.device, non_blocking=True)
        return mask.to(self.device)

    def line_to_grid(self, line: Tensor) -> Tensor:
        """Put `[batch, history + tokens, ...]`, or the new tokens alone, into `[batch, segments, segment_length, ...]`."""
        new_only = line.shape[1] == self.tokens
        n, size = self.segment_length, self.segments * self.segment_length
        if self.uniform:
            if new_only and self.opened:
                line = _pad_tokens(line, self.opened, 0)
            elif not new_only:
                line = line[:, self.history - self.opened :]
            line = _pad_tokens(line, 0, size - line.shape[1])
            return line.unflatten(1, (self.segments, n))
        index = self._index[:, self.history :] if new_only else self._index
        grid = line.new_zeros(line.shape[0], size + 1, *line.shape[2:])
        grid = grid.scatter(1, _widen(index, line), line)
        return grid[:, :size].unflatten(1, (self.segments, n))

    def grid_to_line(self, grid: Tensor) -> Tensor:
        """Take the new tokens `[batch, tokens, ...]` out of the grid."""
        grid = grid.flatten(1, 2)
        if self.uniform:
            return grid[:, self.opened : self.opened + self.tokens]
        # An entry without a place reads any slot; nobody looks at it.
        index = self._index[:, self.history :].clamp(max=grid.shape[1] - 1)
        return grid.gather(1, _widen(index, grid))

    def recent(self, line: Tensor) -> Tensor:
        """The last `span - 1` real entries of `[batch, history + tokens, ...]`, right-aligned: what the state carries on."""
        kept = self.span - 1
        if self.uniform:
            line = line[:, max(0, line.shape[1] - kept) :]
            return _pad_tokens(line, kept - line.shape[1], 0)
        line = _pad_tokens(line, self._missing, 0)
        return line.gather(1, _widen(self._recent, line))


    def latest(self, line: Tensor, count: int) -> Tensor:
        """The last `count` real entries of `[batch, count + tokens, ...]`, zeros for those of an earlier document."""
        if self.uniform:
            return line[:, line.shape[1] - count :]
        places = torch.arange(count)
        kept = line.gather(1, _widen((self._lengths[:, None] + places).to(self.device), line))
        if self.in_document is None:
            return kept
        same = (count - 1 - places < self.tokens_seen[:, None]).to(self.device)
        return kept * same.reshape(*same.shape, *[1] * (line.dim() - 2))


def _all_equal(counts: Tensor) -> bool:
    return bool((counts == counts[0]).all())


def _pad_tokens(x: Tensor, left: int, right: int) -> Tensor:
    """Zeros before and after axis 1."""
    return F.pad(x, (0, 0) * (x.dim() - 2) + (left, right)) if left or right else x


def _widen(index: Tensor, like: Tensor) -> Tensor:
    """Repeat `[batch, tokens]` over the trailing axes of `like`, for gather and scatter."""
    return index.reshape(*index.shape, *[1] * (like.dim() - 2)).expand(*index.shape, *like.shape[2:])
