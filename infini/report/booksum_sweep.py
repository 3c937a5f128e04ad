"""What the models of a sweep know of whole books, seeds pooled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from infini.report.booksum import _pair, _share, cloze, gap, rows_at, score, worth
from infini.report.pooled import measured
from infini.report.sweep import Sweep
from infini.report.tables import _table


def books_table(sweep: Sweep, evaluation: str) -> str:
    """One line per row of a sweep, after whole books.

    Args:
        sweep: as gathered.
        evaluation: name of records of kind "booksum".
    """
    head = [*sweep.keys, "seeds", "books", "wrong-book gap, nats a token", "memory silenced", "difference"]
    head += ["pairs right way round, beyond local reach", "memory silenced", "ROUGE, geometric mean, greedy"]
    lines = []
    for setting in sweep.best():
        records = list(measured(setting, evaluation, "booksum"))
        loud, silent = (_rows(records, variant) for variant in ("whole model", "memory silenced"))
        asked = [cloze(rows) for rows in (loud, silent)]
        line = [*setting.values, f"{len(records)} of {len(setting.runs)}", str(len({row["book"] for row in loud}))]
        line += [_pair(gap(rows, per_token=True), "{:.4f}") for rows in (loud, silent)] + [_pair(worth(loud, silent)["gap"], "{:+.4f}")]
        line += ["-" if found is None else _share(found["turned"]) for found in asked]
        lines.append([*line, _share(score(loud, "geometric_mean", "greedy"))])
    note = (
        "After whole books, seeds pooled. Brackets: 95 % intervals, books resampled, each with all its seeds; they hold for other books, "
        "not for other seeds."
    )
    return f"{_table(head, lines)}\n{note}"


def _rows(records: Sequence[Mapping[str, Any]], variant: str) -> list[Mapping[str, Any]]:
    return [row for record in records for row in rows_at([row for row in record["rows"] if row["variant"] == variant], None)]
