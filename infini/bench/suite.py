"""Runs the parts of the benchmark that were asked for, and writes the record after every row. `infini bench`."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from infini.bench import alone, attend, curve, foreign, layer, memory, models, peers, reach, shipped
from infini.bench.clock import copy_bandwidth, product_rate
from infini.bench.trial import Ceilings, Row, Trials, measure
from infini.causal import KERNELS
from infini.errors import InputError
from infini.loading import load
from infini.report.record import make_record, write_record
from infini.report.tables import bench_name


@dataclass(frozen=True)
class BenchSettings:
    """What is timed; `conf/bench.yaml` describes the fields."""

    parts: tuple[str, ...] = ("layer", "kernels", "full", "step", "prefill", "local", "memory", "curve", "shipped", "peers")
    rules: tuple[str, ...] = ("linear", "delta", "deltanet", "gated")
    backends: tuple[str, ...] = ("triton", "compiled", "torch")
    kernels: tuple[str, ...] = KERNELS
    compiled: tuple[bool, ...] = (True, False)
    tokens: int = 131072
    lengths: tuple[int, ...] = (4096, 16384, 65536, 262144, 1048576)
    step_tokens: int = 32768
    curve_steps: int = 200
    piece: int = 65536
    layers: int = 12
    heads: int = 8
    head_dim: int = 128
    intermediate_size: int = 4096
    segment_length: int = 2048
    vocab_size: int = 256
    repeats: int = 20
    seconds: float = 2.0
    seed: int = 0
    peer: str | None = None

    def __post_init__(self) -> None:
        known = {"parts": tuple(PARTS), "rules": tuple(memory.VARIANTS), "backends": memory.BACKENDS, "kernels": KERNELS}
        for name, names in known.items():
            for value in getattr(self, name):
                _require(value in names, name, value, f"one of {', '.join(names)}")
        numbers = ("tokens", "step_tokens", "curve_steps", "piece", "layers", "heads", "head_dim", "intermediate_size", "segment_length")
        for name in (*numbers, "repeats"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        _require(self.seconds > 0, "seconds", self.seconds, "greater than 0")
        _require(self.seed >= 0, "seed", self.seed, "0 or more")
        if self.peer is not None:
            _require("peers" in self.parts, "peer", self.peer, "null where parts are without peers")
            foreign.place(self.peer)
        for name, lengths in (("tokens", (self.tokens,)), ("lengths", self.lengths), ("step_tokens", (self.step_tokens,))):
            for tokens in lengths:
                whole = tokens <= self.segment_length or tokens % self.segment_length == 0
                _require(tokens >= 1 and whole, name, tokens, f"whole segments of segment_length = {self.segment_length}")

    @property
    def model(self) -> models.ModelShape:
        """The decoder of the parts `step` and `prefill`."""
        shape = (self.layers, self.heads, self.head_dim, self.intermediate_size, self.segment_length, self.vocab_size)
        return models.ModelShape(*shape)

    @property
    def peer_shape(self) -> memory.Shape:
        """The text and heads of the part `peers`."""
        return memory.Shape(1, self.tokens, min(self.segment_length, self.tokens), self.heads, self.heads, self.head_dim)


def _layer(settings: BenchSettings, device: torch.device) -> Trials:
    size = (settings.tokens, settings.segment_length, settings.heads, settings.head_dim)
    return layer.trials(device, *size, settings.rules, settings.backends, settings.kernels)


def _full(settings: BenchSettings, device: torch.device) -> Trials:
    size = (settings.lengths, settings.segment_length, settings.heads, settings.head_dim)
    return layer.full_trials(device, *size, settings.rules, settings.backends, settings.kernels)


def _step(settings: BenchSettings, device: torch.device) -> Trials:
    return models.step_trials(
        device, settings.model, settings.step_tokens, settings.rules, _without_compiler(settings), settings.compiled, settings.kernels
    )


def _prefill(settings: BenchSettings, device: torch.device) -> Trials:
    return models.prefill_trials(
        device, settings.model, settings.lengths, settings.piece, settings.rules, _without_compiler(settings), settings.compiled, settings.kernels
    )


def _without_compiler(settings: BenchSettings) -> tuple[str, ...]:
    """Backends of a model's memory; whether its blocks are compiled is another choice."""
    return tuple(backend for backend in settings.backends if backend != "compiled")


def _local(settings: BenchSettings, device: torch.device) -> Trials:
    """Segments and windows in the shapes of `memory.SHAPES`, which `infini.local` chooses kernels by."""
    seen = set()
    for shape in memory.SHAPES:
        size = (shape.rows, shape.tokens, shape.heads, shape.groups, shape.head_dim)
        for stretch in (attend.Stretch(*size, segment_length=shape.segment_length), attend.Stretch(*size, window=shape.segment_length)):
            if stretch not in seen:
                seen.add(stretch)
                yield from attend.trials_of(stretch, device, "local", settings.kernels)
        for within in reach.Reach.all_of(shape):
            if within not in seen:
                seen.add(within)
                yield from reach.trials(within, device, "local")


def _memory(settings: BenchSettings, device: torch.device) -> Trials:
    return memory.trials(device, backends=tuple(reversed(settings.backends)))


def _kernels(settings: BenchSettings, device: torch.device) -> Trials:
    """In the shape of `layer` under every rule that has them, and in two of `memory.SHAPES`."""
    size = (1, settings.tokens, settings.segment_length, settings.heads, settings.heads, settings.head_dim)
    yield from alone.trials(device, (*(memory.Shape(*size, rule) for rule in settings.rules), *alone.SHAPES))


def _curve(settings: BenchSettings, device: torch.device) -> Trials:
    """A smaller model: a third of the layers, an eighth of the segment."""
    size = (max(1, settings.segment_length // 8), settings.heads, settings.head_dim, -(-settings.layers // 3))
    return curve.trials(device, settings.rules, settings.curve_steps, *size)


def _shipped(settings: BenchSettings, device: torch.device) -> Trials:
    return shipped.trials(device, load(device=device), (20, 4096), True in settings.compiled)


def _peers(settings: BenchSettings, device: torch.device) -> Trials:
    shape = settings.peer_shape
    size = (shape.tokens, shape.segment_length, shape.heads, shape.head_dim)
    return peers.trials(device, *size, settings.rules, settings.backends, settings.kernels, settings.peer)


PARTS: dict[str, Callable[[BenchSettings, torch.device], Trials]] = {
    "layer": _layer,
    "kernels": _kernels,
    "full": _full,
    "step": _step,
    "prefill": _prefill,
    "local": _local,
    "memory": _memory,
    "curve": _curve,
    "shipped": _shipped,
    "peers": _peers,
}


def run(output: Path, settings: BenchSettings, device: torch.device | str = "cuda") -> list[Row]:
    """Compare and time; prints each row as it is done and writes `output`/record.json anew with it.

    Returns:
        The rows: what was timed (part, what, rule, backend, kernel, direction, shape), milliseconds (a median), calls,
        tokens_per_second, bytes, flop, floor_milliseconds, floor_ratio, the ratio to what it stands against,
        peak_memory_bytes; or `failed`, why there is no time.

    Raises:
        InputError: `peer` cannot be used; nothing has been timed then.
        AssertionError: after the last part, where numbers of a row differed; it was not timed.
    """
    started, device = time.time(), torch.device(device)
    if settings.peer is not None:
        foreign.require(settings.peer, settings.peer_shape, device)
    torch.manual_seed(settings.seed)
    on_gpu = device.type == "cuda"
    ceilings = Ceilings(copy_bandwidth(device, 2**30 if on_gpu else 2**20), product_rate(device, 8192 if on_gpu else 64))
    rows: list[Row] = []

    def write() -> None:
        record = make_record(
            "bench",
            config={**asdict(settings), "device": str(device)},
            data={},
            seeds={"inputs": settings.seed},
            started=started,
            rows=rows,
            ceilings=asdict(ceilings),
        )
        write_record(record, output / "record.json")

    for part in settings.parts:
        trials, row = PARTS[part](settings, device), None
        while True:
            try:
                trial = next(trials) if row is None else trials.send(row)
            except StopIteration:
                break
            except (InputError, torch.OutOfMemoryError) as error:
                row = {"part": part, "what": "the rest of this part", "failed": str(error).partition("\n")[0]}
                rows.append(row)
                print(line_of(row), flush=True)
                break
            row = measure(trial, device, ceilings, settings.repeats, settings.seconds)
            del trial
            rows.append(row)
            print(line_of(row), flush=True)
            write()
        trials.close()
    write()
    wrong = [line_of(row) for row in rows if row.get("failed", "").startswith("numbers differ")]
    if wrong:
        raise AssertionError("\n".join(["these were not timed:", *wrong]))
    return rows


def line_of(row: Row) -> str:
    """A row in one line."""
    names = [row["part"], bench_name(row), *(row[name] for name in ("rule", "backend", "kernel", "direction") if name in row)]
    if row.get("compiled"):
        names.append("compiled")
    head = f"{', '.join(names)}, {row.get('tokens', 0):,} tokens:"
    if "failed" in row:
        return f"{head} {row['failed']}"
    line = f"{head} {row['milliseconds']:.3f} ms, {row['tokens_per_second']:,.0f} tokens/s"
    for name, words in (("floor_ratio", "x floor"), ("flop_utilization", "of the product rate")):
        if name in row:
            line += f", {row[name]:.2f} {words}"
    return line + (f", {row['ratio']:.3f} x {row['against']}" if "ratio" in row else "")


def _require(ok: bool, name: str, value: object, limit: str) -> None:
    if not ok:
        raise InputError(f"{name} is {value!r}; it must be {limit}")

