"""`infini passkey runs=...` and `infini capacity runs=...`: every model of a sweep, each with a record in its run."""

import fcntl
import json

import pytest
import torch

from infini import InfiniConfig, InfiniTransformer
from infini.cli.main import main
from infini.cli.runs import held, measure_each, runs_below
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

    before = {path: (sweep / path).read_bytes() for path in found}
    good = InfiniTransformer.from_pretrained(sweep / "seed=0" / "model")
    good.save_pretrained(sweep / "seed=1" / "model")
    assert main([command, f"runs={sweep}", *asked, "output=somewhere/mine"]) == 0
    assert (sweep / "seed=1" / "mine" / "record.json").exists()
    assert {path: (sweep / path).read_bytes() for path in found} == before  # nothing was measured again
    assert main([command, f"runs={sweep}", *asked, "seed=3", "output=somewhere/mine"]) == 2
    assert "choose another output" in capsys.readouterr().err
    assert {path: (sweep / path).read_bytes() for path in found} == before


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
        assert main([command, "runs=a", "checkpoint=b"]) == 2
        assert "checkpoint is b and runs is a: give one of them" in capsys.readouterr().err
