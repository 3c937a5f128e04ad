"""A sweep as one picture."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from infini.report.plots import _png
from infini.report.pooled import capacity_cells, passkey_cells
from infini.report.sweep import Setting, Sweep
from infini.report.sweep_tables import name_of

Cells = Callable[[Setting, str], list[dict[str, Any]]]


def sweep_curves(sweep: Sweep) -> bytes | None:
    """A line for each row, with 95 % intervals: a panel for each passkey evaluation by length, and for each distance of a capacity
    evaluation by pairs.

    Returns:
        A PNG, without date or version in it; None where there is neither.
    """
    panels = [panel for evaluation in sweep.evaluations() for panel in _panels(sweep, evaluation)]
    if not panels:
        return None
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.2 + 4.4 * len(panels), 4.4), layout="constrained")
    for axes, (title, across, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for i, (name, points) in enumerate(lines.items()):
            x, shares, low, high = ([point[j] for point in points] for j in range(4))
            axes.plot(x, shares, "-o", color=f"C{i}", markersize=4, label=name)
            axes.fill_between(x, low, high, color=f"C{i}", alpha=0.15, linewidth=0)
        axes.set_xscale("log", base=2)
        axes.set_ylim(-3, 103)
        axes.set_xlabel(across)
        axes.set_ylabel("%")
        axes.set_title(title, fontsize="medium")
    figure.axes[0].legend(fontsize="x-small")
    return _png(figure)


def _panels(sweep: Sweep, evaluation: str) -> list[tuple[str, str, dict[str, list[Sequence[float]]]]]:
    """Title, what is across, and the lines of each panel: points of place, share, low and high, the last three in percent."""
    lengths = _lines(sweep, evaluation, passkey_cells, "length", "exact_match")
    found = [(f"{evaluation}: exact match", "length, tokens", lengths)] if lengths else []
    cells = [cell for setting in sweep.best() for cell in capacity_cells(setting, evaluation)]
    for distance in sorted({cell["distance"] for cell in cells}):

        def here(setting: Setting, name: str, distance: int = distance) -> list[dict[str, Any]]:
            return [cell for cell in capacity_cells(setting, name) if cell["distance"] == distance]

        lines = _lines(sweep, evaluation, here, "pairs", "digit_accuracy")
        found.append((f"{evaluation}: digits right, {distance:,} bytes away", "pairs stated", lines))
    return found


def _lines(sweep: Sweep, evaluation: str, cells: Cells, across: str, share: str) -> Mapping[str, list[Sequence[float]]]:
    names = (across, share, "low", "high")
    found = {name_of(setting): cells(setting, evaluation) for setting in sweep.best()}
    return {
        name: [[point[what] * (1 if what == across else 100) for what in names] for point in points] for name, points in found.items() if points
    }
