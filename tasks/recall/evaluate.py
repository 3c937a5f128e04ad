"""How well a model recalls facts, by how long ago they were last said."""

from __future__ import annotations

import numpy as np
import torch
from infini.tasks.recall.text import write_recall
from infini.tasks.recall.training import check_recall

from infini.errors import InputError


@torch.no_grad()
def evaluate(
    model,
    length: int,
    rows: int = 8,
    pool: int = 16,
    longest_gap: int = 512,
    seed: int = 0,
    piece: int = 4096,
) -> list[dict]:
    """Accuracy of single digits by distance, on keys that training never sees.

    Teacher-forced, unlike the passkey benchmark: a digit is judged with the right text before it,
    so one miss does not count five times. Chance is 0.1 (for the first digit, which is never 0, 1/9).

    Args:
        model: any byte model of the protocol, in eval mode.
        length: bytes per row, at least 2.
        rows: number of rows.
        pool: names per row.
        longest_gap: most bytes of filler between two statements.
        seed: not negative.
        piece: bytes read at once.

    Returns:
        One row per octave of distance that occurs, nearest first: ``distance_from`` (included) and
        ``distance_to`` (not included) in bytes, ``digits`` (how many were judged), ``digit_accuracy``.

    Raises:
        InputError: fewer than 2 bytes or 1 row, a pool or gap that cannot be written.
    """
    if length < 2 or rows < 1 or piece < 1:
        raise InputError(
            f"length {length}, rows {rows}, piece {piece}: need at least 2 bytes, 1 row, 1 byte"
        )
    check_recall((pool,), (longest_gap,))
    random = np.random.default_rng(seed)
    tokens, answer = np.empty((rows, length), np.uint8), np.zeros((rows, length), bool)
    distance = np.stack(
        [
            write_recall(random, row, marks, pool, longest_gap, held_out=True)
            for row, marks in zip(tokens, answer, strict=True)
        ]
    )
    right = _predictions(model, tokens, piece) == tokens[:, 1:]

    asked = answer[:, 1:]
    octave = np.log2(distance[:, 1:][asked]).astype(int)
    return [
        {
            "distance_from": 2**i,
            "distance_to": 2 ** (i + 1),
            "digits": int((octave == i).sum()),
            "digit_accuracy": float(right[asked][octave == i].mean()),
        }
        for i in np.unique(octave).tolist()
    ]


def _predictions(model, tokens: np.ndarray, piece: int) -> np.ndarray:
    """The likeliest next byte after each byte but the last, ``[rows, length - 1]``."""
    device = next(model.parameters()).device
    text, state, found = torch.from_numpy(tokens[:, :-1]).long(), None, []
    for start in range(0, text.shape[1], piece):
        logits, state = model(text[:, start : start + piece].to(device), state)
        found.append(logits.argmax(-1).cpu())
    return torch.cat(found, 1).numpy()
