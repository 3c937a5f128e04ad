"""The sweeps of conf/sweep: every job composes, and what is compared is comparable."""

import dataclasses
import importlib.util
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from hydra import compose as hydra_compose
from hydra import initialize_config_module
from hydra.core.global_hydra import GlobalHydra

from infini.cli import train
from infini.cli.build import locate
from infini.cli.compose import compose
from infini.cli.sweep import combinations
from infini.config import InfiniConfig

CONF = Path(str(files("infini.conf")))
TEXTS = f"task.texts=[{CONF}/train.yaml]"
SHORT = [TEXTS, "train.steps=5", "train.warmup_steps=1"]
NEEDS = {"ablation": [], "head_to_head": SHORT, "head_to_head_paper": SHORT, "head_to_head_bytes": SHORT}
SEEDS_AND_RATES = 3 * 3


def hydra_of(*overrides):
    GlobalHydra.instance().clear()
    with initialize_config_module("infini.conf", version_base="1.3"):
        return hydra_compose("train", list(overrides), return_hydra_config=True).hydra


def jobs_of(sweep):
    hydra = hydra_of(f"sweep={sweep}")
    assert hydra.mode.name == "MULTIRUN"
    return combinations([f"{key}={value}" for key, value in hydra.sweeper.params.items()])


def rows_of(sweep):
    """One job of each row."""
    found = {}
    for job in jobs_of(sweep):
        found.setdefault(next(value for value in job if value.partition("=")[0] in ("model", "experiment")), job)
    return found


def parameters(config):
    with torch.device("meta"):
        return sum(p.numel() for p in locate(config["model"]["_model_"])(train.read(config)[0]).parameters())


def test_there_is_no_other_sweep():
    assert {path.stem for path in (CONF / "sweep").iterdir()} == NEEDS.keys()


def test_the_ablation_has_all_of_its_rows_each_at_every_rate_and_seed():
    rows, jobs = rows_of("ablation"), jobs_of("ablation")
    assert rows.keys() == {f"experiment=ablation/{path.stem}" for path in (CONF / "experiment" / "ablation").iterdir()}
    assert len(jobs) == len(rows) * SEEDS_AND_RATES
    for experiment, job in rows.items():
        config, alone = compose("train", ["sweep=ablation", *job]), compose("train", [experiment])
        assert config["output"] == "runs/ablation"
        assert config["model"] == alone["model"]  # the sweep changes nothing but what it sweeps
        assert config["task"] == alone["task"] and config["train"] == alone["train"] | {"learning_rate": 5e-4}


def test_head_to_head_is_equal_in_parameters_texts_tokens_and_window():
    rows = rows_of("head_to_head")
    configs = {row: compose("train", ["sweep=head_to_head", *NEEDS["head_to_head"], *job]) for row, job in rows.items()}
    assert len(jobs_of("head_to_head")) == len(rows) * SEEDS_AND_RATES
    sizes = {row: parameters(config) for row, config in configs.items()}
    assert len(sizes) == 7 and max(sizes.values()) < 1.01 * min(sizes.values()), sizes
    assert parameters(compose("train", ["model=transformer_xl", "output=x"])) > 1.05 * min(sizes.values())  # what there was to make equal

    built = {row: train.read(config) for row, config in configs.items()}
    first_source, first_settings = (built["model=infini_long"][i] for i in (1, 2))
    for model, source, settings in built.values():
        assert settings == first_settings
        assert [getattr(source, f.name) for f in dataclasses.fields(source)] == [getattr(first_source, f.name) for f in dataclasses.fields(source)]
        assert model.segment_length == 512
    assert first_source.segments * first_source.segment_length == built["model=full_row"][0].window == 4096
    assert {built[f"model={name}"][0].window for name in ("infini_long", "sliding", "gated_deltanet")} == {512}
    assert {built[f"model={name}"][0].memory_length for name in ("transformer_xl_equal", "memorizing")} == {512}


def test_the_papers_rows_join_the_head_to_head_in_all_but_the_model():
    rows = rows_of("head_to_head_paper")
    assert len(jobs_of("head_to_head_paper")) == len(rows) * SEEDS_AND_RATES and not rows.keys() & rows_of("head_to_head").keys()
    configs = {row.removeprefix("model="): compose("train", ["sweep=head_to_head_paper", *SHORT, *job]) for row, job in rows.items()}
    long = compose("train", ["sweep=head_to_head", *SHORT, *rows_of("head_to_head")["model=infini_long"]])
    sizes = [parameters(config) for config in (*configs.values(), long)]
    assert len(sizes) == 4 and max(sizes) < 1.01 * min(sizes)
    for config in configs.values():
        assert {key: value for key, value in config.items() if key != "model"} == {key: value for key, value in long.items() if key != "model"}

    built = {name: train.read(config)[0] for name, config in configs.items()}
    for name, rule in (("infini_paper", "linear"), ("infini_paper_delta", "delta")):
        assert built[name] == InfiniConfig.paper(segment_length=512, update_rule=rule)
    assert (built["memorizing_65k"].memory_size, built["memorizing_65k"].memory_length) == (65536, 512)
    # The goal of the comparison: a hundredth of what the Memorizing Transformer carries over a border of a long book.
    with torch.device("meta"):
        carried = {name: locate(configs[name]["model"]["_model_"])(config).carried(512 * 1000).numbers for name, config in built.items()}
    assert carried["memorizing_65k"] > 250 * carried["infini_paper"] == 250 * carried["infini_paper_delta"]


def test_side_by_side_is_a_job_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    launcher = hydra_of("hydra/launcher=parallel", "output=x").launcher
    assert launcher.n_jobs == 4 and launcher.batch_size == "1" and launcher._target_.endswith("JoblibLauncher")
    assert hydra_of("hydra/launcher=parallel", "hydra.launcher.n_jobs=16", "output=x").launcher.n_jobs == 16


@pytest.mark.skipif(importlib.util.find_spec("submitit") is None, reason="needs submitit")
def test_slurm_is_configuration():
    launcher = hydra_of("hydra/launcher=slurm", "hydra.launcher.partition=gpu", "output=x").launcher
    assert (launcher.gpus_per_node, launcher.partition) == (1, "gpu") and launcher._target_.endswith("SlurmLauncher")
