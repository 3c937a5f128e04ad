"""`infini report PATH...`: renders records again and gathers sweeps, without running anything."""

import json
import re
from pathlib import Path

from infini.errors import InputError
from infini.report.jobs import PLAN
from infini.report.record import write_atomically
from infini.report.render import render

USAGE = """usage: infini report PATH... [pick=NUMBER] [against=ROW] [gather=true]

Writes record.md (and record.png where there is a picture) beside each record.json, and sweep.md and sweep.png into the folder of each sweep:
one row for each setting, seeds pooled, at the learning rate that was picked for it.
PATH: a record, or a folder with records at any depth below it.

pick=loss          what learning rates are picked by: a metric of training (loss, answer_loss), or NAME/METRIC of the records in RUN/NAME,
                   such as validation/digit_accuracy, which are then no part of the tables
against=ROW        the row that perplexities are compared with, document by document; the first unless given
gather=true        PATH is a folder of runs that were trained one by one: gather them as a sweep
pick and against are remembered in sweep.json, for the next time that the sweep is rendered."""

OPTION = re.compile("(pick|against|gather)=(.*)")


def run(arguments: list[str]) -> None:
    """Renders the records and sweeps at the given paths and prints what was written."""
    options = dict(found.groups() for argument in arguments if (found := OPTION.fullmatch(argument)))
    paths = [Path(argument) for argument in arguments if not OPTION.fullmatch(argument)]
    if not paths or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return
    gathers = options.pop("gather", "false")
    if gathers not in ("true", "false"):
        raise InputError(f"gather is {gathers!r}; use true or false")
    for record in [record for path in paths for record in find_records(path)]:
        for written in render(record):
            print(written)
    for folder in [folder for path in paths for folder in find_sweeps(path, gathers == "true")]:
        for written in render_sweep(folder, options):
            print(written)


def find_records(path: Path) -> list[Path]:
    """The records that `path` stands for, sorted; a file stands for itself.

    Raises:
        InputError: a folder that holds no record.
    """
    if not path.is_dir():
        return [path]
    found = sorted(path.rglob("record.json"))
    if not found and not find_sweeps(path):
        raise InputError(f"there is no record.json in {path} or below: give the output folder of a run")
    return found


def find_sweeps(path: Path, gathers: bool = False) -> list[Path]:
    """The folders of sweeps at `path` or below, sorted; with `gathers` also `path` itself."""
    if not path.is_dir():
        return []
    return sorted({plan.parent for plan in path.rglob(PLAN)} | ({path} if gathers else set()))


def render_sweep(folder: Path, options: dict[str, str]) -> list[Path]:
    """Writes sweep.md, and sweep.png where there is something to draw, into the folder of a sweep.

    Args:
        folder: of the sweep.
        options: pick and against, as far as they are given; noted there, and read from there where they are not.

    Returns:
        The files written.
    """
    from infini.report.sweep import PICK, gather
    from infini.report.sweep_plots import sweep_curves
    from infini.report.sweep_tables import sweep_tables

    path = folder / PLAN
    plan = json.loads(path.read_bytes()) if path.exists() else {"jobs": []}
    options = plan.get("report", {}) | options
    sweep = gather(folder, options.get("pick", PICK))
    contents = {"sweep.md": sweep_tables(sweep, options.get("against")).encode(), "sweep.png": sweep_curves(sweep, options.get("against"))}
    write_atomically(path, (json.dumps(plan | {"report": options}, indent=2) + "\n").encode())
    written = [folder / name for name, content in contents.items() if content is not None]
    for file in written:
        write_atomically(file, contents[file.name])
    return written
