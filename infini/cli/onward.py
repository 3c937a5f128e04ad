"""`infini train runs=FOLDER ...`: training that goes on from every run of a sweep, each model as it was saved."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from infini.cli.compose import compose
from infini.cli.runs import model_of, picked_runs, work_through
from infini.errors import InputError
from infini.report.record import read_record
from infini.report.sweep import TUNED, overrides_of
from infini.tokenizer_file import BYTES

# Of the configuration: how and where a job is carried out, which no table tells runs apart by.
_UNSAID = ("runs", "output", "train.device", "train.workers", "train.log_every", "train.checkpoint_every", "train.tensorboard")


def run(arguments: Sequence[str], train: Any) -> None:
    """Trains on from each run, one after the other; the same command, given once for each GPU, shares the work.

    Of runs that differ in their learning rate those at the rate that `infini report` picks go on. The new runs lie in OUTPUT/NAME,
    NAME being the old one's, and say in their records what the old ones were, so that `infini report OUTPUT gather=true` pools seeds.

    Args:
        arguments: Hydra overrides, runs=FOLDER and output=OUTPUT among them, and best=true for each run's best weights.
        train: called with a composed configuration, an output folder and overrides.

    Raises:
        InputError: an override that cannot be used, no run to go on from, or what failed, when all others are trained.
        KeyboardInterrupt: SIGINT or SIGTERM came; what ran is saved.
    """
    given = {key: value for key, _, value in (argument.partition("=") for argument in arguments)}
    for key in ("model", "weights", "-m", "--multirun", "sweep"):
        if key in given:
            raise InputError(f"{key} is given beside runs: each model goes on as it is in {given['runs']}; leave {key} out")
    if not given.get("output"):
        raise InputError("output is missing: give output=..., the folder of the new runs")
    logging.basicConfig(format="%(message)s")
    logging.getLogger("infini").setLevel(logging.INFO)
    folder, asked = Path(given["runs"]), [argument for argument in arguments if not argument.startswith(("runs=", "output=", "best="))]
    output, best = Path(given["output"]), given.get("best", "false")
    if best not in ("true", "false"):
        raise InputError(f"best is {best!r}; use true or false")

    def go_on(old: Path, new: Path) -> None:
        config = compose("train", [*as_saved(old, best == "true"), *asked, f"output={_quoted(str(new))}"])
        before = [override for override in overrides_of(read_record(old / "record.json")) if not override.startswith(f"{TUNED}=")]
        said = [override for override in asked if override.partition("=")[0] not in _UNSAID]
        train(config, new, sorted({override.partition("=")[0]: override for override in before + said}.values()))

    work_through([(old, output / old.relative_to(folder)) for old in picked_runs(folder)], go_on)


def as_saved(run: Path, best: bool = False) -> list[str]:
    """Overrides that give conf/train.yaml the model of a run, its weights (the last, or the best on held-out text) and its seed.

    Raises:
        InputError: there is no model of this library.
    """
    from infini import checkpoint
    from infini.cli.build import model_class

    folder = model_of(run, best)
    kind = str(checkpoint.model_type(folder))
    fields = checkpoint.read_config(folder, model_class(kind).config_class).to_dict()
    group = "infini_paper" if kind == "infini" else kind
    values = [f"model.{key}={_quoted(value) if isinstance(value, str) and value != BYTES else json.dumps(value)}" for key, value in fields.items()]
    return [f"model={group}", *values, f"weights={_quoted(str(folder))}", f"seed={read_record(run / 'record.json')['seeds']['train']}"]


def _quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
