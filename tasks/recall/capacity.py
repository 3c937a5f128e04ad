"""How many facts a memory holds, how long, and how many it could hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from infini.tasks.passkey.keys import draw_keys
from infini.tasks.recall.text import DIGITS, Statements, haystack_ids
from infini.tasks.rows import run_of

from infini.data.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer
from infini.errors import InputError
from infini.report.fingerprint import fingerprint

VALUES = 10  # the digits


@dataclass(frozen=True, kw_only=True)
class CapacityGrid:
    """What `infini capacity` asks of each model; see :func:`capacity`.

    Attributes:
        key_dim: ``d_k`` of the theory; None: the model's ``head_dim``.
    """

    pairs: tuple[int, ...]
    distances: tuple[int, ...]
    rows: int
    asked: int
    haystack: str
    seed: int
    piece: int
    key_dim: int | None


def run(model, grid: CapacityGrid) -> tuple[list[dict], dict[str, Any]]:
    """The rows of one model, and what identifies the data: checksums.

    Raises:
        InputError: as :func:`capacity`.
    """
    key_dim = model.config.head_dim if grid.key_dim is None else grid.key_dim
    settings = {name: getattr(grid, name) for name in grid.__dataclass_fields__ if name != "key_dim"}
    tokenizer = load_tokenizer(model.config)
    data = {"checkpoint_sha256": fingerprint(model)} | ({} if tokenizer.fingerprint is None else {"tokenizer_sha256": tokenizer.fingerprint})
    return capacity(model, key_dim, **settings, tokenizer=tokenizer), data


@torch.no_grad()
def capacity(
    model,
    key_dim: int,
    pairs: Sequence[int] = (1, 2, 4, 8, 16, 32, 64, 128, 256),
    distances: Sequence[int] = (1024, 16384, 131072),
    rows: int = 8,
    asked: int = 16,
    haystack: str = "repeat",
    seed: int = 0,
    piece: int = 4096,
    tokenizer: Tokenizer | None = None,
) -> list[dict]:
    """Accuracy of recall against the number of pairs and their distance, beside theory.

    A row states ``pairs`` names with five digits each, one after the other; ``distance`` tokens of
    filler follow, then the statements of some of the names again, in another order, whose digits the model
    predicts (teacher-forced). Keys are held out. For accuracy against ``d_k``, measure models that
    differ in it and join the tables.

    Args:
        model: of the protocol, in eval mode.
        key_dim: ``d_k``, what theory is reckoned for: of one head, or of all heads that share the work.
        pairs: numbers of names, each 1..676, or as many as :class:`infini.tasks.recall.text.Statements` has.
        distances: tokens of filler between the last statement and the first question.
        rows: texts per cell, read at once.
        asked: names asked for per text, at most.
        haystack: ``"repeat"`` for the paper's sentences, or ``"text:FILES"``, see
            :func:`infini.tasks.text_files.read_texts`: interference of natural text.
        seed: not negative.
        piece: tokens read at once.
        tokenizer: the model's; None: bytes.

    Returns:
        One row per pairs and distance: key_dim, pairs, distance, associations (each digit is one of its
        own: five a pair), names (asked in all), digit_accuracy (chance 0.1), exact_match (all five
        digits of a name), and :func:`theory` for the linear and for the delta rule (theory_linear,
        theory_delta).

    Raises:
        InputError: a number that is too small, more pairs than names, a haystack that cannot be read.
    """
    tokenizer = ByteTokenizer() if tokenizer is None else tokenizer
    statements = Statements(tokenizer)
    if not pairs or min(pairs) < 1 or max(pairs) > statements.names:
        raise InputError(f"pairs are {list(pairs)}; give at least one, each 1 to {statements.names}, the number of names")
    for name, value in (("rows", rows), ("asked", asked), ("piece", piece), ("key_dim", key_dim)):
        if value < 1:
            raise InputError(f"{name} is {value}; it must be at least 1")
    if seed < 0:
        raise InputError(f"seed is {seed}; it must not be negative")
    if not distances or min(distances) < 0:
        raise InputError(f"distances are {list(distances)} tokens; give at least one, none negative")
    filler = haystack_ids(haystack, tokenizer)
    found = []
    for count in pairs:
        expected = {
            f"theory_{rule}": theory(DIGITS * count, key_dim, rule) for rule in ("linear", "delta")
        }
        for distance in distances:
            random = np.random.default_rng((seed, count, distance))
            texts = [_write(random, statements, count, min(asked, count), distance, filler) for _ in range(rows)]
            right = _right_digits(model, np.stack(texts), statements, min(asked, count), piece)
            found.append(
                {
                    "key_dim": key_dim,
                    "pairs": count,
                    "distance": distance,
                    "associations": DIGITS * count,
                    "names": right.shape[0] * right.shape[1],
                    "digit_accuracy": float(right.mean()),
                    "exact_match": float(right.all(-1).mean()),
                    **expected,
                }
            )
    return found


def theory(
    pairs: int,
    key_dim: int,
    rule: Literal["linear", "delta"],
    values: int = VALUES,
    trials: int = 64,
    seed: int = 0,
) -> float:
    """Share of pairs that an ideal memory of one head gives back, by simulation.

    Keys are random directions of ``R^d_k``, values one of ``values`` orthogonal vectors; ``M`` starts
    at 0, each pair is written once, and a read ``k M`` counts as the value that it is closest to.

    - ``linear``: ``M += k^T v``. Crosstalk of ``pairs / d_k`` in variance on every read.
    - ``delta``: ``M += k^T (v - k M)``. Exact while keys are orthogonal; a pair fades by about
      ``1 - 1 / d_k`` with each later one.

    So both hold about ``d_k`` pairs. A trained model may do better than random keys (orthogonal ones,
    several heads and layers) or worse (filler is written too).

    Args:
        pairs: associations written, at least 1.
        key_dim: ``d_k``, at least 1.
        rule: how they are written.
        values: how many different values there are.
        trials: simulated memories.
        seed: not negative.

    Example:
        >>> theory(4, 128, "delta") > 0.99, theory(2048, 128, "delta") < 0.3
        (True, True)
    """
    if pairs < 1 or key_dim < 1 or trials < 1:
        raise InputError(f"pairs {pairs}, key_dim {key_dim}, trials {trials}; each must be at least 1")
    random = np.random.default_rng((seed, pairs, key_dim))
    trials = max(1, min(trials, 2**24 // (pairs * key_dim)))  # bounds the memory; many pairs are many reads
    keys = random.standard_normal((trials, pairs, key_dim), np.float32)
    keys /= np.linalg.norm(keys, axis=-1, keepdims=True)
    which = random.integers(values, size=(trials, pairs))
    value = np.eye(values, dtype=np.float32)[which]
    if rule == "linear":
        memory = keys.transpose(0, 2, 1) @ value
    elif rule == "delta":
        memory = np.zeros((trials, key_dim, values), np.float32)
        for i in range(pairs):
            key = keys[:, i : i + 1]
            memory += key.transpose(0, 2, 1) @ (value[:, i : i + 1] - key @ memory)
    else:
        raise InputError(f"rule is {rule!r}; theory knows linear and delta")
    return float(((keys @ memory).argmax(-1) == which).mean())


def _write(random, statements: Statements, pairs: int, asked: int, distance: int, filler: np.ndarray) -> np.ndarray:
    names = random.permutation(statements.names)[:pairs]
    said = statements.of(names, draw_keys(random, pairs, DIGITS, held_out=True))
    between = run_of(filler, int(random.integers(len(filler))), distance)
    again = said[random.permutation(pairs)[:asked]]
    return np.concatenate([said.ravel(), between, again.ravel()])


def _right_digits(model, texts: np.ndarray, statements: Statements, asked: int, piece: int) -> np.ndarray:
    """Which digits the model predicts, bool ``[rows, asked, 5]``."""
    device = next(model.parameters()).device
    first = texts.shape[1] - asked * statements.size
    state, found = None, []
    # The statement's first token is never a digit, so nothing is lost by predicting from there on.
    for start in [*range(0, first, piece), *range(first, texts.shape[1], piece)]:
        stop = min(start + piece, first if start < first else texts.shape[1])
        part = torch.from_numpy(texts[:, start:stop]).long().to(device)
        keep = "none" if start < first else "all"
        logits, state = model(part, state, keep=keep)
        if logits is not None:
            found.append(logits.argmax(-1).cpu())
    guess = torch.cat(found, 1).numpy()[:, :-1]  # of the token after each
    right = np.concatenate([np.zeros((len(texts), 1), bool), guess == texts[:, first + 1 :]], 1)
    return right.reshape(len(texts), asked, statements.size)[:, :, statements.key : statements.key + DIGITS]
