"""Finished cells on disk, so that an interrupted benchmark goes on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from infini.errors import InputError
from infini.report.record import write_atomically


class FinishedCells:
    """The cells of one run: ``output/run.json`` says which run, ``output/cells/`` holds one JSON each.

    Args:
        output: the folder; made when missing.
        identity: all that the numbers depend on; compared as JSON.

    Raises:
        InputError: the folder holds another run, or results of an unknown one.
    """

    def __init__(self, output: Path, identity: Mapping):
        self._folder = output / "cells"
        mine, path = _plain(identity), output / "run.json"
        if path.exists():
            _refuse_another(output, _read(path), mine)
        elif (output / "record.json").exists() or self._folder.exists():
            raise InputError(
                f"output folder {output} holds results but no run.json to say of which run; "
                "choose another output folder"
            )
        else:
            _write(path, mine)

    def get(self, length: int, depth: float) -> dict | None:
        """The finished cell, or None."""
        path = self._path(length, depth)
        return _read(path) if path.exists() else None

    def put(self, length: int, depth: float, cell: Mapping) -> None:
        """Keeps a finished cell: whole, or not at all."""
        _write(self._path(length, depth), cell)

    def _path(self, length: int, depth: float) -> Path:
        short = f"{depth:g}"
        return self._folder / f"{length}-{short if float(short) == depth else repr(depth)}.json"


def _refuse_another(output: Path, theirs: dict, mine: dict) -> None:
    for key in sorted(theirs.keys() | mine.keys()):
        if theirs.get(key) != mine.get(key):
            raise InputError(
                f"output folder {output} holds another run: its {key} is {theirs.get(key)}, "
                f"here it is {mine.get(key)}; choose another output folder"
            )


def _plain(value):
    return json.loads(json.dumps(value))


def _read(path: Path) -> dict:
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise InputError(f"{path} is not JSON ({error}); delete it and run again") from None


def _write(path: Path, value: Mapping) -> None:
    write_atomically(path, (json.dumps(value, indent=2) + "\n").encode())
