"""`infini passkey`: the passkey benchmark on a checkpoint, with its record, table and picture."""

import json
import logging
import time
from dataclasses import dataclass, fields, replace
from importlib.resources import files
from pathlib import Path
from typing import Literal

from infini.cli.build import fill, locate, model_class
from infini.cli.compose import MODULE, compose
from infini.cli.runs import measure_each, require_runs
from infini.errors import InputError
from infini.report.record import make_record, read_record, write_record
from infini.report.render import render


@dataclass(frozen=True)
class Command:
    """The keys of conf/passkey.yaml that are not the benchmark's: which model, and where to."""

    checkpoint: str | None
    hf: str | None
    runs: str | None
    picked: bool
    best: bool
    output: str
    device: str
    dtype: Literal["float32", "bfloat16", "float16"] | None

    def __post_init__(self) -> None:
        require_runs(self.picked, self.best, self.runs)
        if len(given := [name for name in ("checkpoint", "hf", "runs") if getattr(self, name)]) > 1:
            raise InputError(f"{' and '.join(f'{name} is {getattr(self, name)}' for name in given)}: give one of them")


def run(arguments: list[str]) -> None:
    """Runs the benchmark with Hydra overrides and prints its table.

    Raises:
        InputError: an override, a checkpoint or an output folder that cannot be used.
    """
    if arguments and arguments[0] in ("-h", "--help"):
        print(_help())
        return
    logging.basicConfig(format="%(message)s")
    logging.getLogger("infini").setLevel(logging.INFO)
    config = compose("passkey", arguments)
    command, settings, benchmark = read(config)

    def ask(model: Path, output: Path) -> None:
        one = replace(command, checkpoint=str(model), runs=None, picked=False, best=False, output=str(output))
        own = {name: getattr(one, name) for name in ("checkpoint", "runs", "picked", "best", "output")}
        _run(one, settings, benchmark, config | own)

    if command.runs:
        folders = measure_each(Path(command.runs), command.output, ask, command.picked, command.best)
        print("\n".join(str(folder / "record.json") for folder in folders))
    else:
        _run(command, settings, benchmark, config)


def _run(command: Command, settings, benchmark, config: dict) -> None:
    """Asks one model, leaves its record, and prints its table."""
    model, tokenizer = _load(command)
    started, output = time.time(), Path(command.output)
    rows = benchmark(model, tokenizer, settings, output)
    record = output / "record.json"
    # A run that was complete before keeps its record: nothing was measured now, at this commit.
    if not (record.exists() and read_record(record)["rows"] == rows):
        write_record(
            make_record(
                "passkey",
                config=config,
                data=_data(output) | _trained(command),
                seeds={"prompts": settings.seed},
                started=started,
                rows=rows,
            ),
            record,
        )
    written = render(record)
    print(written[0].read_text())
    print("\n".join(map(str, [record, *written])))


def read(config: dict) -> tuple:
    """From a composed conf/passkey.yaml: the command's own keys, the benchmark's settings, and its run function."""
    own = {field.name for field in fields(Command)}
    command = fill(Command, "", {key: value for key, value in config.items() if key in own})
    asked = {key: value for key, value in config.items() if key not in own and key[0] != "_"}
    return command, fill(locate(config["_target_"]), "", asked), locate(config["_run_"])


def _load(command: Command) -> tuple:
    import torch

    from infini.cli.device import choose_device

    device = choose_device(command.device)
    dtype = getattr(torch, command.dtype) if command.dtype else None
    if command.hf:
        from infini.hf.causal_lm import load_causal_lm

        return load_causal_lm(command.hf, device, dtype)
    from infini import checkpoint
    from infini.data.tokenizer import load_tokenizer

    folder = checkpoint.resolve(command.checkpoint)
    model = model_class(str(checkpoint.model_type(folder))).from_pretrained(folder, device, dtype)
    return model, load_tokenizer(model.config)


def _data(output: Path) -> dict:
    # The benchmark leaves there what its numbers depend on.
    identity = json.loads((output / "run.json").read_bytes())
    return {key: value for key, value in identity.items() if key.endswith("sha256")}


def _trained(command: Command) -> dict:
    """How far the training of the weights reached, where their folder says so."""
    from infini import checkpoint
    from infini.train.reach import read_reach

    reach = None if command.hf else read_reach(checkpoint.resolve(command.checkpoint))
    return {} if reach is None else {"trained": reach}


def _help() -> str:
    conf = files(MODULE)
    usage = "usage: infini passkey [KEY=VALUE ...]\n"
    grids = ", ".join(sorted(path.name.removesuffix(".yaml") for path in (conf / "grid").iterdir()))
    keys = [(conf / name).read_text() for name in ("passkey.yaml", "grid/short.yaml")]
    return "\n".join([usage, *keys, f"grid is one of {grids}."])
