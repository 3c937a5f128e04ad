"""Commands that measure models of the library and leave a record, its table and its picture."""

import logging
import time
from dataclasses import dataclass, fields
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from infini.cli.build import fill, locate, model_class
from infini.cli.compose import MODULE, compose
from infini.report.record import make_record, write_record
from infini.report.render import render


@dataclass(frozen=True)
class Command:
    """The keys that every such command has: which models, and where to."""

    checkpoint: str | tuple[str, ...] | None
    output: str
    device: str
    dtype: Literal["float32", "bfloat16", "float16"] | None


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
    command, settings, run = read(config)
    names = command.checkpoint if isinstance(command.checkpoint, tuple) else (command.checkpoint,)
    started, rows, data = time.time(), [], {}
    for name in names:
        model, label = _load(name, command)
        found, data[label] = run(model, settings)
        rows += [{"model": label, **row} for row in found]
    record = Path(command.output) / "record.json"
    write_record(
        make_record(kind, config=config, data=data, seeds={"text": settings.seed}, started=started, rows=rows), record
    )
    written = render(record)
    print(written[0].read_text())
    print("\n".join(map(str, [record, *written])))


def read(config: dict) -> tuple[Command, Any, Any]:
    """From a composed YAML: the command's own keys, the settings, and the function to run."""
    own = {field.name for field in fields(Command)}
    command = fill(Command, "", {key: value for key, value in config.items() if key in own})
    asked = {key: value for key, value in config.items() if key not in own and key[0] != "_"}
    return command, fill(locate(config["_target_"]), "", asked), locate(config["_run_"])


def _load(name: str | None, command: Command) -> tuple[Any, str]:
    """A model, and what to call it: as it was asked for, or the shipped one's name."""
    import torch

    from infini import checkpoint
    from infini.cli.device import choose_device

    folder = checkpoint.resolve(name)
    dtype = getattr(torch, command.dtype) if command.dtype else None
    model = model_class(str(checkpoint.model_type(folder))).from_pretrained(folder, choose_device(command.device), dtype)
    return model, name or folder.name
