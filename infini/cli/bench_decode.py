"""`infini bench decode`: time for each token that is written, after short and long texts."""

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Literal

from infini.cli.build import fill
from infini.cli.compose import MODULE, compose
from infini.errors import InputError
from infini.report.render import render


@dataclass(frozen=True)
class Command:
    """The keys of conf/bench_decode.yaml, described there."""

    output: str
    sizes: tuple[str, ...]
    contexts: tuple[int, ...]
    plain_contexts: tuple[int, ...]
    paths: tuple[Literal["eager", "graph"], ...]
    tokens: int
    repeats: int
    piece: int
    device: str
    dtype: Literal["float32", "bfloat16", "float16"]
    seed: int

    def __post_init__(self) -> None:
        for name in ("tokens", "repeats", "piece"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("contexts", "plain_contexts"):
            if any(context < 2 for context in getattr(self, name)):
                raise InputError(f"{name} is {list(getattr(self, name))}; a context has at least 2 tokens")
        if self.seed < 0:
            raise InputError(f"seed is {self.seed}; it must not be negative")


def run(arguments: list[str]) -> None:
    """Verifies, times, and leaves a record with its table.

    Raises:
        InputError: an override that cannot be used, or a graph without a GPU.
        AssertionError: a step does not agree with fp64; nothing is timed then.
    """
    if arguments and arguments[0] in ("-h", "--help"):
        print("usage: infini bench decode [KEY=VALUE ...]\n\n" + (files(MODULE) / "bench_decode.yaml").read_text())
        return
    command = fill(Command, "", compose("bench_decode", arguments))
    import torch

    from infini.bench.decode import run as time_decoding
    from infini.cli.device import choose_device

    options = {name: getattr(command, name) for name in ("sizes", "contexts", "plain_contexts", "paths", "tokens", "repeats", "piece", "seed")}
    output = Path(command.output)
    record = output / "record.json"
    try:
        time_decoding(output, device=choose_device(command.device), dtype=getattr(torch, command.dtype), **options)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"the rows so far are in {record}: `infini report {record}` makes their table") from None
    print("\n".join(map(str, [record, *render(record)])))
