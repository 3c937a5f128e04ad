"""What `pip install infini-attention` gives: one import name, the configuration, the weights, a working command."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FOLDERS = {"infini": "infini", "infini/conf": "conf", "infini/tasks": "tasks"}  # in the wheel -> in the tree


def tree() -> set[str]:
    """The files that belong in the wheel, by their names in it."""
    wanted = set()
    for inside, outside in FOLDERS.items():
        for path in (ROOT / outside).rglob("*"):
            for_readers = path.name == "README.md" and "weights" not in path.parts
            if path.is_file() and "__pycache__" not in path.parts and not for_readers:
                wanted.add(f"{inside}/{path.relative_to(ROOT / outside)}")
    return wanted


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for folder in FOLDERS.values():  # a copy: building leaves folders behind
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    pip("wheel", "--no-build-isolation", "-w", out, source)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def site(wheel, tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    pip("install", "--target", folder, wheel)
    return folder


def pip(command, *arguments):
    quiet = ["-q", "--disable-pip-version-check", "--no-deps", "--no-index"]
    subprocess.run([sys.executable, "-m", "pip", command, *quiet, *map(str, arguments)], check=True)


def run(site, *arguments, folder):
    # -S leaves out the .pth files, so that an editable installation of the tree cannot stand in for the wheel.
    paths = [str(site), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-S", str(site / "bin" / "infini"), *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_every_package_of_the_tree_is_listed():
    packages = {str(Path(name).parent).replace("/", ".") for name in tree() if name.endswith(".py")}
    assert packages == set(PROJECT["tool"]["setuptools"]["packages"])


def test_the_wheel_holds_the_tree_and_nothing_else(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    metadata = {name for name in names if ".dist-info/" in name}
    assert names - metadata == tree()
    assert {name.split("/")[0] for name in metadata} == {f"infini_attention-{PROJECT['project']['version']}.dist-info"}
    assert any(name.endswith("licenses/LICENSE") for name in metadata)


def test_help_and_version(site, tmp_path):
    assert "passkey" in run(site, "--help", folder=tmp_path).stdout
    assert run(site, "--version", folder=tmp_path).stdout == f"{PROJECT['project']['version']}\n"


def test_passkey_runs_from_an_empty_folder(site, tmp_path):
    from infini.config import InfiniConfig
    from infini.model import InfiniTransformer

    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    checkpoint, empty = tmp_path / "tiny", tmp_path / "empty"
    empty.mkdir()
    InfiniTransformer(InfiniConfig(**shape, segment_length=64)).save_pretrained(checkpoint)
    asked = (f"checkpoint={checkpoint}", "lengths=[320]", "depths=[0.5]", "samples=1", "output=out")
    result = run(site, "passkey", *asked, folder=empty)
    assert result.returncode == 0, result.stderr
    record = json.loads((empty / "out" / "record.json").read_text())
    assert record["source"]["why"] == "installed from a wheel"
    assert record["rows"][0]["length"] == 320
    assert {path.name for path in (empty / "out").iterdir()} >= {"record.json", "record.md", "record.png"}


def test_shipped_weights_are_found(site, tmp_path):
    from infini.checkpoint import shipped_names

    result = run(site, "passkey", "lengths=[320]", "depths=[0.5]", "samples=1", "output=out", folder=tmp_path)
    if shipped_names():
        assert result.returncode == 0, result.stderr
    else:
        assert "ships no model" in result.stderr


@pytest.mark.parametrize("asked", [["-m", "seed=1,2"], ["model._target_=baselines.transformer_xl.Config"]], ids=str)
def test_what_needs_the_checkout_says_so(asked, site, tmp_path):
    result = run(site, "train", "debug=tiny", *asked, folder=tmp_path)
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].endswith("clone the repository and run `pip install -e .` in it")
    assert "checkout" in result.stderr and "Traceback" not in result.stderr


def test_constraints_pin_every_dependency_of_make():
    project = PROJECT["project"]
    needed = project["dependencies"] + project["optional-dependencies"]["test"]
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pins = dict(line.split("==") for line in lines)  # every line is an exact version
    names = {requirement.partition(">")[0] for requirement in needed}
    assert names <= pins.keys()
    assert pins["torch"] == "2.13.0"
