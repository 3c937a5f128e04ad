"""The examples in the docstrings are run."""

import doctest
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {"infini": ROOT / "infini", "infini.tasks": ROOT / "tasks", "baselines": ROOT / "baselines"}


def with_examples():
    for package, folder in FOLDERS.items():
        for path in sorted(folder.rglob("*.py")):
            if ">>> " in path.read_text():
                yield ".".join([package, *path.relative_to(folder).with_suffix("").parts]).removesuffix(".__init__")


@pytest.mark.parametrize("name", list(with_examples()))
def test_examples(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted > 0
    assert result.failed == 0
