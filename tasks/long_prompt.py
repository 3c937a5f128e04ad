"""One long prompt with a pass key, read and answered in several ways: time, peak memory, and whether the answer is right."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from infini.tasks.passkey.benchmark import EXTRA_TOKENS, PasskeyBenchmark, draw_questions
from infini.tasks.passkey.prompt import Haystack, build_prompt
from infini.tasks.passkey.score import first_integer
from infini.tasks.peak_memory import peak_bytes, start_peak
from tqdm import tqdm

from infini.errors import InputError

Way = Callable[[torch.Tensor, int], tuple[list[int], int]]
"""Reads a prompt, int64 ``[tokens]`` on the CPU, and writes that many tokens: their ids, and the bytes of the state at the end."""


@dataclass(frozen=True)
class LongPrompts:
    """What is asked.

    Attributes:
        lengths: tokens of the prompts; the first is what growth is counted from.
        depth: share of the filler before the key, 0..1.
        seed: of the keys.
        warm_up: tokens of a prompt that each way reads first, so that libraries and allocators have what they keep.
    """

    lengths: tuple[int, ...] = (65536, 1048576)
    depth: float = 0.5
    seed: int = 0
    warm_up: int = 4096

    def __post_init__(self):
        if list(self.lengths) != sorted(set(self.lengths)) or not self.lengths:
            raise InputError(f"lengths is {list(self.lengths)}; give at least one number of tokens, in rising order")
        if self.warm_up < 1:
            raise InputError(f"warm_up is {self.warm_up}; it must be at least 1")


def long_prompts(ways: Mapping[str, Way], tokenizer, settings: LongPrompts, device: torch.device) -> list[dict]:
    """Asks for a key in prompts of every length, in every way.

    The peak counts from the moment at which the prompt is there as ids on the CPU; what a way makes of it, ids on the device and
    masks, is in it.

    Args:
        ways: name -> how to read and answer.
        tokenizer: ``encode(str) -> list[int]``, ``decode(list[int]) -> str``.
        settings: what is asked.
        device: where the model runs.

    Returns:
        Rows: way, length, key, answer, exact, seconds for all, state_bytes, peak_memory_bytes.

    Raises:
        InputError: a length that cannot hold the question, or a system that cannot measure its peak.
    """
    asked = PasskeyBenchmark(lengths=settings.lengths, depths=(settings.depth,), seed=settings.seed)
    haystack = Haystack.load(asked.haystack, tokenizer)
    count = asked.digits + EXTRA_TOKENS

    def prompt(length: int):
        (one,) = draw_questions(asked, haystack, length, settings.depth)
        return build_prompt(tokenizer, length, settings.depth, one.key, haystack, one.phase, one.quiz)

    rows = []
    with tqdm(total=len(ways) * sum(settings.lengths), unit="tok", unit_scale=True, desc="long prompts", disable=None) as bar:
        for name, way in ways.items():
            way(prompt(settings.warm_up).ids, count)
            for length in settings.lengths:
                one = prompt(length)
                start_peak(device)
                begun = time.perf_counter()
                ids, state_bytes = way(one.ids, count)
                seconds = time.perf_counter() - begun
                answer = tokenizer.decode(ids)
                exact = first_integer(answer) == str(one.key)
                row = {"way": name, "length": length, "key": one.key, "answer": answer, "exact": exact, "seconds": seconds}
                rows.append(row | {"state_bytes": state_bytes, "peak_memory_bytes": peak_bytes(device)})
                bar.update(length)
    return rows
