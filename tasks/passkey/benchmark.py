"""The passkey benchmark: exact match by free-running generation, by length and depth."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from infini.tasks.passkey.cells import FinishedCells
from infini.tasks.passkey.keys import draw_keys
from infini.tasks.passkey.needles import Quiz, needle_kind
from infini.tasks.passkey.prompt import Haystack, Prompt, build_prompt, check_length
from infini.tasks.passkey.score import first_integer, right_digits
from infini.tasks.peak_memory import peak_bytes, start_peak
from tqdm import tqdm

from infini.errors import InputError
from infini.report.fingerprint import fingerprint
from infini.report.intervals import wilson_interval
from infini.session import StreamingSession

VERSION = 1
EXTRA_TOKENS = 5  # generated beyond the digits: a space before, and room to see that the number ends


@dataclass(frozen=True)
class PasskeyBenchmark:
    """What is asked.

    Attributes:
        lengths: tokens of the whole prompt, question included.
        depths: shares of the filler before the needle, 0..1: one list for all lengths, or a list for
            each length.
        samples: prompts per cell, each with its own held-out key and its own filler phase.
        seed: not negative.
        needle: what is hidden and how it is asked for, see :mod:`infini.tasks.passkey.needles`.
        digits: of a key, 3..18; None becomes the needle's own number: 5, of ``niah_single_1`` 7.
        haystack: ``"repeat"`` or ``"text:FILES"``; a text is begun at a random place.
        batch_size: prompts at once.
        piece: tokens fed at once.
    """

    lengths: tuple[int, ...] = (4096, 16384, 65536)
    depths: tuple[float, ...] | Mapping[int, tuple[float, ...]] = (0.0, 0.25, 0.5, 0.75, 1.0)
    samples: int = 1
    seed: int = 0
    needle: str = "passkey"
    digits: int | None = None
    haystack: str = "repeat"
    batch_size: int = 1
    piece: int = 4096

    def __post_init__(self):
        if not self.lengths:
            raise InputError("lengths is empty; name at least one number of tokens")
        for name in ("samples", "batch_size", "piece"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.seed < 0:
            raise InputError(f"seed is {self.seed}; it must not be negative")
        kind = needle_kind(self.needle)
        if self.digits is None:
            object.__setattr__(self, "digits", kind.digits)
        if not 3 <= self.digits <= 18:
            raise InputError(f"digits is {self.digits}; a key has 3 to 18 digits")
        if isinstance(self.depths, Mapping) and set(self.depths) != set(self.lengths):
            raise InputError(
                f"depths are given for lengths {sorted(self.depths)}, but lengths are "
                f"{sorted(self.lengths)}; name the same lengths"
            )
        for length, depth in self.cells():
            if length < 1:
                raise InputError(f"length is {length}; a prompt has at least one token")
            if not 0 <= depth <= 1:
                raise InputError(f"depth is {depth}; it is a share of the text, from 0 to 1")

    def cells(self) -> list[tuple[int, float]]:
        """All (length, depth) in order, each once.

        Raises:
            InputError: a length without a depth.
        """
        found = {}
        for length in self.lengths:
            depths = self.depths[length] if isinstance(self.depths, Mapping) else self.depths
            if not depths:
                raise InputError(f"length {length} has no depth; name at least one, from 0 to 1")
            found |= {(length, float(depth)): None for depth in depths}
        return list(found)


def run(model, tokenizer, settings: PasskeyBenchmark, output: Path) -> list[dict]:
    """Asks a model for hidden keys and counts the answers that are right.

    Each answer is generated greedily after the prompt was streamed; it is right when the first
    integer in it is the key. Finished cells are kept in ``output`` and never run again.

    Args:
        model: any model of the protocol, in eval mode; runs on the device of its parameters.
        tokenizer: ``encode(str) -> list[int]``, ``decode(list[int]) -> str``, ``vocab_size``.
        settings: what is asked.
        output: the folder of this run.

    Returns:
        One row per cell: length, depth, needle, samples, exact_match, digit_accuracy,
        tokens_per_second, peak_memory_bytes, and the extras exact_match_low, exact_match_high (95 %
        interval),
        digit_accuracy_by_position, border_cut (needles in more than one segment),
        border_cut_exact_match (None when there are none), state_bytes (per sample), seconds.

        ``seconds`` is reading alone, ``tokens_per_second`` the prompts' tokens over it: from the ids on the CPU, checked and fed
        piece by piece, to the arrival of the last logits. Prompts are built before, answers written after; neither counts, nor
        does the compiling of kernels, because two pieces are read before the first cell.

    Raises:
        InputError: a prompt that cannot be built, a tokenizer with more tokens than the model, an
            output folder of another run, logits that are not finite.
    """
    if tokenizer.vocab_size > model.config.vocab_size:
        raise InputError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model {model.config.vocab_size}; "
            "use the model's own tokenizer"
        )
    haystack = Haystack.load(settings.haystack, tokenizer, needle_kind(settings.needle).filler)
    for length, depth in settings.cells():  # a length that is too short is found before any work
        for asked in draw_questions(settings, haystack, length, depth):
            check_length(tokenizer, length, asked.quiz)

    device = next(model.parameters()).device
    finished = FinishedCells(Path(output), _identity(model, settings, haystack, device))
    cells = settings.cells()
    todo = sum(length * settings.samples for length, depth in cells if not finished.get(length, depth))
    if todo:
        _warm_up(model, settings, haystack)
    rows = []
    with tqdm(total=todo, unit="tok", unit_scale=True, desc="passkey") as bar:
        for length, depth in cells:
            cell = finished.get(length, depth)
            if cell is None:
                cell = _run_cell(model, tokenizer, settings, haystack, length, depth, device, bar)
                finished.put(length, depth, cell)
            rows.append(cell["row"])
    return rows


def _identity(model, settings, haystack, device) -> dict:
    asked = dataclasses.asdict(settings)
    if settings.needle == "passkey":
        del asked["needle"]  # as folders say that are older than the other kinds
    return {
        "task": "passkey",
        "version": VERSION,
        **asked,
        "haystack_sha256": hashlib.sha256(haystack.ids.numpy()).hexdigest(),
        "checkpoint_sha256": fingerprint(model),
        "device": device.type,
    }


@dataclass(frozen=True)
class Question:
    """A prompt that is not built yet."""

    key: int
    phase: int
    quiz: Quiz


def draw_questions(settings: PasskeyBenchmark, haystack: Haystack, length: int, depth: float) -> list[Question]:
    """What one cell asks, `settings.samples` times; the same for the same values, whatever other cells there are."""
    random = np.random.default_rng((settings.seed, length, round(depth * 10**9)))
    keys = draw_keys(random, settings.samples, settings.digits, held_out=True).tolist()
    phases = random.integers(len(haystack.ids), size=settings.samples).tolist()
    draw = needle_kind(settings.needle).draw
    quizzes = [draw(random, key, True) for key in keys]
    return list(map(Question, keys, phases, quizzes))


def _run_cell(model, tokenizer, settings, haystack, length, depth, device, bar) -> dict:
    asked = draw_questions(settings, haystack, length, depth)
    samples, seconds = [], 0.0
    start_peak(device)
    for first in range(0, settings.samples, settings.batch_size):
        # Only this batch's prompts exist, so that the peak is the model's and not the benchmark's.
        now = asked[first : first + settings.batch_size]
        batch = [
            build_prompt(tokenizer, length, depth, one.key, haystack, one.phase, one.quiz)
            for one in now
        ]
        session = StreamingSession(model, batch_size=len(batch), piece=settings.piece)
        seconds += _seconds_to_read(session, torch.stack([prompt.ids for prompt in batch]), bar)
        answers = _answers(session, tokenizer, settings.digits + EXTRA_TOKENS)
        n = model.config.segment_length
        for prompt, one, answer in zip(batch, now, answers, strict=True):
            samples.append(_sample(prompt, one.quiz, answer, n))
    rate, peak = length * settings.samples / seconds, peak_bytes(device)
    bar.set_postfix_str(f"{length} at {depth:g}: {rate:,.0f} tok/s, peak {peak / 2**20:,.0f} MiB")
    row = {"length": length, "depth": depth, "needle": settings.needle, **_summary(samples)}
    row |= {"tokens_per_second": rate, "peak_memory_bytes": peak, "seconds": seconds}
    row |= {"state_bytes": session.state_bytes // len(batch)}
    return {"row": row, "samples": samples}


def _sample(prompt: Prompt, quiz: Quiz, text: str, segment_length: int) -> dict:
    answer = first_integer(text)
    return {
        "key": prompt.key,
        "question": quiz.question,
        "output": text,
        "exact": bool(answer) and int(answer) == prompt.key,
        "digits": right_digits(answer, prompt.key),
        "needle": [prompt.needle_start, prompt.needle_end],
        "decoys": [list(span) for span in prompt.decoys],
        "border_cut": prompt.cut_by_border(segment_length),
    }


def _seconds_to_read(session: StreamingSession, ids: torch.Tensor, bar: tqdm) -> float:
    """Feeds the prompts `[batch, tokens]`; the time from their first token to the arrival of their last logits."""
    before, rows = bar.n, len(ids)
    started = time.perf_counter()
    logits = session.feed(ids, progress=lambda read: bar.update(before + rows * read - bar.n))
    finite = bool(torch.isfinite(logits).all())  # waits for the device, so that the clock is right
    seconds = time.perf_counter() - started
    if not finite:
        raise InputError(
            f"the model's logits are not finite after {ids.shape[1]} tokens: its weights hold NaN "
            "or its state has overflowed; check the checkpoint"
        )
    return seconds


def _warm_up(model, settings: PasskeyBenchmark, haystack: Haystack) -> None:
    """Reads two pieces, the one into an empty memory and the next, so that no clock runs while kernels are compiled or loaded."""
    rows, tokens = min(settings.batch_size, settings.samples), min(2 * settings.piece, max(settings.lengths))
    session = StreamingSession(model, batch_size=rows, piece=settings.piece)
    session.feed(haystack.run(0, tokens).expand(rows, -1))


def _answers(session, tokenizer, count) -> Iterator[str]:
    tokens = torch.stack([token.cpu() for token in session.generate(count)], dim=1)
    return map(tokenizer.decode, tokens.tolist())


def _summary(samples) -> dict:
    exact = [sample["exact"] for sample in samples]
    cut = [sample["exact"] for sample in samples if sample["border_cut"]]
    by_position = np.mean([sample["digits"] for sample in samples], axis=0).tolist()
    low, high = wilson_interval(sum(exact), len(exact))
    return {
        "samples": len(samples),
        "exact_match": sum(exact) / len(exact),
        "exact_match_low": low,
        "exact_match_high": high,
        "digit_accuracy": math.fsum(by_position) / len(by_position),
        "digit_accuracy_by_position": by_position,
        "border_cut": len(cut),
        "border_cut_exact_match": sum(cut) / len(cut) if cut else None,
    }
