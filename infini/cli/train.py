"""`infini train`: one training run, or with -m a sweep, through Hydra's own command line."""

import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from infini.cli import onward
from infini.cli.build import CHECKOUT_HINT, build, locate
from infini.cli.compose import MODULE, explain, plain
from infini.cli.sweep import asked_for, ignored_keys, launched, run_job
from infini.config import ModelConfig
from infini.data.tokenizer import load_tokenizer
from infini.errors import InputError
from infini.report.record import checkout
from infini.tokenizer_file import BYTES

logger = logging.getLogger(__name__)


def run(arguments: list[str]) -> None:
    """Trains with Hydra overrides; with -m (--multirun) or sweep=NAME once for each combination of the values a,b,c; with runs=FOLDER
    on from every model of a sweep, see :mod:`infini.cli.onward`.

    A run that is already finished in its output folder is not run again, an unfinished one goes on.

    Raises:
        InputError: an override or an output folder that cannot be used, a sweep asked of a wheel, or failed jobs of a sweep.
        KeyboardInterrupt: SIGINT or SIGTERM came; what ran is saved.
    """
    if any(argument.startswith("runs=") for argument in arguments):
        onward.run(arguments, _train)
        return
    if _is_sweep(arguments) and checkout() is None:
        raise InputError(f"sweeps need the checkout, and this is a wheel: {CHECKOUT_HINT}")
    sys.argv = ["infini-train", *arguments]  # Hydra reads the process's own
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors reach `main` instead of ending the process here
    try:
        with launched():
            _application()
    except (HydraException, OmegaConfBaseException) as error:
        raise InputError(explain(error, "train")) from error
    except RuntimeError as error:
        if "srun" in str(error):  # submitit's word for no Slurm
            raise InputError("hydra/launcher=slurm finds no Slurm here (srun): use hydra/launcher=parallel") from error
        raise


def _is_sweep(arguments: Sequence[str]) -> bool:
    return any(argument in ("-m", "--multirun") or argument.startswith("sweep=") for argument in arguments)


def read(config: dict) -> tuple:
    """From a composed conf/train.yaml: the model's configuration, the training data, the settings."""
    for key in config.keys() - {"model", "task", "train", "seed", "output", "weights"}:
        raise InputError(f"nothing reads {key}; there are model, task, train, seed, weights and output")
    return tuple(build(part, config[part]) for part in ("model", "task", "train"))


def require_tokenizer(model_config: ModelConfig, source: Any) -> None:
    """Refuse a task that reads other tokens than the model, which would train without a word on ids of another meaning.

    Raises:
        InputError: they differ, or the tokenizer's vocabulary is not the model's.
    """
    reads = getattr(source, "tokenizer", BYTES)
    if reads != model_config.tokenizer:
        raise InputError(
            f"model.tokenizer is {model_config.tokenizer!r}, but the task reads {reads!r}: "
            "leave task.tokenizer out, it is the model's"
        )
    load_tokenizer(model_config)


def begin_with(model: Any, name_or_folder: str) -> dict:
    """Put the weights of a checkpoint into a new model; only the length of segments and the attention window may differ.

    Returns:
        What a record says of where a run began: the weights' checksum, and how far their own training reached.

    Raises:
        InputError: there is no such checkpoint, or it is of another model or tokenizer.
    """
    from infini import checkpoint
    from infini.report.fingerprint import fingerprint
    from infini.train.reach import read_reach

    folder = checkpoint.resolve(name_or_folder)
    other = type(model).from_pretrained(folder)
    mine, theirs = model.config.to_dict(), other.config.to_dict()
    for key in sorted(mine.keys() - {"tokenizer", "segment_length", "window"}):
        if mine[key] != theirs[key]:
            raise InputError(f"model.{key} is {mine[key]!r}, but the weights in {folder} are of a model with {theirs[key]!r}: make them equal")
    if load_tokenizer(model.config).fingerprint != load_tokenizer(other.config).fingerprint:
        raise InputError(f"model.tokenizer is {mine['tokenizer']!r}, but the weights in {folder} know another: use {theirs['tokenizer']!r}")
    model.load_state_dict(other.state_dict())
    return {"weights_sha256": fingerprint(other), **(read_reach(folder) or {})}


@hydra.main(version_base="1.3", config_path=f"pkg://{MODULE}", config_name="train")
def _application(config: DictConfig) -> None:
    job = HydraConfig.get()
    output = Path(job.runtime.output_dir)
    overrides = sorted(asked_for(job.overrides.task, ignored_keys(job)))
    if job.mode == RunMode.MULTIRUN:
        run_job(lambda: _train(plain(config), output, overrides), output, overrides)
    else:
        _train(plain(config), output, overrides)


def _train(config: dict, output: Path, overrides: Sequence[str] = ()) -> None:
    model_config, source, settings = read(config)
    require_tokenizer(model_config, source)
    import torch

    from infini.train import train

    torch.manual_seed(settings.seed)  # the first weights
    model = locate(config["model"]["_model_"])(model_config)
    origin = begin_with(model, config["weights"]) if config["weights"] else None
    train(model, source, settings, output, overrides=overrides, origin=origin)
    logger.info("finished: %s", output / "record.json")
