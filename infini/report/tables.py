"""Markdown from records: the same record gives the same bytes."""

from collections.abc import Mapping, Sequence
from typing import Any

MIB = 2**20


def passkey_table(record: Mapping[str, Any]) -> str:
    """One line per length and depth, sorted.

    Args:
        record: of kind "passkey"; each row has at least length (tokens), depth (0..1), samples, exact_match and
            digit_accuracy (shares), tokens_per_second, peak_memory_bytes.

    Returns:
        Markdown with a caption of the run's provenance.
    """
    head = ["length", "depth", "samples", "exact match", "95 % interval", "digits right"]
    head += ["cut by a border", "tokens/s", "peak memory, MiB"]
    lines = []
    for row in sorted(record["rows"], key=lambda row: (row["length"], row["depth"])):
        interval = cut = "-"
        if "exact_match_low" in row:
            interval = f"{_percent(row['exact_match_low'])} to {_percent(row['exact_match_high'])}"
        if row.get("border_cut"):
            cut = f"{_percent(row['border_cut_exact_match'])} of {row['border_cut']}"
        lines.append(
            [
                f"{row['length']:,}",
                f"{row['depth']:g}",
                str(row["samples"]),
                _percent(row["exact_match"]),
                interval,
                _percent(row["digit_accuracy"]),
                cut,
                f"{row['tokens_per_second']:,.0f}",
                f"{row['peak_memory_bytes'] / MIB:,.0f}",
            ]
        )
    return f"# {passkey_title(record)}\n\n{_table(head, lines)}\n{caption(record)}"


def passkey_title(record: Mapping[str, Any]) -> str:
    """What was asked: the kind of needle, where it is not the plain pass key.

    >>> passkey_title({"config": {"needle": "updated"}})
    'Passkey, needle updated'
    """
    needle = record["config"].get("needle", "passkey")
    return "Passkey" if needle == "passkey" else f"Passkey, needle {needle}"


def capacity_table(record: Mapping[str, Any]) -> str:
    """One line per model, distance and number of pairs, with the theory of one head beside it.

    Args:
        record: of kind "capacity"; rows as of `infini.tasks.recall.capacity.capacity`, each with its model.
    """
    head = ["model", "d_k", "distance", "pairs", "digits stored", "names asked", "digits right", "all five right"]
    head += ["theory, linear", "theory, delta"]
    shares = ("digit_accuracy", "exact_match", "theory_linear", "theory_delta")
    lines = [
        [
            row["model"],
            *(f"{row[name]:,}" for name in ("key_dim", "distance", "pairs", "associations", "names")),
            *(_percent(row[name]) for name in shares),
        ]
        for row in sorted(record["rows"], key=lambda row: (row["key_dim"], row["model"], row["distance"], row["pairs"]))
    ]
    note = (
        "Teacher-forced digits of held-out keys; chance 10 %. Theory: random keys, one head, every digit an association of its "
        "own, no filler.\n\n"
    )
    return f"# Capacity\n\n{_table(head, lines)}\n{note}{caption(record)}"


def drift_table(record: Mapping[str, Any]) -> str:
    """One line per model and length of stream.

    Args:
        record: of kind "drift"; rows as of `infini.tasks.drift.drift`, each with its model.
    """
    head = ["model", "tokens", "error of the read", "error of M, worst layer", "error of z, worst layer"]
    lines = [
        [
            row["model"],
            f"{row['tokens']:,}",
            *("-" if row[name] is None else f"{row[name]:.1e}" for name in ("read_error", "matrix_error", "normalizer_error")),
        ]
        for row in sorted(record["rows"], key=lambda row: (row["model"], row["tokens"]))
    ]
    note = "Relative errors of an fp32 model's memory against its fp64 copy's, after the same stream.\n\n"
    return f"# Drift\n\n{_table(head, lines)}\n{note}{caption(record)}"


def train_table(record: Mapping[str, Any]) -> str:
    """The last metrics of a training run, one line each, with their caption."""
    lines = [[name.replace("_", " "), _number(value)] for name, value in record["metrics"].items()]
    return f"# Training\n\n{_table(['metric', 'value'], lines)}\n{caption(record)}"


def bench_table(record: Mapping[str, Any]) -> str:
    """One line per part and shape: plain PyTorch, the kernels, and the ratio of their times.

    Args:
        record: of kind "bench"; rows as of `infini.bench.memory.run`, both backends of a part.
    """
    parts: dict[tuple[str, str], dict[str, Mapping[str, Any]]] = {}
    for row in record["rows"]:
        shape = "shipped model" if row.get("shape") is None else _shape(row["shape"])
        parts.setdefault((row["part"], shape), {})[row["backend"]] = row
    head = ["part", "rows x tokens / segment, heads : kv heads x width", "torch, ms", "triton, ms", "torch / triton"]
    head += ["triton, tokens/s", "triton / copying the bytes"]
    lines = [
        [
            part,
            shape,
            *(f"{by[name]['milliseconds']:.3f}" for name in ("torch", "triton")),
            f"{by['torch']['milliseconds'] / by['triton']['milliseconds']:.2f}",
            f"{by['triton']['tokens_per_second']:,.0f}",
            f"{by['triton']['floor_ratio']:.2f}" if "floor_ratio" in by["triton"] else "-",
        ]
        for (part, shape), by in parts.items()
    ]
    note = f"Medians. This device copies {record['copy_bytes_per_second'] / 1e12:.2f} TB/s, bytes read and written counted.\n\n"
    return f"# Speed of the memory\n\n{_table(head, lines)}\n{note}{caption(record)}"


def _shape(shape: Mapping[str, Any]) -> str:
    return "{rows} x {tokens:,} / {segment_length:,}, {heads} : {groups} x {head_dim}".format(**shape)


def caption(record: Mapping[str, Any]) -> str:
    """Where the numbers come from: command, commit, seeds, machine, versions, date."""
    source, machine = record["source"], record["machine"]
    commit = source["commit"][:12] if source["commit"] else f"unknown, {source['why']}"
    if source["dirty"]:
        commit += " with uncommitted changes"
    elif source["commit"] and source["dirty"] is None:
        commit += " (stated, not checked)"  # a copy of the tree without its history
    gpus = [gpu["name"] for gpu in machine["gpus"]]
    hardware = ", ".join([f"{machine['cores']} cores of {machine['cpu']}", *gpus])
    seeds = ", ".join(f"{name} {seed}" for name, seed in record["seeds"].items())
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    facts = {
        "command": f"`{record['command']}`",
        "commit": commit,
        **_reach(record),
        "seeds": seeds,
        "machine": hardware,
        "versions": versions,
        "started": f"{record['started']}, {record['seconds']:,.0f} s",
    }
    return "".join(f"- {name}: {fact}\n" for name, fact in facts.items())


def _reach(record: Mapping[str, Any]) -> dict[str, str]:
    """What a number about long texts has to be read beside."""
    trained = record.get("data", {}).get("trained") or record.get("metrics", {})
    if "gradient_tokens" not in trained:
        return {}
    return {
        "trained": f"gradient through at most {trained['gradient_tokens']:,} tokens, states of texts of up to {trained['text_tokens']:,}"
    }


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [head, ["---:"] * len(head), *lines]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"
