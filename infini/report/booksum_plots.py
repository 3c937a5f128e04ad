"""The picture of a booksum record: scores by how much of a book was read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from infini.report.booksum import _scaled, cells_of, cloze, gap, score, variants
from infini.report.plots import _png


def booksum_curves(record: Mapping[str, Any]) -> bytes:
    """Three panels by tokens read: wrong-book gap, cloze accuracy beyond local reach, ROUGE; bars are 95 % intervals.

    Args:
        record: of kind "booksum", with rows as in `infini.report.booksum.booksum_table`.

    Returns:
        A PNG, without date or version in it.
    """
    from matplotlib.figure import Figure

    def turned(rows):
        found = cloze(rows)
        return None if found is None else _scaled(found["turned"], 100)

    def geometric(rows):
        found = score(rows, "geometric_mean", "greedy")
        return None if found is None else _scaled(found, 100)

    panels = [
        ("right book against wrong book, nats a token", lambda rows: gap(rows, per_token=True), 0.0),
        ("cloze pairs right way round, beyond local reach, %", turned, 50.0),
        ("ROUGE-1/2/L, geometric mean, greedy, %", geometric, None),
    ]
    figure = Figure(figsize=(15, 4.4), layout="constrained")
    for axes, (title, measure, chance) in zip(figure.subplots(1, 3), panels, strict=True):
        for i, ((model, variant), rows) in enumerate(variants(record).items()):
            label, drawn = variant if model == "-" else f"{model}, {variant}", []
            for _, there in cells_of(record, rows):
                if (value := measure(there)) is not None:
                    drawn.append((max(row["input_tokens"] for row in there), value))
            if model == "-" and drawn:
                axes.axhline(drawn[-1][1][0], color=f"C{i}", linestyle=":", label=label)
            elif drawn:
                x, middle = [x for x, _ in drawn], [value[0] for _, value in drawn]
                spread = [[0.0 if v[end] is None else abs(v[0] - v[end]) for _, v in drawn] for end in (1, 2)]
                axes.errorbar(x, middle, yerr=spread, fmt="-o", color=f"C{i}", capsize=2, markersize=4, label=label)
        if chance is not None:
            axes.axhline(chance, color="gray", linewidth=0.8)
        axes.set_xscale("log", base=2)
        axes.set_xlabel("tokens read, at most")
        axes.set_title(title, fontsize="medium")
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize="x-small")
    return _png(figure)
