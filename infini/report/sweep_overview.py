"""A sweep's passkey results with one line a row: how its learning rate was picked, and what its seeds find at each length."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from infini.report.pooled import measured
from infini.report.sweep import LARGER_IS_BETTER, NOT_BEGUN, UNFINISHED, Setting, Sweep, _as_number, validation
from infini.report.tables import _table

NONE = "-"


def overview_table(sweep: Sweep, evaluation: str) -> str:
    """One line per row, in the order of the sweep: rows that failed or are not finished stay in it and say so.

    Args:
        sweep: as gathered.
        evaluation: name of records of kind "passkey".

    Returns:
        Markdown: seeds that were asked, the picked rate, what it was picked by at every rate, then for each length exact match and digits
        as mean over seeds and in brackets the worst and the best of them where they differ; last how far gradients and states reached in training.
    """
    rates = [rate for rate in dict.fromkeys(s.rate for s in sorted(sweep.settings, key=lambda s: _as_number(s.rate))) if rate]
    by_seed = [[seed_shares(record) for record in measured(best, evaluation, "passkey")] for best in sweep.best()]
    lengths = sorted({length for seeds in by_seed for seed in seeds for length in seed})
    head = [*sweep.keys, "seeds", *(["learning rate"] if rates else []), *(f"`{sweep.pick}` at {rate}" for rate in rates)]
    head += [f"{length:,}: {what}" for length in lengths for what in ("exact match", "digits right")]
    head += ["gradient through at most, tokens", "states of texts up to, tokens"]
    lines = []
    for row, best, seeds in zip(sweep.rates().values(), sweep.best(), by_seed, strict=True):
        line = [*best.values, f"{len(seeds)} of {len(best.runs)}", *([best.rate] if rates else [])]
        line += [_picked_by(sweep, {setting.rate: setting for setting in row}.get(rate), best) for rate in rates]
        for length in lengths:
            shares = [seed[length] for seed in seeds if length in seed]
            line += [_over_seeds([share[i] for share in shares], len(seeds)) for i in (0, 1)]
        lines.append(line + [f"{max(found):,}" if (found := best.metric(name)) else NONE for name in ("gradient_tokens", "text_tokens")])
    return f"{_table(head, lines)}\n{NOTE}"


NOTE = (
    "Depths pooled; means over seeds, in brackets the worst and the best of them where they differ. Seeds: how many were asked, of those "
    "planned at the picked rate (bold)."
)


def seed_shares(record: Mapping[str, Any]) -> dict[int, tuple[float, float]]:
    """Exact match and digits right of one passkey record at each length, depths pooled.

    >>> rows = [{"length": 8, "samples": n, "exact_match": share, "digit_accuracy": 1.0} for n, share in ((3, 1.0), (1, 0.0))]
    >>> seed_shares({"rows": rows})
    {8: (0.75, 1.0)}
    """
    found = {}
    for length in sorted({row["length"] for row in record["rows"]}):
        rows = [row for row in record["rows"] if row["length"] == length]
        prompts = sum(row["samples"] for row in rows)
        found[length] = tuple(math.fsum(row["samples"] * row[what] for row in rows) / prompts for what in ("exact_match", "digit_accuracy"))
    return found


def _over_seeds(shares: Sequence[float], seeds: int) -> str:
    if not shares:
        return NONE
    low, high = (f"{100 * share:.1f}" for share in (min(shares), max(shares)))
    spread = f" ({low} to {high})" if low != high else ""
    few = f", {len(shares)} of {seeds} seeds" if len(shares) < seeds else ""
    return f"{100 * math.fsum(shares) / len(shares):.1f} %{spread}{few}"


def _picked_by(sweep: Sweep, setting: Setting | None, best: Setting) -> str:
    if setting is None:
        return NONE
    values = [value for run in setting.finished if (value := validation(run, sweep.pick)) is not None]
    if not values:
        problems = {run.problem for run in setting.runs}
        return "not measured" if setting.finished else next((p for p in (UNFINISHED, NOT_BEGUN) if p in problems), "failed")
    mean = math.fsum(values) / len(values)
    text = f"{100 * mean:.1f} %" if sweep.pick.rpartition("/")[2] in LARGER_IS_BETTER else f"{mean:.4g}"
    text += f" ({len(values)} of {len(setting.runs)})" if len(values) < len(setting.runs) else ""
    return f"**{text}**" if setting is best else text
