"""The evaluations of a setting's seeds taken together."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from statistics import median
from typing import Any

from infini.errors import InputError
from infini.report.intervals import paired_difference, wilson_interval
from infini.report.sweep import Setting


def measured(setting: Setting, evaluation: str, kind: str) -> Iterator[Mapping[str, Any]]:
    """The records of this kind and name, of each seed that has one."""
    for run in setting.runs:
        record = run.evaluations.get(evaluation)
        if record is not None and record["kind"] == kind:
            yield record


def passkey_cells(setting: Setting, evaluation: str) -> list[dict[str, Any]]:
    """Each length of a setting's passkey records: exact match of all prompts at all depths and of all seeds.

    Returns:
        By length: length, seeds, prompts, exact_match, low, high (95 %), digit_accuracy, worst_seed (its exact match over all
        depths), worst_depth (its exact match over all seeds, and the depth).
    """
    records = list(measured(setting, evaluation, "passkey"))
    found = []
    for length in sorted({row["length"] for record in records for row in record["rows"]}):
        rows = [(seed, row) for seed, record in enumerate(records) for row in record["rows"] if row["length"] == length]
        prompts, right = _right(row for _, row in rows)
        low, high = wilson_interval(right, prompts)
        by_seed = _shares((seed, row) for seed, row in rows)
        by_depth = _shares((row["depth"], row) for _, row in rows)
        found.append(
            {
                "length": length,
                "seeds": len(by_seed),
                "prompts": prompts,
                "exact_match": right / prompts,
                "low": low,
                "high": high,
                "digit_accuracy": math.fsum(row["samples"] * row["digit_accuracy"] for _, row in rows) / prompts,
                "worst_seed": min(by_seed.values()),
                "worst_depth": min((share, depth) for depth, share in by_depth.items()),
            }
        )
    return found


def capacity_cells(setting: Setting, evaluation: str) -> list[dict[str, Any]]:
    """Each distance and number of pairs of a setting's capacity records.

    Returns:
        distance, pairs, seeds, names (asked in all), digit_accuracy with low and high (95 %), exact_match.
    """
    records = list(measured(setting, evaluation, "capacity"))
    rows: dict[tuple[int, int], list[Mapping[str, Any]]] = {}
    for record in records:
        for row in record["rows"]:
            rows.setdefault((row["distance"], row["pairs"]), []).append(row)
    found = []
    for (distance, pairs), cell in sorted(rows.items()):
        names = sum(row["names"] for row in cell)
        shares = {what: math.fsum(row["names"] * row[what] for row in cell) / names for what in ("digit_accuracy", "exact_match")}
        low, high = wilson_interval(shares["digit_accuracy"] * names, names)
        found.append({"distance": distance, "pairs": pairs, "seeds": len(cell), "names": names, **shares, "low": low, "high": high})
    return found


def speed_cells(setting: Setting, evaluation: str) -> list[dict[str, Any]]:
    """What a setting's speed records time, seeds taken together.

    Returns:
        By what and length: what, length, seeds, tokens_per_second and peak_memory_bytes (the median and the largest; None where it did not
        fit for one of them), state_bytes.
    """
    rows: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    for record in measured(setting, evaluation, "speed"):
        for row in record["rows"]:
            rows.setdefault((row["what"], row["length"]), []).append(row)
    found = []
    for (what, length), cell in rows.items():
        fits = all(row["tokens_per_second"] is not None for row in cell)
        rate = median(row["tokens_per_second"] for row in cell) if fits else None
        peak = max(row["peak_memory_bytes"] for row in cell) if fits else None
        numbers = {"tokens_per_second": rate, "peak_memory_bytes": peak, "state_bytes": cell[0]["state_bytes"]}
        found.append({"what": what, "length": length, "seeds": len(cell), **numbers})
    return found


def compare(records: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]]) -> tuple[float, float, float]:
    """By how many bits per byte the models of some records predict documents worse than those of others, with a 95 % interval.

    Args:
        records: perplexity records of one setting, one for each seed.
        others: of another.

    Raises:
        InputError: they did not read the same documents.
    """
    first, second = _by_document(records), _by_document(others)
    if first.keys() != second.keys():
        odd = sorted(first.keys() ^ second.keys())[0]
        raise InputError(f"document {odd[0]!r} was read by one of two models that are compared: measure both on the same texts")
    for document in first:
        if first[document][1] != second[document][1]:
            raise InputError(f"document {document[0]!r} has two sizes in records that are compared: measure both on the same texts")
    names = sorted(first)
    columns = ([side[name][0] / math.log(2) for name in names] for side in (first, second))
    return paired_difference(*columns, [first[name][1] for name in names])


def _by_document(records: Sequence[Mapping[str, Any]]) -> dict[tuple[str, int], tuple[float, int]]:
    """For each document its nats averaged over records and its bytes; of documents with one name the first is told from the second."""
    found: dict[tuple[str, int], list[tuple[float, int]]] = {}
    for record in records:
        seen: Counter[str] = Counter()
        for row in record["rows"]:
            found.setdefault((row["document"], seen[row["document"]]), []).append((row["nll"], row["bytes"]))
            seen[row["document"]] += 1
    return {name: (math.fsum(nll for nll, _ in rows) / len(rows), rows[0][1]) for name, rows in found.items()}


def _right(rows: Iterable[Mapping[str, Any]]) -> tuple[int, int]:
    """Prompts, and how many of them were answered."""
    counted = [(row["samples"], round(row["samples"] * row["exact_match"])) for row in rows]
    return sum(prompts for prompts, _ in counted), sum(right for _, right in counted)


def _shares(named: Iterable[tuple[Any, Mapping[str, Any]]]) -> dict[Any, float]:
    """Exact match of the rows of each name."""
    groups: dict[Any, list[Mapping[str, Any]]] = {}
    for name, row in named:
        groups.setdefault(name, []).append(row)
    counted = {name: _right(rows) for name, rows in groups.items()}
    return {name: right / prompts for name, (prompts, right) in counted.items()}
