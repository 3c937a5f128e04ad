"""Commands that measure models of the library and leave a record, its table and its picture."""

import json
import logging
import time
from dataclasses import dataclass, fields
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from infini.cli.build import fill, locate, model_class
from infini.cli.compose import MODULE, compose
from infini.cli.runs import is_best, measure_each, require_runs
from infini.errors import InputError
from infini.report.record import make_record, read_record, write_record
from infini.report.render import render


@dataclass(frozen=True)
class Command:
    """The keys that every such command has: which models, and where to."""

    checkpoint: str | tuple[str, ...] | None
    output: str
    device: str
    dtype: Literal["float32", "bfloat16", "float16"] | None
    runs: str | None = None
    picked: bool = False
    best: bool = False

    def __post_init__(self) -> None:
        require_runs(self.picked, self.best, self.runs)
        if self.checkpoint and self.runs:
            raise InputError(f"checkpoint is {self.checkpoint} and runs is {self.runs}: give one of them")


def measure(kind: str, arguments: list[str]) -> None:
    """Runs conf/KIND.yaml with overrides: one model after the other, then record, table and picture of all.

    Args:
        kind: of the record too. `_target_` of its YAML names the settings, `_run_` the function that is called with
            a model and them, and returns rows and a dict of checksums.
        arguments: Hydra overrides.

    Raises:
        InputError: an override, a checkpoint or an output folder that cannot be used.
    """
    if arguments and arguments[0] in ("-h", "--help"):
        print(f"usage: infini {kind} [KEY=VALUE ...]\n\n" + (files(MODULE) / f"{kind}.yaml").read_text())
        return
    logging.basicConfig(format="%(message)s")
    logging.getLogger("infini").setLevel(logging.INFO)
    config = compose(kind, arguments)
    command, _, _ = read(config)
    if command.runs is None:
        names = command.checkpoint if isinstance(command.checkpoint, tuple) else (command.checkpoint,)
        _measure(kind, config, names, Path(command.output))
        return

    def once(model: Path, output: Path) -> None:
        from infini import checkpoint

        one = config | {"checkpoint": str(model), "runs": None, "picked": False, "best": False, "output": str(output)}
        if not _is_measured(output / "record.json", one):
            _measure(kind, one, (str(model),), output, label=str(checkpoint.model_type(model)))

    folders = measure_each(Path(command.runs), command.output, once, command.picked, command.best)
    print("\n".join(str(folder / "record.json") for folder in folders))


def _measure(kind: str, config: dict, names: tuple[str | None, ...], output: Path, label: str | None = None) -> None:
    """Leaves one record of these models, and prints its table; `label` is what a model is called there, else as it was asked for."""
    from infini.train.reach import read_reach

    command, settings, run = read(config)
    started, rows, data = time.time(), [], {}
    for name in names:
        model, own, folder = _load_model(name, command)
        called = label or own
        try:
            found, data[called] = run(model, settings)
        except KeyboardInterrupt:
            raise KeyboardInterrupt("nothing of this record is kept; with runs=FOLDER each model has a record of its own") from None
        if (reach := read_reach(folder)) is not None:
            data[called]["trained"] = reach
        rows += [{"model": called, **row} for row in found]
    record = output / "record.json"
    seeds = {"text": settings.seed} if hasattr(settings, "seed") else {}
    write_record(make_record(kind, config=config, data=data, seeds=seeds, started=started, rows=rows), record)
    written = render(record)
    print(written[0].read_text())
    print("\n".join(map(str, [record, *written])))


def _is_measured(record: Path, config: dict) -> bool:
    """Whether a record is there, of what is asked now.

    Raises:
        InputError: it is of something else.
    """
    if not record.exists():
        return False
    there = read_record(record)["config"]
    # Folders may move, but RUN/best/model is not RUN/model.
    if is_best(there["checkpoint"]) != is_best(config["checkpoint"]):
        raise InputError(f"{record} was measured with {there['checkpoint']}, not {config['checkpoint']}: choose another output")
    for key in sorted((there.keys() | config.keys()) - {"output", "device", "checkpoint", "picked", "best"}):
        old, new = (json.dumps(values.get(key), sort_keys=True) for values in (there, config))
        if old != new:
            raise InputError(f"{record} was measured with {key} {old}, not {new}: choose another output")
    return True


def read(config: dict) -> tuple[Command, Any, Any]:
    """From a composed YAML: the command's own keys, the settings, and the function to run."""
    own = {field.name for field in fields(Command)}
    command = fill(Command, "", {key: value for key, value in config.items() if key in own})
    asked = {key: value for key, value in config.items() if key not in own and key[0] != "_"}
    return command, fill(locate(config["_target_"]), "", asked), locate(config["_run_"])


def _load_model(name: str | None, command: Command) -> tuple[Any, str, Path]:
    """A model, what to call it (as it was asked for, or the shipped one's name), and its folder."""
    import torch

    from infini import checkpoint
    from infini.cli.device import choose_device

    folder = checkpoint.resolve(name)
    dtype = getattr(torch, command.dtype) if command.dtype else None
    model = model_class(str(checkpoint.model_type(folder))).from_pretrained(folder, choose_device(command.device), dtype)
    return model, name or folder.name, folder
