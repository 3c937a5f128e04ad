"""Causal attention alone, by every kernel that is there: inside segments, in a window, over the whole text."""

from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from infini.bench.clock import LEAD
from infini.bench.trial import Row, Trial, Trials, fastest
from infini.bench.work import attention
from infini.causal import KERNELS, attend, why_not
from infini.errors import InputError
from infini.testing import assert_witnessed

# Queries at the beginning and at the end of the first and of the last row that are compared: a text of a million tokens has
# too many scores for all.
COMPARED = 16


@dataclass(frozen=True)
class Stretch:
    """`rows` texts of `tokens` tokens, attended in segments, in a sliding window, or whole."""

    rows: int
    tokens: int
    heads: int
    groups: int
    head_dim: int
    segment_length: int | None = None
    window: int | None = None

    def inputs(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Random q, k, v in bf16; segments stand in the batch."""
        length = self.segment_length or self.tokens
        rows = self.rows * self.tokens // length
        few, many = (rows, length, self.groups, self.head_dim), (rows, length, self.heads, self.head_dim)
        return tuple(torch.randn(size, device=device, dtype=torch.bfloat16) for size in (many, few, few))

    def work(self, gradient: bool):
        # In a window every token sees so many, in a segment half of them on average.
        reach = 2 * self.window - 1 if self.window else self.segment_length or self.tokens
        return attention(self.rows * self.tokens, reach, self.heads, self.groups, self.head_dim, gradient)


def trials_of(
    stretch: Stretch, device: torch.device, part: str, kernels: tuple[str, ...] = KERNELS, directions: tuple[bool, ...] = (False, True)
) -> Trials:
    """Every kernel that can, forward and with the gradient; the generator returns the rows."""
    rows: list[Row] = []
    for gradient in directions:
        for kernel in kernels:
            if why_not(kernel, device, torch.bfloat16, stretch.head_dim, stretch.window is not None):
                continue

            def prepare(kernel=kernel, gradient=gradient) -> Callable[[], object]:
                inputs = stretch.inputs(device)
                assert_attends(kernel, *inputs, stretch.window)
                if not gradient:
                    return lambda: attend(kernel, *inputs, stretch.window)
                for x in inputs:
                    x.requires_grad_()
                along = torch.randn_like(inputs[0])
                return lambda: torch.autograd.grad(attend(kernel, *inputs, stretch.window), inputs, along)

            facts = {"part": part, "what": "attention alone", "kernel": kernel, "direction": direction(gradient), "shape": asdict(stretch)}
            rows.append((yield Trial(facts, prepare, stretch.rows * stretch.tokens, stretch.work(gradient), lead=LEAD)))
    return rows


def best_kernel(rows: list[Row], gradient: bool) -> tuple[str, float]:
    """Name and milliseconds of the fastest kernel of a direction.

    Raises:
        InputError: no kernel ran.
    """
    row = fastest([row for row in rows if row["direction"] == direction(gradient)])
    if row is None:
        raise InputError("no attention kernel ran on this device: see the rows that failed")
    return row["kernel"], row["milliseconds"]


def direction(gradient: bool) -> str:
    """How a row calls it."""
    return "forward + backward" if gradient else "forward"


@torch.no_grad()
def assert_attends(kernel: str, q: Tensor, k: Tensor, v: Tensor, window: int | None = None) -> None:
    """Assert that a kernel attends, at the first and last queries of the first and last row, by the rule of `infini.testing`."""
    found = attend(kernel, q, k, v, window)
    length = q.shape[1]
    for row in {0, len(q) - 1}:
        for start in {0, max(0, length - COMPARED)}:
            stop = min(start + COMPARED, length)
            plain, true = (_written_out(q[row], k[row], v[row], start, stop, window, dtype) for dtype in (q.dtype, torch.float64))
            # Averages over many values are small: their own size is the measure.
            size = true.abs().max()
            fast, plain, true = (x / size for x in (found[row, start:stop].double(), plain.double(), true))
            assert_witnessed(f"{kernel}, row {row}, queries from {start}", fast, plain, true, q.dtype)


def _written_out(q: Tensor, k: Tensor, v: Tensor, start: int, stop: int, window: int | None, dtype: torch.dtype) -> Tensor:
    """Softmax attention of the queries `start` to `stop - 1` of one row `[tokens, heads, d]`, head by head."""
    query, key = torch.arange(start, stop, device=q.device)[:, None], torch.arange(stop, device=q.device)
    seen = key <= query if window is None else (key <= query) & (key > query - window)
    group, heads = q.shape[1] // k.shape[1], []
    for head in range(q.shape[1]):
        mine, keys, values = (x.to(dtype) for x in (q[start:stop, head], k[:stop, head // group], v[:stop, head // group]))
        scores = (mine @ keys.T) * q.shape[-1] ** -0.5
        heads.append(scores.masked_fill(~seen, float("-inf")).softmax(dim=-1) @ values)
    return torch.stack(heads, dim=1)
