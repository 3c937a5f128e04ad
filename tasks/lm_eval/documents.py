"""Documents and scores for the YAML files beside this one; lm-eval imports it by its path."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from infini.tasks.passkey.benchmark import PasskeyBenchmark, draw_questions
from infini.tasks.passkey.needles import needle_kind
from infini.tasks.passkey.prompt import Haystack, build_prompt
from infini.tasks.passkey.score import first_integer
from infini.tasks.text_files import read_texts

from infini.data.tokenizer import ByteTokenizer
from infini.errors import InputError


def passkey(needle: str = "passkey", **metadata: Any) -> dict:
    """The prompts of ``infini passkey``, the same for the same values, as an lm-eval data set.

    Args:
        needle: what is hidden, see :mod:`infini.tasks.passkey.needles`.
        metadata: ``lengths`` in bytes, ``depths``, ``samples`` a cell, ``seed``, ``haystack``; what else lm-eval
            passes on is not used.

    Returns:
        ``{"test": Dataset}`` with columns text, key, length, depth.

    Raises:
        InputError: a value that cannot be used.
    """
    known = {"depths": (0.0, 0.25, 0.5, 0.75, 1.0), "samples": 1, "seed": 0, "haystack": "repeat"}
    asked = {name: metadata.get(name, value) for name, value in known.items()}
    lengths = metadata.get("lengths", (4096, 16384))
    for name, value in (("lengths", lengths), ("depths", asked["depths"])):
        if not isinstance(value, list | tuple):
            raise InputError(f"{name} is {value!r}; give a list, such as [4096]")
    asked |= {"lengths": tuple(lengths), "depths": tuple(asked["depths"])}
    settings = PasskeyBenchmark(needle=needle, **asked)
    tokenizer = ByteTokenizer()
    haystack = Haystack.load(settings.haystack, tokenizer, needle_kind(needle).filler)
    rows = []
    for length, depth in settings.cells():
        for one in draw_questions(settings, haystack, length, depth):
            prompt = build_prompt(tokenizer, length, depth, one.key, haystack, one.phase, one.quiz)
            text = tokenizer.decode(prompt.ids.tolist())
            rows.append({"text": text, "key": one.key, "length": length, "depth": depth})
    return _data_set(rows)


def niah_single_1(**metadata: Any) -> dict:
    """As :func:`passkey` with RULER's niah_single_1 (arXiv 2404.06654): a number of seven digits, one needle."""
    return passkey("niah_single_1", **metadata)


def texts(text: str | None = None, **metadata: Any) -> dict:
    """Whole text files as documents.

    Args:
        text: a path or a glob pattern; each file is one document.
        metadata: not used.

    Returns:
        ``{"test": Dataset}`` with columns text, path.

    Raises:
        InputError: no pattern, or no such file.
    """
    if text is None:
        raise InputError("""no text is named; give --metadata '{"text": "books/*.txt"}'""")
    paths = sorted(glob.glob(text, recursive=True)) or [text]
    return _data_set([{"text": read_texts(path), "path": path} for path in paths])


def infinitebench(split: str, **metadata: Any) -> dict:
    """One subset of InfiniteBench (arXiv 2402.13718) from the hub.

    Args:
        split: its name there, such as ``"passkey"``.
        metadata: not used.

    Returns:
        ``{split: Dataset}`` with columns id, context, input, answer, options.
    """
    import datasets

    text, texts = datasets.Value("string"), datasets.Sequence(datasets.Value("string"))
    columns = {"id": datasets.Value("int64"), "context": text, "input": text, "answer": texts, "options": texts}
    return {split: datasets.load_dataset("xinrongzhang2022/InfiniteBench", features=datasets.Features(columns), split=split)}


def score_number(document: Mapping[str, Any], results: list[str]) -> dict:
    """Right if the first integer of the answer is the one that is asked for."""
    return {"exact_match": float(first_integer(results[0]) in document["answer"])}


def score_value(document: Mapping[str, Any], results: list[str]) -> dict:
    """Right if a word of the answer is the value that is asked for."""
    words = re.split(r"""[\s:"'.,?!{}]+""", results[0])
    return {"exact_match": float(any(answer in words for answer in document["answer"]))}


def score_key(document: Mapping[str, Any], results: list[str]) -> dict:
    """Right if the first integer of the answer is the key."""
    exact = first_integer(results[0]) == str(document["key"])
    return {"exact_match": float(exact), "by_cell": (document["length"], document["depth"], float(exact))}


def mean_by_cell(items: Iterable[tuple[int, float, float]]) -> dict[str, float]:
    """Exact match for each length and depth.

    Example:
        >>> mean_by_cell([(4096, 0.5, 1.0), (4096, 0.5, 0.0), (8192, 0.5, 1.0)])
        {'4096 at 0.5': 0.5, '8192 at 0.5': 1.0}
    """
    cells: dict[str, list[float]] = {}
    for length, depth, exact in items:
        cells.setdefault(f"{length} at {depth:g}", []).append(exact)
    return {cell: torch.tensor(values).mean().item() for cell, values in cells.items()}


def _data_set(rows: list[dict]) -> dict:
    import datasets

    return {"test": datasets.Dataset.from_list(rows)}
