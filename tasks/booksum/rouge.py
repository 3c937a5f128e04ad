"""ROUGE as the baselines of the paper report it: the one door to the library `rouge-score`."""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

from infini.errors import InputError

NAMES = ("rouge1", "rouge2", "rougeL")


def require_rouge() -> None:
    """Say at once, not after hours of reading, that the library is missing.

    Raises:
        InputError: it is.
    """
    _scorer()


def rouge(written: str, reference: str) -> dict[str, float]:
    """F1 of ROUGE-1, ROUGE-2 and ROUGE-L with the Porter stemmer, and their geometric mean; 0..1.

    Source: SCROLLS (arXiv 2201.03533), which Unlimiformer and SLED follow: words are what is left of small letters and digits, ROUGE-L is of
    the whole text as one sentence, ``geometric_mean = (r1 r2 rL)^(1/3)``.

    Returns:
        rouge1, rouge2, rougeL, geometric_mean.

    Raises:
        InputError: rouge-score is not installed.

    Example:
        >>> found = rouge("the whale sinks the ship", "the whale sank a ship")  # 3 words of 5 and 5, 1 pair of 4 and 4
        >>> [round(found[name], 4) for name in NAMES]
        [0.6, 0.25, 0.6]
        >>> round(found["geometric_mean"] ** 3, 4) == 0.6 * 0.25 * 0.6
        True
    """
    found = {name: float(score.fmeasure) for name, score in _scorer().score(reference, written).items()}
    return found | {"geometric_mean": (found["rouge1"] * found["rouge2"] * found["rougeL"]) ** (1 / 3)}


@cache
def _scorer() -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise InputError("ROUGE needs the package rouge-score, which is not installed: pip install 'infini-attention[summaries]'") from None
    # It announces its tokenizer, which nobody asked for, on a stream that it keeps from when it was imported.
    logging.getLogger("absl").setLevel(logging.WARNING)
    return RougeScorer(NAMES, use_stemmer=True)
