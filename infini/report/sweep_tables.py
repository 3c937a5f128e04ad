"""A sweep as Markdown: how each row was trained, how its learning rate was picked, and what was measured with its models."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from infini.errors import InputError
from infini.report.booksum_sweep import books_table
from infini.report.commands import together
from infini.report.intervals import mean_interval, wilson_interval
from infini.report.perplexity import summary
from infini.report.pooled import capacity_cells, compare, measured, passkey_cells, speed_cells
from infini.report.sweep import LARGER_IS_BETTER, SEEDS, Run, Setting, Sweep
from infini.report.sweep_overview import overview_table
from infini.report.tables import CARRIED, CARRIED_NOTE, SPEED_NOTE, caption, carried_cells, speed_cell

NONE = "-"


def sweep_tables(sweep: Sweep, against: str | None = None) -> str:
    """All tables of a sweep; the same records give the same bytes.

    Args:
        sweep: as gathered.
        against: name of the row that perplexities are compared with, see :func:`name_of`; None: the first.

    Raises:
        InputError: no row has that name.
        KeyError: a record lacks a field.
    """
    parts = ["# Sweep", training_table(sweep), rates_table(sweep), problems_list(sweep)]
    for evaluation in sweep.evaluations():
        tables = {"passkey": passkey_table, "perplexity": perplexity_table, "capacity": capacity_table, "booksum": books_table}
        tables["speed"] = speed_table
        for kind, table in tables.items():
            if any(True for setting in sweep.best() for _ in measured(setting, evaluation, kind)):
                more = {"against": against} if kind == "perplexity" else {}
                parts += [f"## {evaluation}", *([overview_table(sweep, evaluation)] if kind == "passkey" else []), table(sweep, evaluation, **more)]
    return "\n\n".join(part for part in parts if part) + f"\n\n{provenance(sweep)}"


def name_of(setting: Setting) -> str:
    """What a row is called: "rmt", or "rmt, 512" where two things differ.

    >>> name_of(Setting(("rmt", "512"), "1e-3", ()))
    'rmt, 512'
    """
    return ", ".join(setting.values) or "all"


def training_table(sweep: Sweep) -> str:
    """One line per row at the learning rate picked for it: means over seeds."""
    tuned = any(setting.rate for setting in sweep.settings)
    head = [*sweep.keys, *(["learning rate"] if tuned else []), "seeds", "steps", "tokens", "parameters", "loss", "bits/byte"]
    head += ["answer loss", "tokens/s", "gradient through, tokens", "states of texts up to, tokens"]
    head += ["epochs", "held-out bits/byte, best", "at step"]
    with_answers = any(setting.metric("answer_accuracy") for setting in sweep.settings)
    head += ["answers right"] if with_answers else []
    lines = []
    for setting in sweep.best():
        line = [*setting.values, *([setting.rate] if tuned else []), f"{len(setting.finished)} of {len(setting.runs)}"]
        line += [_span(setting.metric(metric)) for metric in ("steps", "tokens", "parameters")]
        line += [_mean(setting.metric("loss")), _mean(_bits_per_byte(setting)), _mean(setting.metric("answer_loss"))]
        line += [_mean(setting.metric("tokens_per_second"), "{:,.0f}")]
        line += [_span(setting.metric(metric)) for metric in ("gradient_tokens", "text_tokens")]
        line += [_mean(setting.metric(metric)) for metric in ("epochs", "best_held_out_bits_per_byte")] + [_span(setting.metric("best_step"))]
        lines.append(line + ([_mean([100 * share for share in setting.metric("answer_accuracy")])] if with_answers else []))
    head, lines = _told(head, lines, first=len(sweep.keys))
    note = "Losses in nats, of the last window of training. Means over seeds, with 95 % intervals (Student's t) where there are several."
    return f"{_table(head, lines)}\n{note}"


def rates_table(sweep: Sweep) -> str:
    """What the learning rates were picked by, for every row and rate; "" where nothing is tuned."""
    rates = list(dict.fromkeys(setting.rate for setting in sorted(sweep.settings, key=lambda setting: _size(setting.rate))))
    if rates == [""]:
        return ""
    lines = []
    for row, best in zip(sweep.rates().values(), sweep.best(), strict=True):
        by_rate = {setting.rate: setting for setting in row}
        cells = [_picked(sweep, by_rate.get(rate), by_rate.get(rate) is best) for rate in rates]
        tried = [rate for rate in rates if rate in by_rate]
        edge = "yes" if len(tried) > 1 and best.rate in (tried[0], tried[-1]) else "no"
        lines.append([*best.values, *cells, edge])
    better = "highest" if sweep.pick.rpartition("/")[2] in LARGER_IS_BETTER else "lowest"
    rule = (
        f"Picked for each row (bold): the rate at which most seeds were measured (of equals, finished), among those the one with the {better} "
        f"mean `{sweep.pick}` over its seeds, shown here with the number of seeds; of equals the one nearest to the middle of the grid. "
        "No number of the tables below takes part."
    )
    return f"## Learning rates\n\n{_table([*sweep.keys, *rates, 'at the edge of the grid'], lines)}\n{rule}"


def problems_list(sweep: Sweep) -> str:
    """The runs that failed or are missing, each with its reason; "" where there are none."""
    lines = []
    for setting in sweep.settings:
        for run in setting.runs:
            if run.record is None:
                seeds = [f"{key} {run.overrides[key]}" for key in SEEDS if key in run.overrides]
                rate = [f"learning rate {setting.rate}"] if setting.rate else []
                lines.append(f"- {', '.join([name_of(setting), *rate, *seeds])}: {run.problem}\n")
    return f"## Failed or missing\n\n{''.join(lines)}".rstrip() if lines else ""


def passkey_table(sweep: Sweep, evaluation: str) -> str:
    """One line per row and length, depths and seeds pooled."""
    head = [*sweep.keys, "length", "seeds", "prompts", "exact match", "95 % interval", "digits right", "95 % interval"]
    head += ["worst seed", "worst depth"]
    lines = []
    for setting in sweep.best():
        cells = passkey_cells(setting, evaluation)
        for cell in cells:
            digits = wilson_interval(cell["digit_accuracy"] * cell["prompts"], cell["prompts"])
            lines.append(
                [
                    *setting.values,
                    f"{cell['length']:,}",
                    _seeds(setting, cell["seeds"]),
                    str(cell["prompts"]),
                    _percent(cell["exact_match"]),
                    _interval(cell["low"], cell["high"]),
                    _percent(cell["digit_accuracy"]),
                    _interval(*digits),
                    _percent(cell["worst_seed"]),
                    f"{_percent(cell['worst_depth'][0])} at {cell['worst_depth'][1]:g}",
                ]
            )
        if not cells:
            lines.append([*setting.values, NONE, _seeds(setting, 0), *[NONE] * 7])
    note = (
        "Depths and seeds pooled; intervals of shares after Wilson, over prompts. Seeds answer the same prompts: where the worst seed is far "
        "from the pooled number, the seeds and not the prompts are what it depends on."
    )
    return f"{_table(head, lines)}\n{note}"


def perplexity_table(sweep: Sweep, evaluation: str, against: str | None = None) -> str:
    """One line per row, seeds averaged, and its difference to one of the rows, paired by document."""
    best = {name_of(setting): setting for setting in sweep.best()}
    if against is not None and against not in best:
        raise InputError(f"against is {against!r}, but the rows are {', '.join(best)}")
    reference = against or next(name for name, setting in best.items() if list(measured(setting, evaluation, "perplexity")))
    head = [*sweep.keys, "seeds", "documents", "token perplexity", "word perplexity", "bits/byte", "bits/byte without memory", *CARRIED]
    head += [f"bits/byte more than {reference}", "95 % interval"]
    lines = []
    for name, setting in best.items():
        records = list(measured(setting, evaluation, "perplexity"))
        totals = [summary(record["rows"]) for record in records]
        line = [*setting.values, _seeds(setting, len(records)), _span([total["documents"] for total in totals])]
        line += [_mean([total[what] for total in totals]) for what in ("token_perplexity", "word_perplexity", "bits_per_byte")]
        silent = [_nll(record, "nll_without_memory") for record in records]
        line += [_mean([nll / math.log(2) / total["bytes"] for nll, total in zip(silent, totals, strict=True) if nll is not None])]
        line += carried_cells(records[0]["rows"]) if records else [NONE] * len(CARRIED)
        if name == reference or not records:
            line += [NONE, NONE]
        else:
            difference, low, high = compare(records, list(measured(best[reference], evaluation, "perplexity")))
            line += [f"{difference:+.4f}", f"{low:+.4f} to {high:+.4f}"]
        lines.append(line)
    note = (
        "Totals over all documents; means over seeds, with 95 % intervals (Student's t) where there are several. Differences: each document's "
        "number averaged over seeds, intervals by resampling documents (10,000 draws), so they hold for other documents, not for other seeds. "
        + CARRIED_NOTE
    )
    head, lines = _told(head, lines, first=len(sweep.keys))
    return f"{_table(head, lines)}\n{note}"


def capacity_table(sweep: Sweep, evaluation: str) -> str:
    """One line per row, distance and number of pairs, seeds pooled."""
    head = [*sweep.keys, "distance", "pairs", "seeds", "names asked", "digits right", "95 % interval", "all five right"]
    lines = []
    for setting in sweep.best():
        cells = capacity_cells(setting, evaluation)
        for cell in cells:
            line = [*setting.values, f"{cell['distance']:,}", f"{cell['pairs']:,}", _seeds(setting, cell["seeds"]), str(cell["names"])]
            line += [_percent(cell["digit_accuracy"]), _interval(cell["low"], cell["high"]), _percent(cell["exact_match"])]
            lines.append(line)
        if not cells:
            lines.append([*setting.values, NONE, NONE, _seeds(setting, 0), *[NONE] * 4])
    return f"{_table(head, lines)}\nSeeds pooled; intervals after Wilson, over names. Chance 10 %."


def speed_table(sweep: Sweep, evaluation: str) -> str:
    """One line per row and what is timed, with the lengths across."""
    cells = {name_of(setting): speed_cells(setting, evaluation) for setting in sweep.best()}
    lengths = sorted({cell["length"] for row in cells.values() for cell in row})
    lines = []
    for setting in sweep.best():
        row = cells[name_of(setting)]
        for what in dict.fromkeys(cell["what"] for cell in row):
            here = {cell["length"]: cell for cell in row if cell["what"] == what}
            seeds = _seeds(setting, max(cell["seeds"] for cell in here.values()))
            lines.append([*setting.values, what, seeds, *(speed_cell(here.get(length)) for length in lengths)])
    head = [*sweep.keys, "what", "seeds", *(f"{length:,}" for length in lengths)]
    return f"{_table(head, lines)}\n{SPEED_NOTE} Median of the seeds, largest peak."


def provenance(sweep: Sweep) -> str:
    """Where the numbers come from: what differs between records is listed, the rest said once; see :func:`infini.report.commands.together`."""
    runs = [run for setting in sweep.settings for run in setting.runs]
    records = [record for run in runs for record in _records(run)]
    facts: dict[str, dict[str, None]] = {name: {} for name in ("command", "commit", "machine", "versions")}
    for record in records:
        for line in caption(record).splitlines():
            name, _, fact = line.removeprefix("- ").partition(": ")
            if name in facts:
                facts[name][fact] = None
    told = {name: sorted(found) for name, found in facts.items()}
    told["command"] = [f"`{command}`" for command in together(command.strip("`") for command in told["command"])]
    lines = [f"- {name}: {fact}\n" for name, found in told.items() for fact in found]
    return f"- records: {len(records)}, of {len(runs)} runs\n" + "".join(lines)


def _records(run: Run) -> list[Mapping[str, Any]]:
    return [record for record in (run.record, *run.evaluations.values()) if record is not None]


def _bits_per_byte(setting: Setting) -> list[float]:
    """Of models whose tokens are bytes."""
    runs = [run for run in setting.finished if run.record["config"]["model"].get("tokenizer", "bytes") == "bytes"]
    return [run.record["metrics"]["token_loss"] / math.log(2) for run in runs]


def _picked(sweep: Sweep, setting: Setting | None, best: bool) -> str:
    if setting is None:
        return NONE
    value, seeds = sweep.picked_by(setting), _seeds(setting, len(sweep.pick_of(setting)))
    text = seeds if value is None else f"{value:.4g} ({seeds})"
    return f"**{text}**" if best and value is not None else text


def _nll(record: Mapping[str, Any], what: str) -> float | None:
    values = [row[what] for row in record["rows"]]
    return None if None in values else math.fsum(values)


def _seeds(setting: Setting, measured_seeds: int) -> str:
    return f"{measured_seeds} of {len(setting.runs)}"


def _span(values: Sequence[int]) -> str:
    if not values:
        return NONE
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _mean(values: Sequence[float], form: str = "{:.4g}") -> str:
    if not values:
        return NONE
    mean, half = mean_interval(values)
    if half is None:
        return form.format(mean)
    return f"{form.format(mean)} ± {form.format(half) if form != '{:.4g}' else f'{half:.2g}'}"


def _interval(low: float, high: float) -> str:
    return f"{_percent(low)} to {_percent(high)}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _size(rate: str) -> tuple[float, str]:
    try:
        return float(rate), rate
    except ValueError:
        return math.inf, rate


def _told(head: Sequence[str], lines: Sequence[Sequence[str]], first: int) -> tuple[list[str], list[list[str]]]:
    """Without the columns, from the one with index `first` on, in which no line has anything."""
    kept = [i for i in range(len(head)) if i < first or any(line[i] != NONE for line in lines)]
    return [head[i] for i in kept], [[line[i] for i in kept] for line in lines]


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [head, ["---:"] * len(head), *lines]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)
