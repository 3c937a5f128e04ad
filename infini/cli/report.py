"""`infini report PATH...`: renders records again, without running anything."""

from pathlib import Path

from infini.errors import InputError
from infini.report.render import render

USAGE = """usage: infini report PATH...

Writes record.md (and record.png where there is a picture) beside each record.json.
PATH: a record, or a folder with records at any depth below it."""


def run(arguments: list[str]) -> None:
    """Renders the records at the given paths and prints what was written."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return
    for path in [record for argument in arguments for record in find_records(Path(argument))]:
        for written in render(path):
            print(written)


def find_records(path: Path) -> list[Path]:
    """The records that `path` stands for, sorted; a file stands for itself.

    Raises:
        InputError: a folder that holds no record.
    """
    if not path.is_dir():
        return [path]
    found = sorted(path.rglob("record.json"))
    if not found:
        raise InputError(f"there is no record.json in {path} or below: give the output folder of a run")
    return found
