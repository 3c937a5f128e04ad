"""Attention within reach alone: windows and packed documents by the kernel made for them, beside bands of queries under a mask."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from infini.bench.attend import COMPARED, Stretch, direction
from infini.bench.clock import LEAD
from infini.bench.memory import Shape
from infini.bench.trial import Trial, Trials
from infini.bench.work import Work, attention
from infini.kernels.choice import LARGEST_LOCAL_HEAD, why_not_local
from infini.local import banded, local_attention
from infini.segments import SegmentPlan
from infini.testing import assert_witnessed

WAYS = ("bands", "triton")


@dataclass(frozen=True)
class Reach(Stretch):
    """`rows` texts of `tokens` tokens, or documents of `document` tokens on average packed into them, in segments or in a window."""

    document: int = 0

    @classmethod
    def all_of(cls, shape: Shape) -> Iterator["Reach"]:
        """What a shape of the memory's rows asks for, but segments of rows that are alike: these need no mask."""
        size = (shape.rows, shape.tokens, shape.heads, shape.groups, shape.head_dim)
        yield cls(*size, window=shape.segment_length, document=shape.document)
        if shape.document:
            yield cls(*size, segment_length=shape.segment_length, document=shape.document)

    def plan(self, device: torch.device) -> SegmentPlan:
        """Rows from the start of their texts; documents begin anywhere."""
        zeros, span, begins = torch.zeros(self.rows, dtype=torch.long), self.window or self.segment_length, None
        if self.document:
            drawn = torch.rand(self.rows, self.tokens, generator=torch.Generator().manual_seed(0))
            begins = (drawn < 1 / self.document) | (torch.arange(self.tokens) == 0)
        return SegmentPlan(
            tokens=self.tokens, segment_length=span, span=span, sliding=self.window is not None, open_length=zeros, tokens_seen=zeros,
            empty=zeros == 0, history=0, lengths=None, reset=begins, device=device,
        )  # fmt: skip

    def inputs(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Random q, k, v in bf16; segments, which may begin anywhere, stay in their rows."""
        few, many = (self.rows, self.tokens, self.groups, self.head_dim), (self.rows, self.tokens, self.heads, self.head_dim)
        return tuple(torch.randn(size, device=device, dtype=torch.bfloat16) for size in (many, few, few))

    def work(self, gradient: bool) -> Work:
        """Bytes as of any attention; FLOP of the pairs that see each other."""
        size = (self.rows * self.tokens, 1, self.heads, self.groups, self.head_dim)
        seen = (torch.arange(self.tokens) + 1 - self.plan(torch.device("cpu")).earliest).expand(self.rows, -1)
        return Work(attention(*size, gradient).bytes, (3 if gradient else 1) * 4 * int(seen.sum()) * self.heads * self.head_dim)


def attend_by(way: str, q: Tensor, k: Tensor, v: Tensor, plan: SegmentPlan) -> Tensor:
    """One of `WAYS`; `triton` raises InputError where it cannot run."""
    return banded(q, k, v, plan, "sdpa") if way == "bands" else local_attention(q, k, v, plan, way)


def trials(reach: Reach, device: torch.device, part: str) -> Trials:
    """Every way that can, forward and with the gradient; the kernel over the bands."""
    able = why_not_local(device, torch.bfloat16) is None and reach.head_dim <= LARGEST_LOCAL_HEAD
    plan = reach.plan(device)
    for gradient in (False, True):
        bands = None
        for way in WAYS if able else WAYS[:1]:

            def prepare(way: str = way, gradient: bool = gradient) -> Callable[[], object]:
                inputs = reach.inputs(device)
                assert_right(way, *inputs, plan)
                if not gradient:
                    return lambda: attend_by(way, *inputs, plan)
                for x in inputs:
                    x.requires_grad_()
                along = torch.randn_like(inputs[0])
                return lambda: torch.autograd.grad(attend_by(way, *inputs, plan), inputs, along)

            facts = {"part": part, "what": "attention within reach", "kernel": way, "direction": direction(gradient), "shape": asdict(reach)}
            row = yield Trial(facts, prepare, reach.rows * reach.tokens, reach.work(gradient), bands, lead=LEAD)
            if way == "bands" and "milliseconds" in row:
                bands = (way, row["milliseconds"])


def assert_right(way: str, q: Tensor, k: Tensor, v: Tensor, plan: SegmentPlan) -> None:
    """Assert output and gradients of the first, middle and last queries of the first and last row, by the rule of `infini.testing`.

    No other query has a gradient here, so those of keys and values come from these alone.
    """
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = attend_by(way, *leaves, plan)
    earliest = plan.earliest.expand(len(q), -1)
    for row in {0, len(q) - 1}:
        for start in {0, plan.tokens // 2, max(0, plan.tokens - COMPARED)}:
            queries = slice(start, min(start + COMPARED, plan.tokens))
            first = int(earliest[row, start])
            keys = slice(first, queries.stop)
            along = torch.zeros_like(out)
            along[row, queries] = torch.randn_like(out[row, queries])
            fast = (out, *torch.autograd.grad(out, leaves, along, retain_graph=True))
            fast = [x[row, stretch] for x, stretch in zip(fast, (queries, queries, keys, keys), strict=True)]
            given = (q[row, queries], k[row, keys], v[row, keys], earliest[row, queries] - first, along[row, queries])
            plain, true = (_written_out(*given, dtype) for dtype in (q.dtype, torch.float64))
            for name, *found in zip(("output", "dq", "dk", "dv"), fast, plain, true, strict=True):
                # Averages over many values are small: their own size is the measure.
                size = found[-1].abs().max()
                assert_witnessed(f"{way}: {name}, row {row}, queries from {start}", *(x.double() / size for x in found), q.dtype)


def _written_out(q: Tensor, k: Tensor, v: Tensor, earliest: Tensor, along: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Softmax attention of the last queries of one row `[tokens, heads, d]` and its gradients."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
    key, group = torch.arange(len(k), device=q.device), q.shape[1] // k.shape[1]
    seen = (key >= earliest[:, None]) & (key <= key[-len(q) :, None])
    mine, keys, values = (x.transpose(0, 1) for x in leaves)
    keys, values = (x.repeat_interleave(group, dim=0) for x in (keys, values))
    scores = (mine @ keys.transpose(1, 2)) * q.shape[-1] ** -0.5
    out = (scores.masked_fill(~seen, float("-inf")).softmax(dim=-1) @ values).transpose(0, 1)
    return [out.detach(), *torch.autograd.grad(out, leaves, along.to(dtype))]
