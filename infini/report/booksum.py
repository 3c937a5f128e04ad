"""What the rows of a booksum record say together, and their table."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from infini.report.intervals import paired_difference, wilson_interval
from infini.report.tables import _table, caption

MIB = 2**20
# A number and its 95 % interval, books resampled; None where a single book tells nothing of others.
Interval = tuple[float, float | None, float | None]
ROUGES = ("rouge1", "rouge2", "rougeL", "geometric_mean", "matched", "entity_recall", "copy_rate")


def variants(record: Mapping[str, Any]) -> dict[tuple[str, str], list[Mapping[str, Any]]]:
    """The rows of each model and variant, in the order in which they were measured; what needs no model is shown once."""
    found: dict[tuple[str, str], list] = defaultdict(list)
    first = record["rows"][0]["model"] if record["rows"] else None
    for row in record["rows"]:
        if row["nll"] is not None:
            found[row["model"], row["variant"]].append(row)
        elif row["model"] == first:
            found["-", row["variant"]].append(row)
    return dict(found)


def rows_at(rows: Sequence[Mapping[str, Any]], length: int | None) -> list[Mapping[str, Any]]:
    """One row for each pair: at most ``length`` tokens of its book (None: the whole), the whole book where it is no longer.

    >>> rows = [{"pair": "a", "length": 8, "input_tokens": 8}, {"pair": "a", "length": None, "input_tokens": 20}]
    >>> [row["input_tokens"] for length in (8, 32, None) for row in rows_at(rows, length)]
    [8, 20, 20]
    """
    own: dict[str, dict] = defaultdict(dict)
    for row in rows:
        own[row["pair"]][row["length"]] = row
    found = []
    for cells in own.values():
        whole = cells.get(None)
        row = cells.get(length)
        if row is None and whole is not None and (length is None or whole["input_tokens"] <= length):
            row = whole
        if row is not None:
            found.append(row)
    return found


def gap(rows: Sequence[Mapping[str, Any]], per_token: bool) -> Interval | None:
    """Nats by which the right summary is likelier after the right book than after a wrong one.

    Args:
        rows: of one model, variant and length.
        per_token: of the summary's tokens, else of the whole summary.
    """
    books = _by_book([row for row in rows if row["nll"] is not None])
    sizes = [sum(row["summary_tokens"] if per_token else 1 for row in own) for own in books.values()]
    return _resampled([sum(row["nll_wrong"] - row["nll"] for row in own) for own in books.values()], sizes)


def score(rows: Sequence[Mapping[str, Any]], name: str, decoding: str) -> Interval | None:
    """The mean of a score of the written summaries over pairs."""
    values = [
        [output[name] for row in own for output in row["outputs"] if output["decoding"] == decoding and output[name] is not None]
        for own in _by_book(rows).values()
    ]
    return _resampled([sum(own) for own in values if own], [len(own) for own in values if own])


def cloze(rows: Sequence[Mapping[str, Any]], start: int | None = None) -> dict[str, Any] | None:
    """Questions taken together: of one distance, or (None) of all that are farther away than local attention reaches.

    Returns:
        questions; accuracy (share of questions), turned (share of pairs the right way round) and margin (nats a question), each with
        its interval.
    """
    cells = _cells(rows, start)
    if not cells:
        return None
    counts = [cell["questions"] for cell in cells]
    right, pairs, margin = (_resampled([cell[name] for cell in cells], counts) for name in ("right", "turned", "margin"))
    total, turned = sum(counts), sum(cell["turned"] for cell in cells)
    return {
        "questions": total,
        "accuracy": _no_narrower(right, wilson_interval(sum(cell["right"] for cell in cells), total)),
        "turned": _no_narrower(_scaled(pairs, 2), wilson_interval(turned, total // 2)),
        "margin": margin,
    }


def worth(rows: Sequence[Mapping[str, Any]], silent: Sequence[Mapping[str, Any]]) -> dict[str, Interval | None]:
    """What a memory is worth: a model's numbers less those of the same model silenced, paired by book.

    Args:
        rows: of the model at one length.
        silent: of the same model with its memory silenced, at the same length.

    Returns:
        gap (nats a token) and turned (share of pairs beyond local reach).
    """
    ours, theirs = _by_book(rows), _by_book(silent)
    books = [book for book in ours if book in theirs]
    gaps, sizes, turned, pairs = [], [], [], []
    for book in books:
        total = [sum(row["nll_wrong"] - row["nll"] for row in side[book]) for side in (ours, theirs)]
        gaps.append(total[0] - total[1])
        sizes.append(sum(row["summary_tokens"] for row in ours[book]))
        one, other = (_cells(side[book], None) for side in (ours, theirs))
        if one and other:
            turned.append(sum(cell["turned"] for cell in one) - sum(cell["turned"] for cell in other))
            pairs.append(sum(cell["questions"] for cell in one) / 2)
    return {"gap": _resampled(gaps, sizes), "turned": _resampled(turned, pairs)}


def _cells(rows: Sequence[Mapping[str, Any]], start: int | None) -> list[dict[str, float]]:
    """Sums of each book: one of several seeds counts once, with all of them."""
    found = []
    for own in _by_book(rows).values():
        cells = [row["beyond"] for row in own if row["beyond"]] if start is None else [
            cell for row in own for cell in row["cloze"] if cell["from"] == start
        ]  # fmt: skip
        total = {name: sum(cell[name] for cell in cells) for name in ("questions", "right", "turned", "margin")}
        if total["questions"]:
            found.append(total)
    return found


def booksum_table(record: Mapping[str, Any]) -> str:
    """What models know of the books, by how much they read; the same by distance; what they write; and what reading cost.

    Args:
        record: of kind "booksum"; rows as of `infini.tasks.booksum.benchmark.run`, each with its model.
    """
    cells = [(model, variant, length, there) for (model, variant), rows in variants(record).items() for length, there in cells_of(record, rows)]
    knows, writes, costs = [], [], []
    for model, variant, length, there in cells:
        start, asked = [model, variant, "all" if length is None else f"{length:,}", str(len(there))], cloze(there)
        if there[0]["nll"] is not None:
            shares = [_share(asked[name]) for name in ("accuracy", "turned")] if asked else ["-", "-"]
            more = [f"{asked['questions']:,}", *shares, _pair(asked["margin"], "{:.3f}")] if asked else ["-"] * 4
            knows.append([*start, _pair(gap(there, per_token=False), "{:.2f}"), _pair(gap(there, per_token=True), "{:.4f}"), *more])
        for decoding in ("greedy", "sampled"):
            scores = {name: score(there, name, decoding) for name in ROUGES}
            if scores["rouge1"] is not None:
                writes.append([*start, decoding, *(_share(scores[name]) for name in ROUGES)])
        if there[0]["seconds"] is not None and length is None:
            tokens, seconds = max(row["input_tokens"] for row in there), max(row["seconds"] for row in there)
            numbers = (max(row[name] for row in there) / MIB for name in ("state_bytes", "peak_memory_bytes"))
            costs.append([model, variant, f"{tokens:,}", f"{seconds:,.1f}", *(f"{number:,.1f}" for number in numbers)])
    head = ["model", "variant", "tokens read, at most", "pairs"]
    known = [*head, "wrong-book gap, nats a summary", "nats a token", "questions beyond local reach", "right", "pairs right way round"]
    written = [*head, "decoding", "ROUGE-1", "ROUGE-2", "ROUGE-L", "geometric mean", "same, length matched", "entity recall", "copied"]
    text = f"# Whole books\n\n## What is known of the book\n\n{_table([*known, 'margin, nats'], knows)}\n"
    text += _worth(record) + _by_distance(record)
    if writes:
        text += f"## What is written\n\n{_table(written, writes)}\n"
    cost = ["model", "variant", "longest book, tokens", "its batch was read in, s", "state of a book, MiB", "peak memory, MiB"]
    text += f"## What it costs\n\n{_table(cost, costs)}\n"
    skipped = next(iter(record["data"].values()), {}).get("skipped")
    note = (
        "Read are the first tokens of each book; a book that is no longer counts with its whole. Gap: log-likelihood of the right summary "
        "after its book less the mean after other books of the same batch. Questions: which of two names stood in a sentence; chance is 50 "
        "%, and what a sentence gives away by itself shows where the memory is silenced. Pairs right way round: two questions with the same "
        "two names, what speaks for a name by itself taken out. Beyond local reach: farther away than attention could bring it without the "
        "memory. ROUGE: F1, stemmed. Brackets: 95 % intervals, books resampled; those of shares no narrower than Wilson's.\n\n"
    )
    if skipped:
        note += "Pairs left out: " + ", ".join(f"{count} with {why}" for why, count in sorted(skipped.items())) + ".\n\n"
    return f"{text}{note}{caption(record)}"


def cells_of(record: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[tuple[int | None, list[Mapping[str, Any]]]]:
    """The rows of a model and variant at each length that one of its books has; the whole books last."""
    lengths = [*record["config"]["lengths"], None]
    if all(row["length"] is not None for row in rows):  # the first segment, which is no length that was asked for
        lengths = sorted({row["length"] for row in rows})
    found = [(length, rows_at(rows, length)) for length in lengths]
    return [(length, there) for length, there in found if length is None or any(row["length"] == length for row in there)]


def _by_distance(record: Mapping[str, Any]) -> str:
    starts = sorted({cell["from"] for row in record["rows"] for cell in row["cloze"]})
    lines = []
    for (model, variant), rows in variants(record).items():
        found = [cloze(rows_at(rows, None), start) for start in starts]
        if any(found):
            lines.append([model, variant, *(f"{_share(one['turned'])} of {one['questions'] // 2:,}" if one else "-" for one in found)])
    if not lines:
        return ""
    head = ["model", "variant", *(f"below {2 * start:,}" if start == 512 else f"{start:,} to {2 * start - 1:,}" for start in starts)]
    return f"### Pairs right way round, by letters between the passage and the end of the book\n\n{_table(head, lines)}\n"


def _worth(record: Mapping[str, Any]) -> str:
    sides, lines = variants(record), []
    for model in dict.fromkeys(model for model, _ in sides):
        loud, silent = (sides.get((model, variant)) for variant in ("whole model", "memory silenced"))
        if not loud or not silent:
            continue
        for length, there in cells_of(record, loud):
            found = worth(there, rows_at(silent, length))
            shares = None if found["turned"] is None else _scaled(found["turned"], 100)
            cells = ["all" if length is None else f"{length:,}", _pair(found["gap"], "{:+.4f}"), _pair(shares, "{:+.1f}")]
            lines.append([model, *cells])
    if not lines:
        return ""
    head = ["model", "tokens read, at most", "wrong-book gap, nats a token", "pairs right way round, points"]
    return f"### What the memory is worth: the model less itself silenced, paired by book\n\n{_table(head, lines)}\n"


def _by_book(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    found: dict[str, list] = defaultdict(list)
    for row in rows:
        found[row["book"]].append(row)
    return dict(found)


def _resampled(sums: Sequence[float], sizes: Sequence[float]) -> Interval | None:
    """``sum(sums) / sum(sizes)`` over books."""
    if not sums:
        return None
    if len(sums) == 1:
        return sums[0] / sizes[0], None, None
    return paired_difference(sums, [0.0] * len(sums), sizes)


def _no_narrower(value: Interval, bounds: tuple[float, float]) -> Interval:
    """A share's interval over books, and at least that of its trials: a few books that agree by chance would have none."""
    return value[0], *(end if own is None else pick(own, end) for pick, own, end in zip((min, max), value[1:], bounds, strict=True))


def _scaled(value: Interval, factor: float) -> Interval:
    return tuple(None if part is None else factor * part for part in value)


def _share(value: Interval | None) -> str:
    return "-" if value is None else _pair(_scaled(value, 100), "{:.1f}") + " %"


def _pair(value: Interval | None, form: str) -> str:
    if value is None:
        return "-"
    middle, low, high = value
    return form.format(middle) + ("" if low is None else f" [{form.format(low)}, {form.format(high)}]")
