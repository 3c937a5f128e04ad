"""Does an fp32 memory stay right? Its state after a long text beside that of the same model in fp64."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from infini.tasks.recall.text import haystack_ids
from infini.tasks.rows import run_of
from tqdm import tqdm

from infini.data.tokenizer import load_tokenizer
from infini.errors import InputError
from infini.report.fingerprint import fingerprint


@dataclass(frozen=True, kw_only=True)
class DriftSettings:
    """What `infini drift` reads.

    Attributes:
        lengths: tokens of stream after which the two are compared.
        probe: tokens read from both states for the comparison; they are the ones that follow in the stream.
        haystack: see :func:`infini.tasks.recall.text.haystack_ids`; files shorter than the stream begin again.
        seed: not negative; of the byte that the stream begins with.
        piece: tokens read at once.
    """

    lengths: tuple[int, ...]
    probe: int
    haystack: str
    seed: int
    piece: int

    def __post_init__(self):
        for name in ("probe", "piece"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not self.lengths or min(self.lengths) < 1:
            raise InputError(f"lengths are {list(self.lengths)} tokens; give at least one, each at least 1")
        if self.seed < 0:
            raise InputError(f"seed is {self.seed}; it must not be negative")


def run(model, settings: DriftSettings) -> tuple[list[dict], dict[str, Any]]:
    """The rows of one model, and what identifies the data: checksums."""
    return drift(model, settings), {"checkpoint_sha256": fingerprint(model)}


@torch.no_grad()
def drift(model, settings: DriftSettings) -> list[dict]:
    """Read one stream with a model and with its fp64 copy, and compare their memories by what is read from them.

    After each length the fp64 copy reads the probe three times: from its own state, from its own state with the memories
    of the other one, and with all memories silenced. With h the final hidden states of the probe,

        read_error = |h_fp32 - h_fp64| / |h_fp64 - h_silenced|,

    norms over all of it: only what the memories held can make them differ, as a share of what reading them does.

    Args:
        model: of the protocol, fp32, in eval mode, with a state whose layers have ``memory``.
        settings: see :class:`DriftSettings`.

    Returns:
        One row per length: tokens, read_error, matrix_error and normalizer_error (of the worst layer,
        |fp32 - fp64| / |fp64| in the Frobenius norm; None without a normalizer), layers (the same for each), and
        tokens_per_second of the two together.

    Raises:
        InputError: a model in another precision or without memory.
    """
    weights = next(model.parameters())
    if weights.dtype != torch.float32:
        raise InputError(f"the model is {weights.dtype}; drift compares a float32 model with its float64 copy: set dtype=float32")
    text = haystack_ids(settings.haystack, load_tokenizer(model.config))
    phase = int(np.random.default_rng(settings.seed).integers(len(text)))
    exact = copy.deepcopy(model).double()

    def piece(start: int, count: int) -> torch.Tensor:
        return torch.from_numpy(run_of(text, phase + start, count).copy()).long()[None].to(weights.device)

    rows, states, done, seconds = [], [None, None], 0, 0.0
    with tqdm(total=max(settings.lengths), unit="token", unit_scale=True, desc="drift", mininterval=5) as bar:
        for length in sorted(set(settings.lengths)):
            started = time.perf_counter()
            while done < length:
                count = min(settings.piece, length - done)
                now = piece(done, count)
                states = [one(now, *_given(state), keep="none")[1] for one, state in zip((model, exact), states, strict=True)]
                done += count
                bar.update(count)
            row = {"tokens": length, **_compare(exact, *states, piece(length, settings.probe))}  # waits for the device
            seconds += time.perf_counter() - started
            rows.append(row | {"tokens_per_second": length / seconds})
    return rows


def _given(state: Any) -> tuple:
    return () if state is None else (state,)


def _compare(exact, single, double, probe: torch.Tensor) -> dict:
    pairs = [
        (one.memory, other.memory)
        for one, other in zip(single.layers, double.layers, strict=True)
        if getattr(other, "memory", None) is not None  # a model of another kind may not have the field
    ]
    if not pairs:
        raise InputError("the model has no memory in any layer; there is nothing that could drift")
    layers = [
        {
            f"{name}_error": None if y is None else _relative(x.double(), y)
            for name, x, y in zip(other._fields, one, other, strict=True)
        }
        for one, other in pairs
    ]
    # Recent keys, values and counters from the fp64 copy, so that the memories alone can differ.
    drifted = replace(double, layers=tuple(map(_with_memory_of, double.layers, single.layers)))
    ours, theirs, silenced = (
        exact(probe, state, hidden=True, memory=memory)[0] for state, memory in ((drifted, True), (double, True), (double, False))
    )
    read = (theirs - silenced).norm().item()
    if read == 0:
        raise InputError("nothing is read from the memory yet; give lengths of at least one segment")
    worst = {name: max((layer[name] for layer in layers if layer[name] is not None), default=None) for name in layers[0]}
    return {"read_error": (ours - theirs).norm().item() / read, **worst, "layers": layers}


def _with_memory_of(layer: Any, other: Any) -> Any:
    if layer.memory is None:
        return layer
    return replace(layer, memory=type(layer.memory)(*(x if x is None else x.double() for x in other.memory)))


def _relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    size = expected.norm().item()
    return (found - expected).norm().item() / size if size else 0.0
