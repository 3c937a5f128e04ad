"""A trained tokenizer as one file, `tokenizer.json`, beside a model's configuration. Plain JSON: nothing in it is ever executed.

A configuration's `tokenizer` is `bytes`, or the path of such a file (or of its folder); inside a checkpoint folder it is the
file's bare name, so that the folder can be moved.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path

from infini.errors import InputError

BYTES = "bytes"
FILE = "tokenizer.json"
# How transformers is to read it: byte 0, which no text holds, is the padding and the end of a text, as with bytes.
FOR_TRANSFORMERS = "tokenizer_config.json"
_SETTINGS = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "model_input_names": ["input_ids", "attention_mask"],
    "pad_token": "\0",
    "eos_token": "\0",
    "padding_side": "left",
    "clean_up_tokenization_spaces": False,
}


def locate(name: str) -> Path:
    """The file that a configuration's `tokenizer` names: itself, or `tokenizer.json` in that folder.

    Raises:
        InputError: there is no such file.
    """
    path = Path(name) / FILE if Path(name).is_dir() else Path(name)
    if not path.is_file():
        raise InputError(
            f"the tokenizer is {name!r}; this version knows 'bytes' or a {FILE}, and there is no such file: "
            "make one with infini tokenizer"
        )
    return path


def fingerprint(path: Path) -> str:
    """SHA-256 of a tokenizer's vocabulary, merges and cutting rule, whatever else its file says and however it is laid out.

    Raises:
        InputError: the file is no byte-level BPE tokenizer.
    """
    try:
        content = json.loads(path.read_text("utf-8"))
        parts = {"vocab": content["model"]["vocab"], "merges": content["model"]["merges"], "cut": content["pre_tokenizer"]}
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is no BPE tokenizer ({error!r}): copy it again, or make one with infini tokenizer") from None
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def stored_name(name: str) -> str:
    """What `config.json` of a checkpoint folder says in place of a path.

    >>> stored_name("bytes"), stored_name("runs/books/tokenizer.json")
    ('bytes', 'tokenizer.json')
    """
    return BYTES if name == BYTES else FILE


def store(folder: Path, name: str) -> str | None:
    """Put the tokenizer that a configuration names into a checkpoint folder; its fingerprint, or None for bytes.

    Raises:
        InputError: there is no such file, or it is no tokenizer.
    """
    if name == BYTES:
        return None
    source, target = locate(name), folder / FILE
    digest = fingerprint(source)
    if not (target.exists() and target.samefile(source)):
        part = target.with_name(FILE + ".part")
        shutil.copyfile(source, part)
        os.replace(part, target)
    (folder / FOR_TRANSFORMERS).write_text(json.dumps(_SETTINGS, indent=2) + "\n")
    return digest


def find(folder: Path, stored: str) -> str:
    """The inverse of `stored_name`: what a configuration's `tokenizer` is once its folder is known.

    Raises:
        InputError: it names a file outside the folder, or one that is missing.
    """
    if stored == BYTES:
        return stored
    if stored != FILE:
        raise InputError(f"{folder}: the tokenizer is {stored!r}; this version knows 'bytes' and {FILE!r}, in the same folder")
    if not (folder / FILE).is_file():
        raise InputError(f"{folder / FILE} is missing; the model was trained with it: copy the whole folder")
    return str(folder / FILE)
