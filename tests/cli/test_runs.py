"""`infini passkey runs=...` and `infini capacity runs=...`: every model of a sweep, each with a record in its run."""

import fcntl
import json
import shutil

import pytest
import torch

from infini import InfiniConfig, InfiniTransformer
from infini.cli.main import main
from infini.cli.runs import held, measure_each, model_of, require_runs, runs_below
from infini.errors import InputError

PASSKEY = ["lengths=[300]", "depths=[0,1]", "samples=1", "device=cpu"]
CAPACITY = ["pairs=[1,3]", "distances=[50]", "rows=2", "asked=2", "device=cpu"]


@pytest.fixture
def sweep(tmp_path):
    """Three runs; the weights of the second are damaged."""
    for seed in range(3):
        torch.manual_seed(seed)
        shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        folder = tmp_path / "sweep" / f"seed={seed}" / "model"
        InfiniTransformer(InfiniConfig(**shape, segment_length=64)).save_pretrained(folder)
    (tmp_path / "sweep" / "seed=1" / "model" / "model.safetensors").write_bytes(b"no weights")
    return tmp_path / "sweep"


@pytest.mark.parametrize(("command", "asked"), [("passkey", PASSKEY), ("capacity", CAPACITY)])
def test_each_model_has_a_record_and_a_damaged_one_stops_no_other(command, asked, sweep, capsys):
    assert main([command, f"runs={sweep}", *asked, "output=somewhere/mine"]) == 2
    error = capsys.readouterr().err
    assert "error: 1 of 3 runs failed, the others are done:" in error and f"{sweep}/seed=1: " in error
    found = {path.relative_to(sweep): json.loads(path.read_text()) for path in sweep.rglob("record.json")}
    assert sorted(map(str, found)) == ["seed=0/mine/record.json", "seed=2/mine/record.json"]
    for path, record in found.items():
        assert record["config"]["checkpoint"] == str(sweep / path.parts[0] / "model") and record["config"]["runs"] is None
        if command == "capacity":
            assert {row["model"] for row in record["rows"]} == {"infini"} == record["data"].keys()  # alike in every run, for the report

    before = {path: (sweep / path).read_bytes() for path in found}
    good = InfiniTransformer.from_pretrained(sweep / "seed=0" / "model")
    good.save_pretrained(sweep / "seed=1" / "model")
    assert main([command, f"runs={sweep}", *asked, "output=somewhere/mine"]) == 0
    assert (sweep / "seed=1" / "mine" / "record.json").exists()
    assert {path: (sweep / path).read_bytes() for path in found} == before  # nothing was measured again
    assert main([command, f"runs={sweep}", *asked, "seed=3", "output=somewhere/mine"]) == 2
    assert "choose another output" in capsys.readouterr().err
    assert {path: (sweep / path).read_bytes() for path in found} == before


@pytest.fixture
def grid(sweep, tmp_path):
    """The sweep's three models as runs of a grid: two rates of one row, of which the second has the lower loss, and another row."""
    InfiniTransformer.from_pretrained(sweep / "seed=0" / "model").save_pretrained(sweep / "seed=1" / "model")
    (tmp_path / "text.txt").write_text("The sea is wide and the ship is small. " * 9)
    for seed, (model, rate, loss) in enumerate((("a", "1e-3", 2.0), ("a", "2e-3", 1.0), ("b", "1e-3", 3.0))):
        record = {"schema": 1, "kind": "train", "command": "infini train", "config": {}, "seeds": {"train": 0}, "metrics": {"loss": loss}}
        overrides = [f"model={model}", f"train.learning_rate={rate}"]
        (sweep / f"seed={seed}" / "record.json").write_text(json.dumps(record | {"overrides": overrides}))
    return sweep


MEASURES = {
    "passkey": PASSKEY,
    "capacity": CAPACITY,
    "perplexity": ["texts=[text.txt]", "device=cpu"],
    "speed": ["lengths=[40]", "train_lengths=[]", "tokens=2", "repeats=1", "device=cpu"],
}


@pytest.mark.parametrize("command", MEASURES)
def test_only_the_picked_runs_are_measured_where_that_is_asked(command, grid, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    asked = [command, f"runs={grid}", *MEASURES[command], "output=mine"]
    assert main([*asked, "picked=true"]) == 0, capsys.readouterr().err
    found = {path.parts[-3]: path.read_bytes() for path in grid.rglob("mine/record.json")}
    assert sorted(found) == ["seed=1", "seed=2"]
    assert not any(json.loads(record)["config"]["picked"] for record in found.values())
    # What picked them is not what they are: the others join them, and these stay.
    assert main(asked) == 0
    assert {path.parts[-3]: path.read_bytes() for path in grid.rglob("mine/record.json")}.items() > found.items()


def test_runs_are_picked_by_what_the_report_was_told(grid):
    done = []
    measure_each(grid, "x", lambda model, output: done.append(output.parent.name), picked=True)
    for seed, digits in enumerate((0.9, 0.1, 0.5)):
        row = {"length": 8, "depth": 0.5, "samples": 4, "exact_match": 0.5, "digit_accuracy": digits}
        (grid / f"seed={seed}" / "validation").mkdir()
        record = {"schema": 1, "kind": "passkey", "command": "infini passkey", "config": {}, "rows": [row]}
        (grid / f"seed={seed}" / "validation" / "record.json").write_text(json.dumps(record))
    (grid / "sweep.json").write_text(json.dumps({"jobs": [], "report": {"pick": "validation/digit_accuracy"}}))
    measure_each(grid, "x", lambda model, output: done.append(output.parent.name), picked=True)
    assert done == ["seed=1", "seed=2", "seed=0", "seed=2"]


def test_the_best_weights_are_of_their_run_and_measured_where_they_are_asked_for(sweep):
    from infini.train.held_out import FILE

    for seed in range(3):
        shutil.copytree(sweep / f"seed={seed}" / "model", sweep / f"seed={seed}" / "best" / "model")
        (sweep / f"seed={seed}" / "best" / "model" / FILE).write_text('{"step": 3, "loss": 1.0}')
    assert runs_below(sweep) == [sweep / f"seed={seed}" for seed in range(3)]
    done = []
    for best in (False, True):
        measure_each(sweep, "x", lambda model, output: done.append((str(model.relative_to(sweep)), output.name)), best=best)
    assert done == [(f"seed={seed}/{folder}", "x") for folder in ("model", "best/model") for seed in range(3)]
    (sweep / "seed=1" / "best" / "model" / FILE).unlink()
    with pytest.raises(InputError, match="best is true, but .*seed=1 has no best/model: it was trained without train.validate_every"):
        model_of(sweep / "seed=1", best=True)
    for asked in ("picked", "best"):
        with pytest.raises(InputError, match=f"{asked} is true, but runs is null"):
            require_runs(asked == "picked", asked == "best", None)


def test_what_another_process_works_on_is_left_to_it(sweep):
    done = []
    (sweep / "seed=0" / "x").mkdir()
    with (sweep / "seed=0" / "x" / ".lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        measure_each(sweep, "x", lambda model, output: done.append(output.parent.name))
    assert done == ["seed=1", "seed=2"]
    measure_each(sweep, "x", lambda model, output: done.append(output.parent.name))
    assert done[2:] == ["seed=0", "seed=1", "seed=2"]
    with held(sweep) as mine, held(sweep) as also:
        assert mine and not also


def test_an_unexpected_error_stops_no_other(sweep):
    done = []

    def measure(model, output):
        if "seed=0" in str(model):
            raise torch.OutOfMemoryError("out of memory")
        done.append(output)

    with pytest.raises(InputError, match="1 of 3 runs failed.*\n.*seed=0: out of memory"):
        measure_each(sweep, "x", measure)
    assert len(done) == 2


def test_a_folder_without_models_and_two_sources(tmp_path, capsys):
    with pytest.raises(InputError, match="there is no trained model in"):
        runs_below(tmp_path)
    for command in ("passkey", "capacity"):
        assert main([command, "picked=true", "checkpoint=nowhere"]) == 2
        assert "picked is true, but runs is null" in capsys.readouterr().err
        assert main([command, "runs=a", "checkpoint=b"]) == 2
        assert "checkpoint is b and runs is a: give one of them" in capsys.readouterr().err
