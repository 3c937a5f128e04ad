"""`infini capacity` and `infini drift`: from a command line to a record, a table and a picture."""

import json

import pytest
import torch

from infini import InfiniConfig, InfiniTransformer
from infini.cli.main import main
from infini.cli.measure import Command, _is_measured, _load_model
from infini.errors import InputError
from infini.report.fingerprint import fingerprint

GRID = ["pairs=[1,3]", "distances=[0,200]", "rows=2", "asked=2", "device=cpu"]


@pytest.fixture
def models(tmp_path):
    """Two models that differ in d_k, under names that are the same but for their folders."""
    built = {}
    for dim in (8, 16):
        torch.manual_seed(dim)
        sizes = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, head_dim=dim)
        model = InfiniTransformer(InfiniConfig(**sizes, segment_length=64))
        model.save_pretrained(tmp_path / str(dim) / "model")
        built[str(tmp_path / str(dim) / "model")] = model
    return built


def test_capacity_of_models_that_differ_in_d_k_is_one_record(models, tmp_path, capsys):
    assert main(["capacity", f"checkpoint=[{','.join(models)}]", *GRID, f"output={tmp_path}/out"]) == 0
    record = json.loads((tmp_path / "out" / "record.json").read_text())
    assert record["kind"] == "capacity" and record["config"]["rows"] == 2 and record["seeds"] == {"text": 0}
    cells = [(row["model"], row["key_dim"], row["pairs"], row["distance"]) for row in record["rows"]]
    names = dict(zip((8, 16), models, strict=True))
    assert cells == [(names[d], d, pairs, far) for d in (8, 16) for pairs in (1, 3) for far in (0, 200)]
    assert record["data"] == {name: {"checkpoint_sha256": fingerprint(model)} for name, model in models.items()}
    assert record["rows"][0]["theory_linear"] != record["rows"][4]["theory_linear"]
    printed = capsys.readouterr().out
    assert (tmp_path / "out" / "record.md").read_text() in printed and f"{tmp_path}/out/record.png" in printed


def test_theory_can_be_reckoned_for_another_d_k(models, tmp_path):
    name = next(iter(models))
    assert main(["capacity", f"checkpoint={name}", *GRID, "key_dim=64", f"output={tmp_path}/out"]) == 0
    assert {row["key_dim"] for row in json.loads((tmp_path / "out" / "record.json").read_text())["rows"]} == {64}


def test_drift_leaves_a_record(models, tmp_path, capsys):
    name = next(iter(models))
    arguments = [f"checkpoint={name}", "lengths=[64,200]", "probe=32", "piece=64", "device=cpu", f"output={tmp_path}/out"]
    assert main(["drift", *arguments]) == 0
    record = json.loads((tmp_path / "out" / "record.json").read_text())
    assert [(row["model"], row["tokens"]) for row in record["rows"]] == [(name, 64), (name, 200)]
    assert all(0 < row["read_error"] < 1e-4 for row in record["rows"])
    assert "| 200 |" in capsys.readouterr().out and (tmp_path / "out" / "record.png").read_bytes()[:4] == b"\x89PNG"


def test_a_record_of_something_else_is_not_taken_for_the_one_asked_for(tmp_path):
    config = {"checkpoint": "runs/a/model", "output": "x", "device": "cpu", "dtype": None, "rows": 2}
    record = tmp_path / "record.json"
    assert not _is_measured(record, config)
    record.write_text(json.dumps({"schema": 1, "kind": "capacity", "command": "infini capacity", "config": config}))
    assert _is_measured(record, config | {"checkpoint": "moved/a/model", "output": "y", "device": "cuda"})
    for change in ({"dtype": "bfloat16"}, {"rows": 3}, {"asked": 2}, {"checkpoint": "runs/a/best/model"}):
        with pytest.raises(InputError, match=f"was measured with {'' if 'checkpoint' in change else next(iter(change))}.*choose another output"):
            _is_measured(record, config | change)


@pytest.mark.parametrize(("asked", "found"), [(None, torch.float32), ("bfloat16", torch.bfloat16)])
def test_a_model_is_measured_in_the_dtype_that_is_asked_for(models, asked, found):
    name = next(iter(models))
    model, called, _ = _load_model(name, Command(checkpoint=name, output="x", device="cpu", dtype=asked))
    assert {parameter.dtype for parameter in model.parameters()} == {found} and called == name


@pytest.mark.parametrize("command", ["capacity", "drift"])
def test_help_and_mistakes(command, tmp_path, capsys):
    assert main([command, "--help"]) == 0
    assert f"usage: infini {command}" in capsys.readouterr().out
    assert main([command, "pears=3", f"output={tmp_path}/out"]) == 2
    assert "nothing reads pears" in capsys.readouterr().err
    assert main([command, "checkpoint=nowhere", f"output={tmp_path}/out"]) == 2
    assert "there is no checkpoint folder 'nowhere'" in capsys.readouterr().err
    assert main([command, "seed=-1", "device=cpu", f"output={tmp_path}/out"]) == 2
    assert "seed is -1" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
