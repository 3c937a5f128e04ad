"""`infini train`: one training run, or with -m a sweep, through Hydra's own command line."""

import logging
import os
import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from infini.cli.build import CHECKOUT_HINT, build, locate
from infini.cli.compose import MODULE, explain, plain
from infini.errors import InputError
from infini.report.record import checkout

logger = logging.getLogger(__name__)


def run(arguments: list[str]) -> None:
    """Trains with Hydra overrides; with -m (--multirun) once for each combination of the values a,b,c.

    A run that is already finished in its output folder is not run again, an unfinished one goes on.

    Raises:
        InputError: an override or an output folder that cannot be used, or a sweep asked of a wheel.
    """
    if {"-m", "--multirun"} & set(arguments) and checkout() is None:
        raise InputError(f"sweeps need the checkout, and this is a wheel: {CHECKOUT_HINT}")
    sys.argv = ["infini-train", *arguments]  # Hydra reads the process's own
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors reach `main` instead of ending the process here
    try:
        _application()
    except (HydraException, OmegaConfBaseException) as error:
        raise InputError(explain(error, "train")) from error


def read(config: dict) -> tuple:
    """From a composed conf/train.yaml: the model's configuration, the training data, the settings."""
    for key in config.keys() - {"model", "task", "train", "seed", "output"}:
        raise InputError(f"nothing reads {key}; there are model, task, train, seed and output")
    return tuple(build(part, config[part]) for part in ("model", "task", "train"))


@hydra.main(version_base="1.3", config_path=f"pkg://{MODULE}", config_name="train")
def _application(config: DictConfig) -> None:
    job = HydraConfig.get()
    try:
        _train(plain(config), Path(job.runtime.output_dir))
    except Exception as error:
        if job.mode == RunMode.MULTIRUN:  # Hydra goes on, and shows only the first failure, at the end
            logger.error("%s failed: %s", job.runtime.output_dir, error)
        raise


def _train(config: dict, output: Path) -> None:
    model_config, source, settings = read(config)
    import torch

    from infini.train import train

    torch.manual_seed(settings.seed)  # the first weights
    model = locate(config["model"]["_model_"])(model_config)
    train(model, source, settings, output)
    logger.info("finished: %s", output / "record.json")
