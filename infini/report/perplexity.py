"""What a model's rows of a perplexity record say together."""

import math
from collections.abc import Mapping, Sequence
from typing import Any


def perplexity(nll: float, units: int) -> float:
    """exp of the negative log-likelihood per unit. With tokens as units it depends on the tokenizer, with words it does not.

    Args:
        nll: nats, over all tokens.
        units: tokens predicted; or words, whatever tokens they were cut into (the convention of PG19, arXiv 1911.05507).

    >>> round(perplexity(nll=6 * math.log(2), units=3), 12)  # two bits a word
    4.0
    """
    try:
        return math.exp(nll / units)
    except OverflowError:
        return math.inf


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Documents taken together: sums of nll over sums of units, so that long documents count for what they are.

    Args:
        rows: of one model, as of `infini.tasks.perplexity.benchmark.run`.

    Returns:
        documents, tokens, words, bytes, token_perplexity, word_perplexity, bits_per_byte, and
        token_perplexity_without_memory, word_perplexity_without_memory, memory_gain (nats per token that the memory saves), which
        are None where no knock-out was made.

    >>> row = {"tokens": 4, "words": 2, "bytes": 8, "nll": 8 * math.log(2), "nll_without_memory": None}
    >>> found = summary([row, row])
    >>> round(found["token_perplexity"], 9), round(found["word_perplexity"], 9), round(found["bits_per_byte"], 9)
    (4.0, 16.0, 1.0)
    """
    total = {name: sum(row[name] for row in rows) for name in ("tokens", "words", "bytes", "nll")}
    nll, tokens = total.pop("nll"), total["tokens"]
    silent = None if any(row["nll_without_memory"] is None for row in rows) else sum(row["nll_without_memory"] for row in rows)
    return {
        "documents": len(rows),
        **total,
        "token_perplexity": perplexity(nll, tokens),
        "word_perplexity": perplexity(nll, total["words"]),
        "bits_per_byte": nll / math.log(2) / total["bytes"],
        "token_perplexity_without_memory": None if silent is None else perplexity(silent, tokens),
        "word_perplexity_without_memory": None if silent is None else perplexity(silent, total["words"]),
        "memory_gain": None if silent is None else (silent - nll) / tokens,
    }


def by_position(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Perplexity of the tokens at positions from 2^b to 2^(b+1) - 1 of their documents, counted from 0.

    Args:
        rows: of one model.

    Returns:
        For each bucket: from, tokens, documents (that reach it), token_perplexity, token_perplexity_without_memory (or None).
    """
    found = []
    for start in sorted({bucket["from"] for row in rows for bucket in row["by_position"]}):
        cells = [bucket for row in rows for bucket in row["by_position"] if bucket["from"] == start]
        tokens, nll = (sum(cell[name] for cell in cells) for name in ("tokens", "nll"))
        silent = None if any(cell["nll_without_memory"] is None for cell in cells) else sum(cell["nll_without_memory"] for cell in cells)
        found.append(
            {
                "from": start,
                "tokens": tokens,
                "documents": len(cells),
                "token_perplexity": perplexity(nll, tokens),
                "token_perplexity_without_memory": None if silent is None else perplexity(silent, tokens),
            }
        )
    return found


def models_of(record: Mapping[str, Any]) -> dict[str, list[Mapping[str, Any]]]:
    """The rows of each model of a record, in the order in which they were measured."""
    found: dict[str, list] = {}
    for row in record["rows"]:
        found.setdefault(row["model"], []).append(row)
    return found
