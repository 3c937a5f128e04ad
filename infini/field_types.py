"""Is a value what the field of a dataclass is meant to hold?

Python does not ask. A number that is no number, or the text "no" where false was meant, would be carried along and change what
is computed somewhere else.
"""

import dataclasses
import math
import types
import typing
from numbers import Integral, Real
from typing import Any, Literal, Union

from infini.errors import InputError


def check_types(filled: Any) -> None:
    """Check every field of a dataclass instance against its annotation.

    A whole number does for a float; true and false are no numbers, and NaN is none either. A list does for a tuple.

    Raises:
        InputError: a field holds something else.

    Example:
        >>> @dataclasses.dataclass
        ... class Shape:
        ...     layers: int
        ...     width: int | None = None
        >>> check_types(Shape(2))
        >>> check_types(Shape(2.5))
        Traceback (most recent call last):
        ...
        infini.errors.InputError: layers is 2.5; it must be a whole number
    """
    hints = typing.get_type_hints(type(filled))
    for field in dataclasses.fields(filled):
        value, hint = getattr(filled, field.name), hints[field.name]
        if not _fits(value, hint):
            raise InputError(f"{field.name} is {value!r}; it must be {in_words(hint)}")


def _fits(value: Any, hint: Any) -> bool:
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, part) for part in parts)
    if origin is tuple:
        if not isinstance(value, (tuple, list)):
            return False
        each = parts[:1] * len(value) if parts[1:] == (...,) else parts
        return len(each) == len(value) and all(map(_fits, value, each))
    if hint is int:
        return isinstance(value, Integral) and not isinstance(value, bool)
    if hint is float:
        return isinstance(value, Real) and not isinstance(value, bool) and not math.isnan(value)
    return isinstance(value, hint)


def in_words(hint: Any) -> str:
    """What an annotation asks for, as messages say it.

    Example:
        >>> in_words(int | None)
        'a whole number or null'
    """
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false", types.NoneType: "null"}
    if hint in names:
        return names[hint]
    if origin is Literal:
        return "one of " + ", ".join(map(str, parts))
    if origin is tuple:
        return "a list, each " + in_words(parts[0])
    if origin in (Union, types.UnionType):
        return " or ".join(map(in_words, parts))
    return str(hint)
