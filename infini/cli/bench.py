"""`infini bench`: how fast the memory is, plain and by kernels; `infini bench decode`: how fast tokens are written."""

import logging
from importlib.resources import files
from pathlib import Path
from typing import Any

from infini.cli import bench_decode
from infini.cli.build import fill
from infini.cli.compose import MODULE, compose
from infini.errors import InputError
from infini.report.render import render


def run(arguments: list[str]) -> None:
    """Times every part, prints each as it is done, and leaves a record with its table.

    Raises:
        InputError: an override that cannot be used, or no GPU.
        AssertionError: numbers of a row do not agree with fp64; it was not timed.
    """
    if arguments and arguments[0] == "decode":
        bench_decode.run(arguments[1:])
        return
    if arguments and arguments[0] in ("-h", "--help"):
        print("usage: infini bench [decode] [KEY=VALUE ...]\n\n" + (files(MODULE) / "bench.yaml").read_text())
        return
    output, asked, settings = read(compose("bench", arguments))
    from infini.cli.device import choose_device

    device = choose_device(asked)
    if device.type != "cuda":
        raise InputError(f"device is {asked!r}, which is {device.type} here: the kernels are timed on a CUDA GPU only")
    from infini.bench.suite import run as time_all

    logging.basicConfig(format="%(message)s")
    logging.getLogger("infini").setLevel(logging.INFO)
    record = output / "record.json"
    try:
        time_all(output, settings, device)
    finally:
        if record.exists():
            print("\n".join(map(str, [record, *render(record)])))


def read(config: dict[str, Any]) -> tuple[Path, str, Any]:
    """From a composed conf/bench.yaml: the output folder, the device asked for, the settings."""
    from infini.bench.suite import BenchSettings

    settings = {key: value for key, value in config.items() if key not in ("output", "device")}
    return Path(config["output"]), config["device"], fill(BenchSettings, "", settings)
