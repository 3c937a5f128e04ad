"""Pictures from records."""

import io
from collections.abc import Mapping
from typing import Any

from infini.report.perplexity import by_position, models_of
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
    return _png(figure)


def capacity_curves(record: Mapping[str, Any]) -> bytes:
    """Digits right by number of pairs: a panel for each distance, a color for each d_k, with its theory and chance.

    Args:
        record: of kind "capacity", with rows as in `capacity_table`.

    Returns:
        A PNG, without date or version in it.
    """
    from matplotlib.figure import Figure

    rows = record["rows"]
    distances = sorted({row["distance"] for row in rows})
    models = sorted({(row["key_dim"], row["model"]) for row in rows})
    figure = Figure(figsize=(1.5 + 3.2 * len(distances), 4.2), layout="constrained")
    for axes, distance in zip(figure.subplots(1, len(distances), sharey=True, squeeze=False)[0], distances, strict=True):
        for i, (key_dim, model) in enumerate(models):
            cells = [row for row in rows if (row["key_dim"], row["model"], row["distance"]) == (key_dim, model, distance)]
            cells.sort(key=lambda row: row["pairs"])
            pairs = [row["pairs"] for row in cells]
            for name, style in (("digit_accuracy", "-o"), ("theory_linear", "--"), ("theory_delta", ":")):
                label = {"digit_accuracy": f"{model}, d_k = {key_dim}"}.get(name, f"{name.replace('_', ', ')}, d_k = {key_dim}")
                axes.plot(pairs, [100 * row[name] for row in cells], style, color=f"C{i}", label=label)
        axes.axhline(10, color="gray", linewidth=0.8, label="chance")
        axes.set_xscale("log", base=2)
        axes.set_ylim(0, 103)
        axes.set_xlabel("pairs stated, five digits each")
        axes.set_title(f"{distance:,} tokens of filler", fontsize="medium")
    figure.axes[0].set_ylabel("digits right, %")
    figure.axes[0].legend(fontsize="x-small", loc="lower left")
    return _png(figure)


def speed_curves(record: Mapping[str, Any]) -> bytes:
    """Tokens a second by length, a panel for each of reading, writing and training; a color a model.

    Args:
        record: of kind "speed", with rows as in `speed_table`.

    Returns:
        A PNG, without date or version in it.
    """
    from matplotlib.figure import Figure

    rows = [row for row in record["rows"] if row["tokens_per_second"] is not None]
    kinds, models = (list(dict.fromkeys(row[name] for row in record["rows"])) for name in ("what", "model"))
    figure = Figure(figsize=(1 + 3.6 * len(kinds), 4.2), layout="constrained")
    for axes, what in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds, strict=True):
        for i, model in enumerate(models):
            points = [(row["length"], row["tokens_per_second"]) for row in rows if (row["what"], row["model"]) == (what, model)]
            if points:
                axes.plot(*zip(*points, strict=True), "-o", color=f"C{i % 10}", markersize=3, label=model)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("length, tokens")
        axes.set_title(what, fontsize="medium")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("tokens a second")
    figure.axes[0].legend(fontsize="x-small")
    return _png(figure)


def drift_curves(record: Mapping[str, Any]) -> bytes:
    """Error of the read and of the memories by tokens of stream, both logarithmic.

    Args:
        record: of kind "drift", with rows as in `drift_table`.

    Returns:
        A PNG, without date or version in it.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    for i, model in enumerate(sorted({row["model"] for row in record["rows"]})):
        rows = sorted((row for row in record["rows"] if row["model"] == model), key=lambda row: row["tokens"])
        for name, style, what in (("read_error", "-o", "the read"), ("matrix_error", "--", "M"), ("normalizer_error", ":", "z")):
            shown = [(row["tokens"], row[name]) for row in rows if row[name] is not None]
            if shown:
                axes.plot(*zip(*shown, strict=True), style, color=f"C{i}", label=f"{what}, {model}")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("tokens of stream")
    axes.set_ylabel("relative error of fp32")
    axes.legend(fontsize="small")
    return _png(figure)


def perplexity_curves(record: Mapping[str, Any]) -> bytes:
    """Token perplexity by position in the document, a color a model, dashed without its memory.

    Positions that few documents reach are of those alone: the end of a curve is of the longest documents.

    Args:
        record: of kind "perplexity", with rows as in `perplexity_table`.

    Returns:
        A PNG, without date or version in it.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.6), layout="constrained")
    axes = figure.subplots()
    for i, (model, rows) in enumerate(models_of(record).items()):
        cells = by_position(rows)
        places = [1.5 * cell["from"] for cell in cells]  # the middle of 2^b to 2^(b + 1)
        for name, style, what in (("token_perplexity", "-o", ""), ("token_perplexity_without_memory", "--", ", without memory")):
            if all(cell[name] is not None for cell in cells):
                axes.plot(places, [cell[name] for cell in cells], style, color=f"C{i}", markersize=3, label=model + what)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("position in the document, tokens")
    axes.set_ylabel("token perplexity")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    return _png(figure)


def roofline(record: Mapping[str, Any]) -> bytes:
    """FLOP per second by FLOP per byte, under the two ceilings of the run; a color a row, a mark a direction. Loss curves below.

    Args:
        record: of kind "bench", with rows as in `bench_table`; those without bytes or FLOP are left out.

    Returns:
        A PNG, without date or version in it.
    """
    from matplotlib.figure import Figure

    ceilings, points = record["ceilings"], {}
    for row in record["rows"]:
        if row.get("bytes") and row.get("flop"):
            what = f"{row['part']}: {row['what']}, {row.get('rule', row.get('kernel', '-'))}, {row.get('backend', 'kernel alone')}"
            points.setdefault(what, []).append(row)
    figure = Figure(figsize=(9.6, 5.4), layout="constrained")
    curves = [row for row in record["rows"] if "losses" in row]
    axes, *others = figure.subplots(1 + len(curves), squeeze=False)[:, 0]
    for other, row in zip(others, curves, strict=True):
        for name, style, what in (("fp32_losses", "k-", "fp32"), ("plain_losses", "C0-", "bf16"), ("losses", "C1--", "bf16, kernels")):
            other.plot(range(1, len(row[name]) + 1), row[name], style, linewidth=1, label=what)
        other.set_xlabel("step")
        other.set_ylabel(f"loss, {row['rule']}, nats")
        other.legend(fontsize="xx-small")
    spread = [row["flop"] / row["bytes"] for rows in points.values() for row in rows] or [1.0]
    reach = [min(spread) / 2, max(*spread, ceilings["product_flop_per_second"] / ceilings["copy_bytes_per_second"]) * 2]
    ridge = ceilings["product_flop_per_second"] / ceilings["copy_bytes_per_second"]
    xs = sorted([*reach, ridge])
    axes.plot(xs, [min(x * ceilings["copy_bytes_per_second"], ceilings["product_flop_per_second"]) / 1e12 for x in xs], "k-", label="ceilings")
    marks = {"forward": "o", "forward + backward": "s"}
    for i, (what, rows) in enumerate(points.items()):
        for row in rows:
            done = row["flop"] / row["milliseconds"] / 1e9
            label = what if row is rows[0] else None
            axes.plot(row["flop"] / row["bytes"], done, marks.get(row.get("direction"), "^"), color=f"C{i % 10}", label=label)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("FLOP per byte that must be moved")
    axes.set_ylabel("TFLOP/s")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter(lambda x, _: f"{x:g}" if f"{x:.0e}"[0] in "25" else "")
    drawn = {row.get("direction") for rows in points.values() for row in rows}
    for direction in sorted(drawn & set(marks)):
        axes.plot([], [], marks[direction], color="black", fillstyle="none", label=direction)
    axes.grid(alpha=0.3)
    figure.legend(fontsize="xx-small", loc="outside right upper")
    return _png(figure)


def _png(figure: Any) -> bytes:
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=120, metadata={"Software": None})
    return png.getvalue()
