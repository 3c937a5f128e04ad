"""Markdown from records: the same record gives the same bytes."""

from collections.abc import Mapping, Sequence
from typing import Any

from infini.report.perplexity import by_position, models_of, summary

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


def speed_table(record: Mapping[str, Any]) -> str:
    """One line per model and what it does, with the lengths across.

    Args:
        record: of kind "speed"; rows as of `infini.tasks.speed.run`, each with its model.
    """
    rows: dict[tuple[str, str], dict[int, Mapping[str, Any]]] = {}
    for row in record["rows"]:
        rows.setdefault((row["model"], row["what"]), {})[row["length"]] = row
    lengths = sorted({row["length"] for row in record["rows"]})
    lines = []
    for (model, what), cells in rows.items():
        states = [cell["state_bytes"] for cell in cells.values() if cell["state_bytes"] is not None]
        state = f"{max(states) / MIB:,.2f}" if states else "-"
        lines.append([model, what, *(speed_cell(cells.get(length)) for length in lengths), state])
    head = ["model", "what", *(f"{length:,}" for length in lengths), "state, MiB"]
    return f"# Speed by length\n\n{_table(head, lines)}\n{SPEED_NOTE}\n\n{caption(record)}"


SPEED_NOTE = (
    "Tokens a second, with the peak memory in GiB: the tensors of a GPU, or the process on a CPU. Reading: of the text since the length before. "
    "Writing: one token after the other, after so long a text. Training: forward and backward of rows of that length, without the optimizer."
)


def speed_cell(row: Mapping[str, Any] | None) -> str:
    """What is said of one row: "12,345 (1.2)", or that it does not fit.

    >>> speed_cell({"tokens_per_second": 12345.6, "peak_memory_bytes": 2**30})
    '12,346 (1.00)'
    """
    if row is None:
        return "-"
    if row["tokens_per_second"] is None:
        return "no room"
    return f"{row['tokens_per_second']:,.0f} ({row['peak_memory_bytes'] / 2**30:.2f})"


def train_table(record: Mapping[str, Any]) -> str:
    """The last metrics of a training run, one line each, with their caption."""
    lines = [[name.replace("_", " "), _number(value)] for name, value in record["metrics"].items()]
    return f"# Training\n\n{_table(['metric', 'value'], lines)}\n{caption(record)}"


def perplexity_table(record: Mapping[str, Any]) -> str:
    """One line per model, all documents together, and one per power of two of the position.

    Args:
        record: of kind "perplexity"; rows as of `infini.tasks.perplexity.benchmark.run`, each with its model.
    """
    models = models_of(record)
    head = ["model", "documents", "tokens", "token perplexity", "without memory", "memory saves, nats a token"]
    head += ["word perplexity", "without memory", "bits per byte", *CARRIED]
    lines = []
    for model, rows in models.items():
        found = summary(rows)
        names = ("token_perplexity", "token_perplexity_without_memory", "memory_gain", "word_perplexity", "word_perplexity_without_memory")
        numbers = [_number(found[name]) for name in names]
        counts = [f"{found['documents']:,}", f"{found['tokens']:,}"]
        lines.append([model, *counts, *numbers, f"{found['bits_per_byte']:.4f}", *carried_cells(rows)])
    positions = {model: {cell["from"]: cell for cell in by_position(rows)} for model, rows in models.items()}
    places = [["positions", "documents", *(name for model in models for name in (model, "without memory"))]]
    for start in sorted({start for cells in positions.values() for start in cells}):
        cells = [cells.get(start) for cells in positions.values()]
        line = [f"{start:,} to {2 * start - 1:,}", f"{max(cell['documents'] for cell in cells if cell):,}"]
        for cell in cells:
            values = ("token_perplexity", "token_perplexity_without_memory")
            line += [_number(cell[name]) for name in values] if cell else ["-", "-"]
        places.append(line)
    note = (
        "Every token but a document's first is scored once, given all before it; positions count from 0. Token perplexity depends on the "
        "tokenizer; word perplexity is exp(nll / words), words being what stands between blanks. Without memory: the model's own silenced "
        f"state, see baselines/README.md. {CARRIED_NOTE}\n\n"
    )
    by_place = f"## Token perplexity by position in the document\n\n{_table(places[0], places[1:])}\n"
    return f"# Perplexity\n\n{_table(head, lines)}\n{by_place}{note}{caption(record)}"


CARRIED = ("carried over a border, numbers", "carried, MiB", "held while writing, peak MiB")
CARRIED_NOTE = (
    "Carried: what crosses a segment border in one text, the memory size of arXiv 2404.07143; held while writing: all that is kept from token to "
    "token, the open segment too, where it is most. Both at the end of the longest document."
)


def carried_cells(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The largest of a model's rows under the heads `CARRIED`.

    >>> carried_cells([{"carried_numbers": 2**20, "carried_bytes": 2**22, "state_bytes": 2**23}])
    ['1,048,576', '4.00', '8.00']
    """
    numbers, carried, state = (max(row[name] for row in rows) for name in ("carried_numbers", "carried_bytes", "state_bytes"))
    return [f"{numbers:,}", f"{carried / MIB:,.2f}", f"{state / MIB:,.2f}"]


def tokenizer_table(record: Mapping[str, Any]) -> str:
    """What was learned from how much, one line each, with the caption."""
    lines = [[name.replace("_", " "), _number(value)] for name, value in record["metrics"].items()]
    note = "Rates are those of the first documents, which the tokenizer was learned from.\n\n"
    return f"# Tokenizer\n\n{_table(['metric', 'value'], lines)}\n{note}{caption(record)}"


def bench_table(record: Mapping[str, Any]) -> str:
    """A table for each part: the time of every row, its floor, and the ratio to what it stands against.

    Args:
        record: of kind "bench"; rows as of `infini.bench.suite.run`.
    """
    head = ["what", "rule", "backend", "kernel", "direction", "shape", "ms", "tokens/s", "GB", "TFLOP", "floor, ms", "time / floor"]
    head += ["FLOP / product rate", "time / that of", "", "memory, GiB"]
    ceilings = record["ceilings"]
    text = (
        f"Medians, nothing in the caches. Ceilings of this run: a copy moves {ceilings['copy_bytes_per_second'] / 1e12:.2f} TB/s, bytes read "
        f"and written counted; a bf16 product does {ceilings['product_flop_per_second'] / 1e12:.0f} TFLOP/s. Floor: the longer of bytes and "
        "FLOP at these, every tensor moved once, no recomputation.\n\n"
    )
    if ahead := dict.fromkeys(row["what"] for row in record["rows"] if row.get("launched_ahead")):
        text += f"Launched while the GPU waits, so that the host's time does not count: {', '.join(ahead)}.\n\n"
    for part in dict.fromkeys(row["part"] for row in record["rows"]):
        lines = [_bench_line(row) for row in record["rows"] if row["part"] == part]
        text += f"## {part}\n\n{_table(head, lines)}\n"
    return f"# Speed\n\n{text}{caption(record)}"


def _bench_line(row: Mapping[str, Any]) -> list[str]:
    backend = row.get("backend", "-") + (", compiled" if row.get("compiled") else "")
    names = [bench_name(row).replace("|", "/"), row.get("rule", "-"), backend, row.get("kernel", "-"), row.get("direction", "-"), bench_shape(row)]
    if "failed" in row:
        return [*names, row["failed"].replace("|", "/"), *["-"] * 9]

    def number(name: str, form: str, unit: float = 1.0) -> str:
        return form.format(row[name] / unit) if name in row else "-"

    return [
        *names,
        f"{row['milliseconds']:.3f}",
        f"{row['tokens_per_second']:,.0f}",
        number("bytes", "{:.3g}", 1e9),
        number("flop", "{:.3g}", 1e12),
        number("floor_milliseconds", "{:.3f}"),
        number("floor_ratio", "{:.2f}"),
        number("flop_utilization", "{:.1%}"),
        number("ratio", "{:.3f}"),
        row.get("against", "-"),
        number("peak_memory_bytes", "{:.2f}", 2**30),
    ]


def bench_name(row: Mapping[str, Any]) -> str:
    """What a row of a benchmark timed, and all that is known of its numbers where they were not compared.

    >>> bench_name({"what": "build of theirs.py", "verified": False, "causal": False, "leak": 0.25, "finite": True})
    'build of theirs.py (not verified, not causal: earlier outputs change by 0.25 of the largest, finite)'
    """
    if row.get("verified", True):
        return row["what"]
    known = ["not verified"]
    if "causal" in row:
        change = f" by {row['leak']:.2g} of the largest" if "leak" in row else ""
        known.append("causal" if row["causal"] else f"not causal: earlier outputs change{change}")
    elif "finite" in row:
        known.append("causality unknown: no two readings are alike")
    if "finite" in row:
        known.append("finite" if row["finite"] else "not finite")
    return f"{row['what']} ({', '.join(known)})"


def bench_shape(row: Mapping[str, Any]) -> str:
    """Tokens and heads of a row of a benchmark, in short.

    >>> bench_shape({"shape": {"rows": 1, "tokens": 4096, "segment_length": 2048, "heads": 8, "groups": 2, "head_dim": 64}})
    '1 x 4,096 / 2,048, 8 : 2 x 64'
    """
    shape = row.get("shape")
    if shape is None:
        return f"{row['tokens']:,}" if "tokens" in row else "-"
    reach = f" / {shape['segment_length']:,}" if shape.get("segment_length") else ""
    reach += f" window {shape['window']:,}" if shape.get("window") else ""
    reach += f" packed {shape['document']:,}" if shape.get("document") else ""
    return "{rows} x {tokens:,}{reach}, {heads} : {groups} x {head_dim}".format(reach=reach, **shape)


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
        **({"seeds": seeds} if seeds else {}),
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
