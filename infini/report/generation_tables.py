"""Markdown of what was measured while models write: time for each token, memory of long prompts, answers that lm-eval scored."""

from collections.abc import Mapping
from typing import Any

from infini.report.tables import MIB, _table, caption


def decode_table(record: Mapping[str, Any]) -> str:
    """One line per model, context and way to decode, and what a longer text costs.

    Args:
        record: of kind "decode"; rows as of `infini.bench.decode.run`.
    """
    head = ["size", "model", "context, tokens", "state or cache, MiB", "decoding", "ms a token", "tokens/s", "of its shortest"]
    head += ["peak memory, MiB"]
    lines, shortest = [], {}
    for row in record["rows"]:
        own = [row["size"], row["model"], f"{row['context']:,}", f"{row['state_bytes'] / MIB:,.1f}"]
        if row.get("out_of_memory"):
            lines.append([*own, "-", "out of memory", "-", "-", "-"])
            continue
        first = shortest.setdefault((row["size"], row["model"], row["path"]), row["milliseconds"])
        peak = f"{row['peak_memory_bytes'] / MIB:,.0f}" if "peak_memory_bytes" in row else "-"
        speed = [f"{row['milliseconds']:.3f}", f"{row['tokens_per_second']:,.0f}", f"{row['milliseconds'] / first:.3f}"]
        lines.append([*own, row["path"], *speed, peak])
    config = record["config"]
    sizes = ", ".join(f"{name} {size['parameters'] / 1e6:,.0f}M parameters" for name, size in config["sizes"].items())
    note = (
        f"Batch of one, weights {config['dtype'].removeprefix('torch.')}, greedy, every token fetched; medians of {config['repeats']} times "
        f"{config['tokens']} tokens. {sizes}. `infini` has a memory and has read the context; `plain` is causal attention of the same "
        "shape over a cache that was allocated once, filled with random numbers.\n\n"
    )
    return f"# Speed of decoding\n\n{_table(head, lines)}\n{note}{caption(record)}"


def peak_table(record: Mapping[str, Any]) -> str:
    """One line per way to read and length, and how much a longer prompt takes.

    Args:
        record: of kind "peak"; rows as of `infini.tasks.long_prompt.long_prompts`.
    """
    head = ["read by", "prompt, tokens", "key", "answer", "right", "seconds", "tokens/s", "state, bytes", "peak memory, MiB"]
    head += ["growth, bytes a token", "of its shortest"]
    lines, shortest = [], {}
    for row in sorted(record["rows"], key=lambda row: (row["way"], row["length"])):
        first = shortest.setdefault(row["way"], row)
        more = row["length"] - first["length"]
        growth = f"{(row['peak_memory_bytes'] - first['peak_memory_bytes']) / more:.2f}" if more else "-"
        lines.append(
            [
                row["way"],
                f"{row['length']:,}",
                str(row["key"]),
                f"`{row['answer'].splitlines()[0] if row['answer'].strip() else ''}`",
                "yes" if row["exact"] else "no",
                f"{row['seconds']:.2f}",
                f"{row['length'] / row['seconds']:,.0f}",
                f"{row['state_bytes']:,}",
                f"{row['peak_memory_bytes'] / MIB:,.1f}",
                growth,
                f"{row['peak_memory_bytes'] / first['peak_memory_bytes']:.4f}",
            ]
        )
    return f"# Peak memory of long prompts\n\n{_table(head, lines)}\n{caption(record)}"


def lm_eval_table(record: Mapping[str, Any]) -> str:
    """One line per task and metric, as lm-eval reports them.

    Args:
        record: of kind "lm_eval"; rows as of `infini.evaluate.kept.rows_of`.
    """
    lines = []
    for row in record["rows"]:
        value = row["value"]
        if isinstance(value, Mapping):
            shown = ", ".join(f"{cell}: {share:g}" for cell, share in value.items())
        else:
            shown = f"{value:.4g}" if isinstance(value, float) else str(value)
        lines.append([row["task"], row["metric"], str(row["samples"]), shown])
    return f"# lm-eval\n\n{_table(['task', 'metric', 'samples', 'value'], lines)}\n{caption(record)}"
