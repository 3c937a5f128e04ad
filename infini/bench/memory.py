"""The memory's backends against each other: first equal, then timed. `infini bench`.

Times the memory's part of one layer (write, scan, read, mix; projections and local attention left out), forward and with
its gradient, and the whole shipped model: reading in bf16, and a training step without the optimizer under bf16 autocast.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from infini.attention import InfiniAttention
from infini.bench.clock import copy_bandwidth, milliseconds
from infini.config import InfiniConfig
from infini.loading import load
from infini.model import InfiniTransformer
from infini.report.record import make_record, write_record
from infini.segments import SegmentPlan
from infini.testing import assert_witnessed

BACKENDS = ("torch", "triton")


@dataclass(frozen=True)
class Shape:
    """One layer's memory at work: `rows` texts of `tokens` tokens."""

    rows: int
    tokens: int
    segment_length: int
    heads: int
    groups: int
    head_dim: int
    long: bool = True  # write gate and normalized keys and queries, as in InfiniConfig.long; False: the published layer


SHAPES = (
    Shape(20, 4096, 256, 4, 4, 128),  # the shipped model
    Shape(1, 81920, 256, 4, 4, 128),
    Shape(1, 131072, 2048, 8, 8, 128, long=False),
    Shape(1, 131072, 2048, 8, 2, 128),
    Shape(4, 16384, 128, 8, 8, 64),
    Shape(1, 65536, 1024, 8, 8, 96),
    Shape(1, 65536, 1024, 4, 2, 256),
    Shape(1, 65536, 8192, 8, 8, 128),
)


def run(
    output: Path,
    shapes: Sequence[Shape] = SHAPES,
    device: torch.device | str = "cuda",
    model: InfiniTransformer | None = None,
    batch: tuple[int, int] = (20, 4096),
    repeats: int = 20,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Compare and time; prints a table and writes `output`/record.json.

    Args:
        output: a folder; made if it is missing.
        shapes: of the layer's part.
        device: where to.
        model: timed whole; None: the shipped one.
        batch: rows and tokens that the model reads and learns from.
        repeats: calls of which the median counts.
        seed: of weights and inputs.

    Returns:
        The rows of the record: part, backend, milliseconds, tokens_per_second, and for the layer's part the ratio to the time
        in which this device copies the bytes that must be moved (queries, keys, values, local output and output, once each).

    Raises:
        AssertionError: the backends do not agree; nothing is timed then.
    """
    started, device = time.time(), torch.device(device)
    torch.manual_seed(seed)
    bandwidth = copy_bandwidth(device, 2**30 if device.type == "cuda" else 2**20)
    rows = []
    for shape in shapes:
        rows += _print_each(_layer_rows(shape, device, bandwidth, repeats))
    model = load(device=device) if model is None else model
    rows += _print_each(_model_rows(model, device, batch, repeats))
    config = {"shapes": [asdict(shape) for shape in shapes], "batch": list(batch), "repeats": repeats}
    config |= {"model": model.config.to_dict(), "device": str(device)}
    record = make_record(
        "bench", config=config, data={}, seeds={"inputs": seed}, started=started, rows=rows, copy_bytes_per_second=bandwidth
    )
    write_record(record, output / "record.json")
    return rows


def _layer_rows(shape: Shape, device: torch.device, bandwidth: float, repeats: int) -> Iterator[dict[str, Any]]:
    layer, plan, inputs = memory_part(shape, device)
    _assert_agreement(layer, plan, inputs)
    leaves = [x for x in inputs.values() if x is not None]
    parameters = [p for name, p in layer.named_parameters() if "proj" not in name and "write_gate" not in name]
    needed = sum(x.nbytes for x in (inputs["q"], inputs["k"], inputs["v"], inputs["local_output"], inputs["local_output"]))
    floor = 1000 * needed / bandwidth
    for gradient in (False, True):
        for backend in BACKENDS:

            def call(backend=backend, gradient=gradient):
                with torch.set_grad_enabled(gradient):
                    mixed, _ = layer.remember(**inputs, initial=None, plan=plan, backend=backend)
                    if gradient:
                        torch.autograd.grad(mixed, leaves + parameters, grad_outputs=inputs["local_output"].detach())

            took = milliseconds(call, device, repeats, min(3, repeats))
            part = "memory forward + backward" if gradient else "memory forward"
            row = _row(part, backend, shape.rows * shape.tokens, took) | {"shape": asdict(shape)}
            yield row if gradient else row | {"floor_ratio": took / floor}


def memory_part(shape: Shape, device: torch.device) -> tuple[InfiniAttention, SegmentPlan, dict[str, Tensor | None]]:
    """A layer, the plan of whole rows from the start of a text, and inputs of `InfiniAttention.remember` in bf16."""
    config = InfiniConfig(
        hidden_size=shape.heads * shape.head_dim,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.groups,
        segment_length=shape.segment_length,
        write_gate=shape.long,
        qk_norm=shape.long,
    )
    layer = InfiniAttention(config, has_memory=True).to(device)
    zeros = torch.zeros(shape.rows, dtype=torch.long)
    plan = SegmentPlan(
        tokens=shape.tokens,
        segment_length=shape.segment_length,
        span=config.span,
        sliding=False,
        open_length=zeros,
        tokens_seen=zeros,
        empty=zeros == 0,
        history=0,
        lengths=None,
        reset=None,
        device=device,
    )

    def random(*heads_and_dim: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(shape.rows, shape.tokens, *heads_and_dim, device=device).to(dtype).requires_grad_()

    many, few = (shape.heads, shape.head_dim), (shape.groups, shape.head_dim)
    inputs = {"q": random(*many), "k": random(*few), "v": random(*few), "strength": None, "local_output": random(*many)}
    if shape.long:
        inputs["strength"] = random(shape.groups, dtype=torch.float32).detach().sigmoid().requires_grad_()
    return layer, plan, inputs


def _assert_agreement(layer: InfiniAttention, plan: SegmentPlan, inputs: dict[str, Tensor | None]) -> None:
    """Output, memory and gradients of both backends, by the rule of `infini.testing`; fp64 plain code is the oracle."""

    def results(backend: str, exact: bool) -> dict[str, Tensor]:
        given = {name: x if x is None else x.detach().to(torch.float64 if exact else x.dtype) for name, x in inputs.items()}
        leaves = {name: x.requires_grad_() for name, x in given.items() if x is not None}
        layer.to(torch.float64 if exact else torch.float32)
        mixed, memory = layer.remember(**given, initial=None, plan=plan, backend=backend)
        along = mixed.detach()
        gradients = torch.autograd.grad((mixed * along).sum() + memory.normalizer.sum(), list(leaves.values()))
        found = {f"gradient of {name}": x for name, x in zip(leaves, gradients, strict=True)}
        return found | {"mixed": mixed.detach(), "matrix": memory.matrix.detach(), "normalizer": memory.normalizer.detach()}

    fast, plain, oracle = results("triton", False), results("torch", False), results("torch", True)
    layer.float()
    for name, true in oracle.items():
        assert_witnessed(name, fast[name], plain[name], true, inputs["q"].dtype)


def _model_rows(model: InfiniTransformer, device: torch.device, batch: tuple[int, int], repeats: int) -> Iterator[dict[str, Any]]:
    rows, tokens = batch
    text = torch.randint(model.config.vocab_size, (rows, tokens + 1), device=device)

    def learn() -> Tensor:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            logits, _ = model(text[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1).float(), text[:, 1:].flatten())
        return torch.autograd.grad(loss, list(model.parameters()))[0]

    yield from _both("training step", model, learn, device, rows * tokens, repeats)
    half = type(model)(model.config).to(device, torch.bfloat16)
    half.load_state_dict(model.state_dict())

    @torch.no_grad()
    def read() -> Tensor:
        _, state = half(text[:, : tokens // 2], keep="none")
        return half(text[:, tokens // 2 : tokens], state, keep="last")[0]

    yield from _both("reading", half, read, device, rows * tokens, repeats)


def _both(
    part: str, model: InfiniTransformer, call: Callable[[], Tensor], device: torch.device, tokens: int, repeats: int
) -> Iterator[dict[str, Any]]:
    """Time `call`, whose result must be the same by every backend: apart by less than 5 % of its norm."""
    found = {}
    for backend in BACKENDS:
        model.memory_backend = backend
        found[backend] = call().double()
    apart = float((found["triton"] - found["torch"]).norm() / found["torch"].norm())
    if not apart < 0.05:
        raise AssertionError(f"{part}: the backends are {apart:.1%} apart")
    for backend in BACKENDS:
        model.memory_backend = backend
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        row = _row(part, backend, tokens, milliseconds(call, device, repeats, min(3, repeats))) | {"apart": apart}
        if device.type == "cuda":
            row["peak_memory_bytes"] = torch.cuda.max_memory_allocated(device)
        yield row


def _row(part: str, backend: str, tokens: int, took: float) -> dict[str, Any]:
    return {"part": part, "backend": backend, "milliseconds": took, "tokens_per_second": 1000 * tokens / took}


def _print_each(rows: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for row in rows:
        shape = row.get("shape")
        size = "shipped model" if shape is None else "{rows} x {tokens:,} / {segment_length}, {heads}:{groups} x {head_dim}".format(**shape)
        ratio = f"{row['floor_ratio']:6.2f} x floor" if "floor_ratio" in row else ""
        speed = f"{row['milliseconds']:10.3f} ms {row['tokens_per_second']:14,.0f} tokens/s {ratio}"
        print(f"{row['part']:26} {size:34} {row['backend']:7} {speed}", flush=True)
        yield row
