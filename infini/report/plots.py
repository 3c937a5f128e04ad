"""Pictures from records."""

import io
from collections.abc import Mapping
from typing import Any

from infini.report.tables import passkey_title


def passkey_heat_map(record: Mapping[str, Any]) -> bytes:
    """Exact match by length (across) and depth (down); cells that were not run stay gray.

    Args:
        record: of kind "passkey", with rows as in `passkey_table`.

    Returns:
        A PNG, without date or version in it.
    """
    import numpy as np
    from matplotlib.figure import Figure  # no pyplot: no window system, no global state

    cells = {(row["length"], row["depth"]): row["exact_match"] for row in record["rows"]}
    lengths, depths = (sorted({cell[axis] for cell in cells}) for axis in (0, 1))
    values = np.array([[cells.get((length, depth), np.nan) for length in lengths] for depth in depths])

    figure = Figure(figsize=(1.8 + 0.9 * len(lengths), 1.8 + 0.5 * len(depths)), layout="constrained")
    axes = figure.subplots()
    axes.set_facecolor("lightgray")
    image = axes.imshow(100 * values, cmap="RdYlGn", vmin=0, vmax=100, aspect="auto")
    for (y, x), value in np.ndenumerate(values):
        axes.text(x, y, "not run" if np.isnan(value) else f"{100 * value:.0f}", ha="center", va="center")
    axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
    axes.set_yticks(range(len(depths)), [f"{depth:g}" for depth in depths])
    axes.set_xlabel("length, tokens")
    axes.set_ylabel("depth of the key")
    axes.set_title(f"{passkey_title(record)}, exact match")
    figure.colorbar(image, label="%")
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=120, metadata={"Software": None})
    return png.getvalue()
