"""`infini bench`: how fast the memory is, plain and by kernels."""

import logging
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from infini.cli.build import fill
from infini.cli.compose import MODULE, compose
from infini.errors import InputError
from infini.report.render import render


@dataclass(frozen=True)
class Command:
    """The keys of conf/bench.yaml, described there."""

    output: str
    device: str
    repeats: int
    seed: int

    def __post_init__(self) -> None:
        if self.repeats < 1:
            raise InputError(f"repeats is {self.repeats}; it must be at least 1")
        if self.seed < 0:
            raise InputError(f"seed is {self.seed}; it must not be negative")


def run(arguments: list[str]) -> None:
    """Times every part, prints each as it is done, and leaves a record with its table.

    Raises:
        InputError: an override that cannot be used, or no GPU.
        AssertionError: the backends do not agree; nothing is timed then.
    """
    if arguments and arguments[0] in ("-h", "--help"):
        print("usage: infini bench [KEY=VALUE ...]\n\n" + (files(MODULE) / "bench.yaml").read_text())
        return
    command = fill(Command, "", compose("bench", arguments))
    from infini.cli.device import choose_device

    device = choose_device(command.device)
    if device.type != "cuda":
        raise InputError(f"device is {command.device!r}, which is {device.type} here: the kernels are timed on a CUDA GPU only")
    from infini.bench.memory import run as time_memory

    logging.basicConfig(format="%(message)s")
    logging.getLogger("infini").setLevel(logging.INFO)
    time_memory(Path(command.output), device=device, repeats=command.repeats, seed=command.seed)
    record = Path(command.output) / "record.json"
    print("\n".join(map(str, [record, *render(record)])))
