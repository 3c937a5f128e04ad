"""The output folder of one run: whose it is, and how whole folders get into it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from infini.errors import InputError
from infini.report.record import write_atomically

_IDENTITY = "run.json"


def claim(folder: Path, identity: dict) -> None:
    """Make ``folder`` the home of the run described by ``identity``, or check that it already is.

    Args:
        folder: created when missing.
        identity: what decides the run's numbers; compared as JSON.

    Raises:
        InputError: the folder holds another run, or files of an unknown one.
    """
    asked = json.loads(json.dumps(identity))
    path = folder / _IDENTITY
    if path.exists():
        here = json.loads(path.read_text())
        if here != asked:
            raise InputError(
                f"output folder {folder} holds a run with {_difference(here, asked)}: "
                "choose another output folder or delete this one"
            )
        return
    for name in ("best", "checkpoints", "metrics.jsonl", "model", "record.json"):
        if (folder / name).exists():
            raise InputError(
                f"output folder {folder} holds {name} but no {_IDENTITY} to say of which run: "
                "choose another output folder or delete this one"
            )
    write_atomically(path, (json.dumps(asked, indent=2) + "\n").encode())


@contextmanager
def whole_folder(final: Path) -> Iterator[Path]:
    """Yield a folder to fill; when the block ends well it is on the disk and named ``final``.

    A block that fails, or a process that dies, leaves ``final`` as it was.

    Args:
        final: the folder's name; one that is already there is replaced.
    """
    temporary = final.with_name(f".new-{final.name}")
    shutil.rmtree(temporary, ignore_errors=True)  # of a process that died
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for path in [*temporary.iterdir(), temporary]:
            _sync(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    remove_folder(final)
    temporary.rename(final)
    _sync(final.parent)


def remove_folder(folder: Path) -> None:
    """Delete ``folder``; half deleted, it no longer bears its name."""
    if folder.exists():
        doomed = folder.with_name(f".old-{folder.name}")
        shutil.rmtree(doomed, ignore_errors=True)
        folder.rename(doomed)
        shutil.rmtree(doomed)


def _sync(path: Path) -> None:
    # A rename may reach the disk before the bytes it names, unless these are flushed first.
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _difference(here: dict, asked: dict, prefix: str = "") -> str:
    """The first key in which two different nested dicts differ, in words."""
    key = min(k for k in here.keys() | asked.keys() if here.get(k) != asked.get(k))
    old, new = here.get(key), asked.get(key)
    if isinstance(old, dict) and isinstance(new, dict):
        return _difference(old, new, f"{prefix}{key}.")
    return f"{prefix}{key} = {old!r}, not {new!r}"
