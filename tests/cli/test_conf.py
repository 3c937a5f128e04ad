"""Every YAML composes and every value of it reaches a dataclass."""

import dataclasses
import json
from importlib.resources import files
from pathlib import Path

import pytest
import torch

from infini.cli import bench, bench_decode, generate, measure, passkey, peak, summarize, tokenizer, train
from infini.cli.build import fill
from infini.cli.compose import compose
from infini.config import InfiniConfig

CONF = Path(str(files("infini.conf")))


def options(group):
    files = [path.relative_to(CONF / group) for path in (CONF / group).rglob("*.yaml")]
    return sorted(path.with_suffix("").as_posix() for path in files if path.parts[0] != "base")  # no option by itself


# What a file leaves to the command line: any text will do.
NEEDS = {f"experiment=passkey_mixed_12m{far}": [f"task.haystacks=[{__file__}]"] for far in ("", "_far")}
NEEDS["task=stream"] = [f"task.texts=[{__file__}]"]
PAIRS = Path(__file__).with_name("pairs.jsonl")
BYTES = ["model.tokenizer=bytes", "model.vocab_size=256"]
NEEDS["task=booksum"] = [f"task.pairs=[{PAIRS}]"]
NEEDS |= {f"experiment=booksum_{step}": [*NEEDS["task=booksum"], *BYTES] for step in ("questions", "summaries")}
NEEDS |= {f"experiment=booksum_{step}": [*NEEDS["task=stream"], *BYTES] for step in ("lm", "long")}
NEEDS["model=full_row"] = ["task=stream", *NEEDS["task=stream"]]  # as long as the rows of documents

MEASURES = {"capacity": [], "drift": [], "speed": [], "perplexity": ["texts=[x]"], "booksum": ["pairs=[x]"]}
TRAIN = [
    [f"{group}={option}", *NEEDS.get(f"{group}={option}", ()), "output=x"] for group in ("model", "task") for option in options(group)
]
TRAIN += [[f"{group}={option}", *NEEDS.get(f"{group}={option}", ())] for group in ("experiment", "debug") for option in options(group)]


@pytest.mark.parametrize("overrides", TRAIN, ids=" ".join)
def test_train_composes_and_builds(overrides):
    config = compose("train", overrides)
    model, source, settings = train.read(config)
    assert source.segment_length == model.segment_length
    assert len(source) == settings.steps * settings.accumulation
    assert source.seed == settings.seed == config["seed"]


def settled(row):
    """What a row of the ablation computes, key by key."""
    model, source, settings = train.read(compose("train", [f"experiment=ablation/{row}"]))
    parts = {"model": model, "task": source, "train": settings}
    return {(part, field.name): getattr(value, field.name)
            for part, value in parts.items() for field in dataclasses.fields(value) if field.init}


@pytest.mark.parametrize(
    ("row", "before", "changed"),
    [
        ("delta", "linear", {"update_rule"}),
        ("qk_norm", "linear", {"qk_norm"}),
        ("write_gate", "qk_norm", {"write_gate"}),
        ("sliding", "write_gate", {"local_attention", "window"}),
        ("long_gap", "sliding", {"gap_share", "gap_growth", "max_gap_segments"}),
        ("short_conv", "sliding", {"short_conv"}),
        ("gamma_delta", "sliding", {"update_rule"}),
        ("deltanet", "sliding", {"update_rule", "qk_norm", "feature_map"}),
        ("no_recall", "linear", {"recall_share_start", "recall_share_end"}),
        ("plain_loss", "linear", {"token_weight", "answer_weight"}),
        ("short_rows", "linear", {"max_segments"}),
        ("frozen_gates", "linear", {"memory_learning_rate_scale"}),
        ("paper_inputs", "no_recall", {"min_segments", "max_segments", "near_share", "border_share", "dense_question_share"}),
    ],
)
def test_a_row_of_the_ablation_changes_one_thing(row, before, changed):
    one, other = settled(before), settled(row)
    assert {name for part, name in one if one[part, name] != other[part, name]} == changed


@pytest.fixture(scope="module")
def sources():
    """The texts that a row of the ablation is trained on."""
    return {row: train.read(compose("train", [f"experiment=ablation/{row}"]))[1] for row in ("linear", "no_recall", "short_rows", "paper_inputs")}


def test_rows_of_the_ablation_that_take_from_the_training_take_it(sources):
    asked = {name: [bytes(row).decode("latin-1") for step in (0, 4499) for row in source[step].tokens.numpy()] for name, source in sources.items()}
    assert {name for name, rows in asked.items() if all("pass key" in row for row in rows)} == {"no_recall", "paper_inputs"}
    assert [max(sources[name].top(step) for step in (0, 4499)) * 256 for name in ("linear", "short_rows", "paper_inputs")] == [24576, 2048, 5120]
    assert {sources["paper_inputs"][step].segments for step in (0, 1000, 4499)} == {20}
    questions = [row.count("What is the pass key?") for row in asked["paper_inputs"]]
    assert set(questions) == {1} and max(row.count("What is the pass key?") for row in asked["no_recall"]) > 1


def test_frozen_gates_stay_where_they_begin():
    _, _, settings = train.read(compose("train", ["experiment=ablation/frozen_gates", "train.learning_rate=2e-3"]))
    moved = settings.steps * settings.learning_rate * settings.memory_learning_rate_scale  # AdamW steps are of about its rate
    assert torch.sigmoid(torch.tensor(10 * moved)) == 0.5


@pytest.mark.parametrize("grid", options("grid"))
def test_passkey_composes_and_builds(grid):
    _, settings, benchmark = passkey.read(compose("passkey", [f"grid={grid}"]))
    assert callable(benchmark)
    assert all(length >= 4096 for length, _ in settings.cells())


@pytest.mark.parametrize("kind", MEASURES)
def test_measures_compose_and_build(kind):
    config = compose(kind, MEASURES[kind])
    command, settings, run = measure.read(config)
    assert callable(run)
    fields = {field.name for value in (command, settings) for field in dataclasses.fields(value)}
    assert fields == {key for key in config if key[0] != "_"}


def test_tokenizer_composes_and_builds():
    config = compose("tokenizer", ["texts=[x]", "output=y"])
    assert dataclasses.asdict(fill(tokenizer.Command, "", config)) | {"texts": ["x"]} == config


def test_bench_composes_and_builds():
    config = compose("bench", [])
    output, device, settings = bench.read(config)
    assert {"output": str(output), "device": device} | json.loads(json.dumps(dataclasses.asdict(settings))) == config


def test_bench_decode_and_peak_compose_and_build():
    assert fill(bench_decode.Command, "", compose("bench_decode", [])).paths == ("eager", "graph")
    config = compose("peak", [])
    command, settings, ask = peak.read(config)
    assert callable(ask)
    fields = {field.name for value in (command, settings) for field in dataclasses.fields(value)}
    assert fields == {key for key in config if key[0] != "_"}


def test_no_yaml_is_outside_the_tests_above():
    tested = {f"{name}.yaml" for name in ("passkey", "train", "generate", "summarize", "bench", "bench_decode", "peak", "tokenizer", *MEASURES)}
    tested |= {"task/base/rows.yaml"}  # composed into every task of rows
    tested |= {str(path.relative_to(CONF)) for group in ("sweep", "hydra") for path in (CONF / group).rglob("*.yaml")}  # in test_sweep_conf
    for group in ("model", "task", "experiment", "debug", "grid"):
        tested |= {f"{group}/{option}.yaml" for option in options(group)}
    assert {str(path.relative_to(CONF)) for path in CONF.rglob("*.yaml")} == tested


@pytest.mark.parametrize("preset", ["paper", "long"])
def test_model_yaml_is_the_preset(preset):
    model, _, _ = train.read(compose("train", [f"model=infini_{preset}", "output=x"]))
    assert model == getattr(InfiniConfig, preset)()


def test_every_setting_can_be_overridden_without_a_plus():
    config = compose("train", ["output=x"])
    built = train.read(config)
    for part, value in zip(("model", "task", "train"), built, strict=True):
        assert {field.name for field in dataclasses.fields(value)} == {key for key in config[part] if key[0] != "_"}
    config = compose("passkey", [])
    command, settings, _ = passkey.read(config)
    fields = {field.name for value in (command, settings) for field in dataclasses.fields(value)}
    assert fields == {key for key in config if key[0] != "_"}
    config = compose("generate", [f"prompt_file={__file__}"])
    assert {field.name for field in dataclasses.fields(generate.Command)} == config.keys()
    fill(generate.Command, "", config)
    config = compose("summarize", [f"input={__file__}"])
    assert {field.name for field in dataclasses.fields(summarize.Command)} == config.keys()
    fill(summarize.Command, "", config)


def test_accumulation_lengthens_the_data_not_the_run():
    _, source, settings = train.read(compose("train", ["debug=tiny", "train.accumulation=3"]))
    assert (settings.steps, len(source)) == (4, 12)


def test_laptop_grid_is_the_one_of_the_readme():
    _, settings, _ = passkey.read(compose("passkey", ["grid=laptop"]))
    five = [0.0, 0.25, 0.5, 0.75, 1.0]
    expected = [(length, depth) for length in (4096, 16384, 65536) for depth in five] + [(131072, 0.5)]
    assert settings.cells() == expected
    assert settings.samples == 1
