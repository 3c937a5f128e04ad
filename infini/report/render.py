"""Which table and picture belong to which kind of record."""

from pathlib import Path

from infini.errors import InputError
from infini.report.booksum import booksum_table
from infini.report.booksum_page import booksum_page
from infini.report.booksum_plots import booksum_curves
from infini.report.generation_tables import decode_table, lm_eval_table, peak_table
from infini.report.plots import capacity_curves, drift_curves, passkey_heat_map, perplexity_curves, roofline, speed_curves
from infini.report.record import read_record, write_atomically
from infini.report.tables import (
    bench_table,
    capacity_table,
    drift_table,
    passkey_table,
    perplexity_table,
    speed_table,
    tokenizer_table,
    train_table,
)

TABLES = {"passkey": passkey_table, "train": train_table, "capacity": capacity_table, "drift": drift_table, "bench": bench_table}
TABLES |= {"speed": speed_table, "perplexity": perplexity_table, "tokenizer": tokenizer_table}
TABLES |= {"decode": decode_table, "peak": peak_table, "lm_eval": lm_eval_table, "booksum": booksum_table}
PICTURES = {"passkey": passkey_heat_map, "capacity": capacity_curves, "drift": drift_curves, "perplexity": perplexity_curves}
PICTURES |= {"speed": speed_curves, "bench": roofline, "booksum": booksum_curves}
PAGES = {"booksum": booksum_page}


def render(path: Path) -> list[Path]:
    """Writes NAME.md, and NAME.png and NAME.html where there is a picture and a page, beside the record NAME.json.

    Returns:
        The files written, the table first.

    Raises:
        InputError: no record, or one of a kind that this version does not know, or that lacks a field.
    """
    record = read_record(path)
    kind = record["kind"]
    if kind not in TABLES:
        known = ", ".join(TABLES)
        raise InputError(f"{path} is a record of kind {kind!r}, this version renders {known}: update infini")
    try:
        contents = {".md": TABLES[kind](record).encode()}
        if kind in PICTURES:
            contents[".png"] = PICTURES[kind](record)
        if kind in PAGES:
            contents[".html"] = PAGES[kind](record).encode()
    except KeyError as error:
        raise InputError(f"{path} lacks the field {error.args[0]!r}: run the command that made it again") from error
    for suffix, content in contents.items():
        write_atomically(path.with_suffix(suffix), content)
    return [path.with_suffix(suffix) for suffix in contents]
