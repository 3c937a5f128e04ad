"""How fast a model reads, writes and learns, and in how much memory, by the length of the text."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from infini.tasks.peak_memory import peak_bytes, start_peak
from tqdm import tqdm

from infini.errors import InputError
from infini.report.fingerprint import fingerprint
from infini.session import StreamingSession


@dataclass(frozen=True, kw_only=True)
class SpeedSettings:
    """What is timed; tokens are random, which decides nothing.

    Attributes:
        lengths: tokens of a text after which reading and writing are timed, rising.
        train_lengths: tokens of a row of a training step.
        train_tokens: tokens of a training step: as many rows as they allow, one at least.
        piece: tokens read at once.
        tokens: written after each length.
        repeats: of writing and of training steps; the median counts.
        seed: of the tokens.
    """

    lengths: tuple[int, ...] = (4096, 32768, 262144)
    train_lengths: tuple[int, ...] = (4096, 32768)
    train_tokens: int = 32768
    piece: int = 4096
    tokens: int = 32
    repeats: int = 3
    seed: int = 0

    def __post_init__(self):
        for name in ("train_tokens", "piece", "tokens", "repeats"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.seed < 0:
            raise InputError(f"seed is {self.seed}; it must not be negative")
        for name in ("lengths", "train_lengths"):
            given = getattr(self, name)
            if list(given) != sorted(set(given)) or min(given, default=2) < 2:
                raise InputError(f"{name} are {list(given)}; they must rise and be at least 2")
        if not self.lengths and not self.train_lengths:
            raise InputError("lengths and train_lengths are empty; give one of them something to time")


def run(model, settings: SpeedSettings) -> tuple[list[dict], dict[str, Any]]:
    """Times a model of the protocol; one text is read through all lengths, each stretch of it timed by itself.

    Returns:
        A row for each ``what`` (``reading``, ``writing``, ``training``) and ``length``: rows (texts side by side), tokens_per_second (of
        the stretch read since the length before; written one by one after the length; of a step forward and backward, in bf16
        on a GPU, without the optimizer), peak_memory_bytes (of a GPU's tensors, or of the process), state_bytes. The last three are
        None where it does not fit the GPU. And the checksum of the weights.
    """
    device = next(model.parameters()).device
    random = torch.Generator().manual_seed(settings.seed)
    rows: list[dict] = []
    steps = len(settings.lengths) * 2 + len(settings.train_lengths)
    with tqdm(total=steps, desc="timing", disable=None) as bar:
        session = StreamingSession(model, piece=settings.piece)
        if settings.lengths:  # kernels are compiled and loaded before a clock runs
            session.feed(_ids(model, random, 1, min(2 * settings.piece, settings.lengths[-1])))
            list(session.generate(2))
            session = StreamingSession(model, piece=settings.piece)
        for length in settings.lengths:
            for what, tokens, work in _stretch(model, settings, random, session, length):
                rows.append({"what": what, "length": length, "rows": 1, **_timed(device, tokens, work), "state_bytes": session.state_bytes})
                bar.update()
        del session
        for length in settings.train_lengths:
            rows.append({"what": "training", "length": length, **_training(model, settings, random, length, device)})
            bar.update()
    return rows, {"checkpoint_sha256": fingerprint(model)}


def _stretch(model, settings: SpeedSettings, random, session: StreamingSession, length: int):
    """What is timed at a length: how many tokens, and the work; what is written is taken back."""
    ids = _ids(model, random, 1, length - session.tokens_seen)
    yield "reading", ids.shape[1], [lambda: session.feed(ids)]
    state = session.state

    def write() -> None:
        session.restart(state)
        session.feed(ids[:, -1:])
        list(session.generate(settings.tokens))

    yield "writing", settings.tokens + 1, [write] * settings.repeats
    session.restart(state)


def _training(model, settings: SpeedSettings, random, length: int, device: torch.device) -> dict:
    count = max(1, settings.train_tokens // length)
    ids = _ids(model, random, count, length + 1).to(device)

    def step() -> None:
        with torch.enable_grad(), torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            losses, _ = model(ids[:, :-1], targets=ids[:, 1:])
            losses.float().mean().backward()
        model.zero_grad(set_to_none=True)

    model.train()
    try:
        found = _timed(device, count * length, [step] * settings.repeats, warm_up=step)
    finally:
        model.zero_grad(set_to_none=True)
        model.eval()
    return {"rows": count, **found, "state_bytes": None}


def _timed(device: torch.device, tokens: int, works: list[Callable[[], Any]], warm_up: Callable[[], Any] | None = None) -> dict:
    start_peak(device)
    try:
        if warm_up is not None:
            warm_up()
        seconds = [_seconds(device, work) for work in works]
    except torch.cuda.OutOfMemoryError:
        torch.cuda.empty_cache()
        return {"tokens_per_second": None, "peak_memory_bytes": None}
    return {"tokens_per_second": tokens / statistics.median(seconds), "peak_memory_bytes": peak_bytes(device)}


def _seconds(device: torch.device, work: Callable[[], Any]) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begun = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begun


def _ids(model, random: torch.Generator, rows: int, tokens: int) -> torch.Tensor:
    return torch.randint(model.config.vocab_size, (rows, tokens), generator=random)
