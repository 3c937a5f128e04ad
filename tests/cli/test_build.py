"""Values become fields by type, and nothing is guessed."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import pytest

from infini.cli.build import fill, locate, model_class
from infini.errors import InputError


@dataclass(frozen=True)
class Settings:
    count: int = 1
    share: float = 0.5
    name: str | None = None
    on: bool = False
    pair: tuple[float, float] = (0.0, 1.0)
    many: tuple[int, ...] | Mapping[int, tuple[int, ...]] = ()
    kind: Literal["a", "b"] = "a"
    other: Any = None


GOOD = [("count", 2, 2), ("share", 1, 1.0), ("name", None, None), ("name", "x", "x"), ("on", True, True)]
GOOD += [("pair", [1, 2], (1.0, 2.0)), ("many", [1, 2], (1, 2)), ("many", {1: [2]}, {1: (2,)})]
GOOD += [("kind", "b", "b"), ("other", {}, {})]
BAD = [("count", True), ("count", 1.0), ("count", "1"), ("share", "0.5"), ("share", True), ("name", 3)]
BAD += [("on", 1), ("on", "true"), ("pair", [1]), ("pair", 1), ("many", [1.5]), ("many", {"1": [2]}), ("kind", "c")]


@pytest.mark.parametrize(("key", "value", "expected"), GOOD, ids=str)
def test_a_value_of_the_fields_type_arrives(key, value, expected):
    got = getattr(fill(Settings, "", {key: value}), key)
    assert got == expected
    assert type(got) is type(expected)


@pytest.mark.parametrize(("key", "value"), BAD, ids=str)
def test_any_other_value_is_refused_by_name(key, value):
    with pytest.raises(InputError, match=f"^there.{key} is .* but must be "):
        fill(Settings, "there", {key: value})


def test_a_dependency_that_is_missing_is_not_taken_for_the_target(monkeypatch):
    def without_triton(module):
        raise ModuleNotFoundError("No module named 'triton'", name="triton")

    with pytest.raises(InputError, match="there is no such name"):
        locate("infini.nowhere.Thing")
    monkeypatch.setattr("importlib.import_module", without_triton)
    with pytest.raises(ModuleNotFoundError, match="triton"):
        locate("infini.model.InfiniTransformer")


@pytest.mark.parametrize("model_type", ["llama", "../train", "../model/rmt"])
def test_a_kind_of_model_is_a_name_in_conf_model(model_type):
    with pytest.raises(InputError, match="which is no model of this library"):
        model_class(model_type)
