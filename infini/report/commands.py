"""Commands of many runs in few lines."""

from __future__ import annotations

import shlex
from collections.abc import Iterable

_SHOWN = 12  # values of one key; of more only the key is told: output folders, of which each run has its own


def together(commands: Iterable[str]) -> list[str]:
    """Command lines that differ in values alone as one line, its values in braces; the others as they are.

    A line then stands for commands that take some of its combinations, not for all of them: each record has its own.

    Args:
        commands: in any order; the same ones give the same lines.

    Example:
        >>> together(["infini train model=rmt seed=1", "infini report a", "infini train model=rmt seed=0"])
        ['infini report a', 'infini train model=rmt seed={0,1}']
    """
    families: dict[tuple[str, ...], list[list[str]]] = {}
    for words in map(shlex.split, sorted(set(commands))):
        families.setdefault(tuple(_key(word) for word in words), []).append(words)
    return [" ".join(_word(list(dict.fromkeys(values))) for values in zip(*family, strict=True)) for family in families.values()]


def _key(word: str) -> str:
    """What must be the same in two words of one line: all but the value of `key=value`."""
    key, equals, _ = word.partition("=")
    return key + equals if equals else word


def _word(words: list[str]) -> str:
    """One word for several that differ in their values."""
    if len(words) == 1:
        return shlex.quote(words[0])
    key = _key(words[0])
    return f"{key}{{{','.join(word.removeprefix(key) for word in words)}}}" if len(words) <= _SHOWN else f"{key}..."
