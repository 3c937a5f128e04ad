"""A sweep as one picture."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from infini.report.perplexity import by_position
from infini.report.plots import _png
from infini.report.pooled import capacity_cells, measured, passkey_cells, speed_cells
from infini.report.sweep import Setting, Sweep
from infini.report.sweep_tables import name_of

_FEW = 500  # tokens; at the first positions there are fewer, and their losses are of another size
Cells = Callable[[Setting, str], list[dict[str, Any]]]


@dataclass(frozen=True)
class Panel:
    """One part of the picture.

    Attributes:
        title, across, up: what it shows, and of its axes.
        lines: of each row points of place, value, and for intervals low and high.
        percent: values go from 0 to 100.
    """

    title: str
    across: str
    up: str
    lines: Mapping[str, Sequence[Sequence[float]]]
    percent: bool = True


def sweep_curves(sweep: Sweep, against: str | None = None) -> bytes | None:
    """A line for each row: a panel for each passkey evaluation by length and for each distance of a capacity evaluation by pairs, with
    95 % intervals; for each perplexity evaluation one by position in the document, and one of the difference to a row.

    Args:
        sweep: as gathered.
        against: name of that row; None: the first.

    Returns:
        A PNG, without date or version in it; None where there is none of these.
    """
    panels = [panel for evaluation in sweep.evaluations() for panel in _panels(sweep, evaluation, against)]
    if not panels:
        return None
    from matplotlib.figure import Figure

    names = [name_of(setting) for setting in sweep.best()]
    across = min(len(panels), 3)
    down = -(-len(panels) // across)
    figure = Figure(figsize=(4.6 * across, 3.9 * down + 0.25 * -(-len(names) // (2 * across))), layout="constrained")
    places = figure.subplots(down, across, squeeze=False).ravel()
    for axes in places[len(panels) :]:
        axes.remove()
    for axes, panel in zip(places, panels, strict=False):
        for name, points in panel.lines.items():
            turn, hue = divmod(names.index(name), 10)
            color = f"C{hue}"
            x, value, *interval = zip(*points, strict=True)
            axes.plot(x, value, ("-o", "--s", ":^")[turn % 3], color=color, markersize=3, linewidth=1.3, label=name)
            if interval:
                axes.fill_between(x, *interval, color=color, alpha=0.12, linewidth=0)
        axes.set_xscale("log", base=2)
        if panel.percent:
            axes.set_ylim(-3, 103)
        axes.grid(alpha=0.3)
        axes.set_xlabel(panel.across)
        axes.set_ylabel(panel.up)
        axes.set_title(panel.title, fontsize="medium")
    handles = {label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    shown = [name for name in names if name in handles]
    figure.legend([handles[name] for name in shown], shown, fontsize="small", loc="outside lower center", ncols=min(len(shown), 2 * across))
    return _png(figure)


def _panels(sweep: Sweep, evaluation: str, against: str | None) -> list[Panel]:
    lengths = _lines(sweep, evaluation, passkey_cells, "length", "exact_match")
    found = [Panel(f"{evaluation}: exact match", "length, tokens", "%", lengths)] if lengths else []
    cells = [cell for setting in sweep.best() for cell in capacity_cells(setting, evaluation)]
    for distance in sorted({cell["distance"] for cell in cells}):

        def here(setting: Setting, name: str, distance: int = distance) -> list[dict[str, Any]]:
            return [cell for cell in capacity_cells(setting, name) if cell["distance"] == distance]

        lines = _lines(sweep, evaluation, here, "pairs", "digit_accuracy")
        found.append(Panel(f"{evaluation}: digits right, {distance:,} tokens away", "pairs stated", "%", lines))
    return found + _perplexity_panels(sweep, evaluation, against) + _speed_panels(sweep, evaluation)


def _lines(sweep: Sweep, evaluation: str, cells: Cells, across: str, share: str) -> Mapping[str, list[Sequence[float]]]:
    names = (across, share, "low", "high")
    found = {name_of(setting): cells(setting, evaluation) for setting in sweep.best()}
    return {
        name: [[point[what] * (1 if what == across else 100) for what in names] for point in points] for name, points in found.items() if points
    }


def _speed_panels(sweep: Sweep, evaluation: str) -> list[Panel]:
    rows = {name_of(setting): [cell for cell in speed_cells(setting, evaluation) if cell["tokens_per_second"]] for setting in sweep.best()}
    found = []
    for what in dict.fromkeys(cell["what"] for cells in rows.values() for cell in cells):
        lines = {name: [(cell["length"], cell["tokens_per_second"]) for cell in cells if cell["what"] == what] for name, cells in rows.items()}
        lines = {name: points for name, points in lines.items() if points}
        found.append(Panel(f"{evaluation}: {what}", "length, tokens", "tokens a second", lines, percent=False))
    return found


def _perplexity_panels(sweep: Sweep, evaluation: str, against: str | None) -> list[Panel]:
    nats = {name_of(setting): _nats_by_position(setting, evaluation) for setting in sweep.best()}
    nats = {name: cells for name, cells in nats.items() if cells}
    if not nats:
        return []
    across = "position in the document, tokens"
    levels = {name: [(place, math.exp(value)) for place, value in cells.items()] for name, cells in nats.items()}
    found = [Panel(f"{evaluation}: by position", across, "token perplexity", levels, percent=False)]
    reference = against if against in nats else next(iter(nats))
    if len(nats) > 1:
        differences = {
            name: [(place, value - nats[reference][place]) for place, value in cells.items() if place in nats[reference]]
            for name, cells in nats.items()
        }
        found.append(Panel(f"{evaluation}: worse than {reference}", across, "nats a token", differences, percent=False))
    return found


def _nats_by_position(setting: Setting, evaluation: str) -> dict[float, float]:
    """Mean loss of the tokens at positions from 2^b to 2^(b+1) - 1, all documents and seeds together, by the middle of these; where there are few
    tokens, none."""
    rows = [row for record in measured(setting, evaluation, "perplexity") for row in record["rows"]]
    return {1.5 * cell["from"]: math.log(cell["token_perplexity"]) for cell in by_position(rows) if cell["tokens"] >= _FEW}
