"""From plain values to the frozen dataclasses that the library takes: nothing behind this file sees a configuration."""

import dataclasses
import difflib
import importlib
import re
import sys
import types
import typing
from collections.abc import Mapping
from importlib.resources import files
from typing import Any, Literal, Union

from infini.errors import InputError
from infini.field_types import in_words
from infini.report.record import checkout

CHECKOUT_HINT = "clone the repository and run `pip install -e .` in it"
ROOMS = ("infini.", "baselines.")  # `_target_` may name code of this project only


def locate(target: str) -> Any:
    """Imports what a `_target_` names: "infini.tasks.passkey.benchmark.run" -> that function.

    Raises:
        InputError: the name is outside this project, does not exist, or needs the checkout.
    """
    if not target.startswith(ROOMS):
        raise InputError(f"_target_ is {target!r}: it must name something of infini or baselines")
    if target.startswith("baselines."):
        root = checkout()
        if root is None:
            raise InputError(f"{target} is part of the checkout, not of the wheel: {CHECKOUT_HINT}")
        if str(root) not in sys.path:  # an editable installation shows infini alone
            sys.path.append(str(root))
    module, _, name = target.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        if error.name is None or not module.startswith(error.name):
            raise  # a dependency is missing, not the target
    except AttributeError:
        pass
    raise InputError(f"_target_ is {target!r}: there is no such name")


def model_class(model_type: str) -> Any:
    """The class of the models whose checkpoints say `model_type`: what conf/model/MODEL_TYPE.yaml names as `_model_`.

    >>> model_class("infini").__name__
    'InfiniTransformer'

    Raises:
        InputError: there is no such model, or it needs the checkout.
    """
    if model_type == "infini":
        return locate("infini.model.InfiniTransformer")
    values = files("infini.conf") / "model" / f"{model_type}.yaml"
    if not re.fullmatch(r"\w+", model_type) or not values.is_file():
        raise InputError(f"model_type is {model_type!r}, which is no model of this library: see conf/model")
    return locate(re.search(r"^_model_: (\S+)", values.read_text(), re.MULTILINE)[1])


def build(where: str, node: Mapping[str, Any]) -> Any:
    """Calls the dataclass that `node["_target_"]` names with the other keys of `node`.

    Args:
        where: the keys' common prefix, for messages ("model").
        node: plain values; keys that begin with an underscore are not passed on.

    Raises:
        InputError: as `fill`, or the target is not of this project.

    >>> build("model", {"_target_": "infini.config.InfiniConfig", "segment_length": 64}).segment_length
    64
    """
    return fill(locate(node["_target_"]), where, {key: value for key, value in node.items() if key[0] != "_"})


def fill(cls: type, where: str, values: Mapping[str, Any]) -> Any:
    """Calls a dataclass with plain values, each checked against the type of its field.

    Raises:
        InputError: a key that the dataclass does not have, a value of another type than its field, a field left out.
            The dataclass's own checks may raise it too.

    >>> from infini.config import InfiniConfig
    >>> fill(InfiniConfig, "model", {"segment_lenght": 4})
    Traceback (most recent call last):
    ...
    infini.errors.InputError: nothing reads model.segment_lenght; did you mean segment_length?
    """
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    for key in values:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(fields)}"
            raise InputError(f"nothing reads {_join(where, key)}; {hint}")
    for name, field in fields.items():
        if name not in values and field.default is field.default_factory is dataclasses.MISSING:
            raise InputError(f"{_join(where, name)} is missing: give it a value")
    return cls(**{key: _convert(_join(where, key), value, hints[key]) for key, value in values.items()})


def _convert(where: str, value: Any, hint: Any) -> Any:
    """The value as its field wants it: lists become tuples, whole numbers floats; nothing is guessed from text."""
    try:
        return _as(value, hint)
    except TypeError:
        raise InputError(f"{where} is {value!r} but must be {in_words(hint)}") from None


def _as(value: Any, hint: Any) -> Any:
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        for part in parts:
            try:
                return _as(value, part)
            except TypeError:
                continue
        raise TypeError
    if origin is Literal:
        if value in parts:
            return value
        raise TypeError
    if origin is tuple and isinstance(value, list):
        each = parts[:1] * len(value) if parts[1:] == (...,) else parts
        if len(each) != len(value):
            raise TypeError
        return tuple(_as(item, part) for item, part in zip(value, each, strict=True))
    if isinstance(origin, type) and issubclass(origin, Mapping) and isinstance(value, dict):
        return {_as(key, parts[0]): _as(item, parts[1]) for key, item in value.items()}
    if hint is float and type(value) is int:
        return float(value)
    if hint is Any or type(value) is (types.NoneType if hint is None else hint):
        return value
    raise TypeError


def _join(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key
