"""The rows at equal bytes of the comparison carry what they say."""

import importlib
from importlib.resources import files

import pytest
import torch
import yaml

from infini.cli import train
from infini.cli.compose import compose

SWEEP = yaml.safe_load(files("infini.conf").joinpath("sweep/head_to_head_bytes.yaml").read_text())
ROWS = SWEEP["hydra"]["sweeper"]["params"]["model"].split(",")


def built(name):
    """The model of a row of the sweep, without numbers, and how many parameters it has."""
    config = compose("train", [f"model={name}", "sweep=head_to_head_bytes", f"task.texts=[{__file__}]", "seed=0"])
    module, _, kind = config["model"]["_model_"].rpartition(".")
    with torch.device("meta"):
        model = getattr(importlib.import_module(module), kind)(train.read(config)[0])
    return model, sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("row", ROWS)
def test_it_carries_the_bytes_of_infini_long_and_has_its_parameters(row):
    (ours, parameters), (model, others) = built("infini_long"), built(row)
    border = 4096 * ours.config.segment_length
    assert abs(model.carried(border).bytes / ours.carried(border).bytes - 1) < 1e-3
    assert abs(others / parameters - 1) < 0.01


def test_without_more_they_carry_another_number_of_bytes():
    border, kept = 2**20, {row: built(row.removesuffix("_bytes"))[0].carried(2**20).bytes for row in ROWS}
    ours = built("infini_long")[0].carried(border).bytes
    assert all(abs(number / ours - 1) > 0.1 for number in kept.values())
