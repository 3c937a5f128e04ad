"""A model as a folder: `config.json`, `model.safetensors`, `tokenizer.json` unless it reads bytes. Nothing in it is ever executed."""

import json
import os
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from infini import tokenizer_file
from infini.config import InfiniConfig, ModelConfig
from infini.errors import InputError
from infini.tensor_file import write_tensors

CONFIG_FILE, WEIGHTS_FILE, INDEX_FILE = "config.json", "model.safetensors", "model.safetensors.index.json"
FORMAT = "infini-1"
TRANSFORMERS_NOTES = ("architectures", "dtype", "transformers_version")  # in a folder written there; no choices of the model
TOKENIZER_KEY = "tokenizer_sha256"
SHIPPED = Path(__file__).parent / "weights"

Config = TypeVar("Config", bound=ModelConfig)


def resolve(name_or_folder: str | os.PathLike | None) -> Path:
    """The folder of a checkpoint: a path, or the name of a model that the library ships (None: the first of them)."""
    shipped = shipped_names()
    if name_or_folder is None:
        if not shipped:
            raise InputError("this installation ships no model; name a checkpoint folder")
        return SHIPPED / shipped[0]
    folder = Path(name_or_folder)
    if folder.is_dir():
        return folder
    if str(name_or_folder) in shipped:
        return SHIPPED / str(name_or_folder)
    raise InputError(f"there is no checkpoint folder {str(folder)!r}; shipped models are {shipped}")


def shipped_names() -> list[str]:
    """Names of the models inside the package."""
    return sorted(path.parent.name for path in SHIPPED.glob(f"*/{WEIGHTS_FILE}"))


def write(folder: str | os.PathLike, config: ModelConfig, weights: dict[str, Tensor]) -> None:
    """Write a checkpoint folder; each file appears whole or not at all, the weights last.

    Raises:
        InputError: the tokenizer that the configuration names does not exist.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = tokenizer_file.store(folder, config.tokenizer)
    fields = {"model_type": config.model_type, "format": FORMAT, **config.to_dict()}
    fields["tokenizer"] = tokenizer_file.stored_name(config.tokenizer)
    part = folder / (CONFIG_FILE + ".part")
    part.write_text(json.dumps(fields, indent=2) + "\n")
    os.replace(part, folder / CONFIG_FILE)
    # The weights say which tokenizer they know, so that another file in its place is found out.
    write_tensors(folder / WEIGHTS_FILE, weights, {"format": "pt"} | ({TOKENIZER_KEY: tokenizer} if tokenizer else {}))


def model_type(folder: str | os.PathLike) -> str | None:
    """Which kind of model a checkpoint folder says that it holds (`ModelConfig.model_type`).

    Raises:
        InputError: its `config.json` is missing or not JSON.
    """
    return _fields(folder).get("model_type")


def read_config(folder: str | os.PathLike, config_class: type[Config] = InfiniConfig) -> Config:
    """The configuration in a checkpoint folder, of the kind of model that `config_class` belongs to.

    Raises:
        InputError: it is missing, not JSON, of another model or format, or has fields or values that this version does not know.
    """
    fields, path = _fields(folder), Path(folder) / CONFIG_FILE
    found = fields.pop("model_type", None)
    if found != config_class.model_type:
        raise InputError(
            f"{path} is of another model: model_type is {found!r}, not {config_class.model_type!r}; load it with the class of that model"
        )
    found = fields.pop("format", None)
    if found != FORMAT:
        raise InputError(f"{path} has format {found!r}; this version reads {FORMAT!r}")
    fields["tokenizer"] = tokenizer_file.find(Path(folder), fields.get("tokenizer", tokenizer_file.BYTES))
    return config_class.from_dict({name: value for name, value in fields.items() if name not in TRANSFORMERS_NOTES})


def _fields(folder: str | os.PathLike) -> dict:
    path = Path(folder) / CONFIG_FILE
    if not path.is_file():
        raise InputError(f"{folder} is no checkpoint: it has no {CONFIG_FILE}")
    try:
        fields = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not JSON ({error}); the file is damaged") from None
    return fields if isinstance(fields, dict) else {}


def read_weights(folder: str | os.PathLike, expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights in a checkpoint folder, in one file or in shards with an index, checked against `expected` names and shapes.

    Raises:
        InputError: a file is missing, a pickle, cut short, of another configuration or tokenizer, or holds a NaN or an infinity.
    """
    path, weights = Path(folder) / WEIGHTS_FILE, {}
    for part in _weight_files(Path(folder)):
        try:
            weights |= load_file(part)
            _check_tokenizer(part)
        except SafetensorError as error:
            raise InputError(f"{part} cannot be read ({error}); it is cut short or no safetensors file: copy it again") from None
        except FileNotFoundError:
            raise InputError(f"{part} is missing, {INDEX_FILE} names it: copy the whole folder") from None
    if set(weights) != set(expected):
        missing, extra = sorted(set(expected) - set(weights)), sorted(set(weights) - set(expected))
        raise InputError(f"{path} belongs to another configuration: missing {missing[:3]}, unexpected {extra[:3]}")
    for name, tensor in weights.items():
        if tensor.shape != expected[name].shape:
            raise InputError(
                f"{path} belongs to another configuration: {name} is {list(tensor.shape)}, "
                f"{CONFIG_FILE} asks for {list(expected[name].shape)}"
            )
    require_finite(path, weights)
    return weights


def require_tokenizer(folder: str | os.PathLike, stored: str) -> str:
    """The tokenizer that a folder's `config.json` names, as a path, once it is known to be the one of the weights.

    Raises:
        InputError: it is missing, or another than the weights were trained with.
    """
    found = tokenizer_file.find(Path(folder), stored)
    for part in _weight_files(Path(folder)):
        _check_tokenizer(part)
    return found


def _check_tokenizer(weights: Path) -> None:
    with safe_open(weights, framework="pt") as file:
        trained = (file.metadata() or {}).get(TOKENIZER_KEY)
    if trained is not None and tokenizer_file.fingerprint(tokenizer_file.locate(str(weights.parent))) != trained:
        raise InputError(
            f"{weights.parent / tokenizer_file.FILE} is another tokenizer than the one that {weights.name} was trained with: "
            "copy both from the same folder"
        )


def require_finite(path: str | os.PathLike, weights: dict[str, Tensor]) -> None:
    """Refuse weights of a training that diverged.

    Raises:
        InputError: one of them holds a NaN or an infinity.
    """
    for name, tensor in weights.items():
        if not torch.isfinite(tensor).all():
            raise InputError(f"{path}: {name} holds a NaN or an infinity; the training that wrote it diverged")


def _weight_files(folder: Path) -> list[Path]:
    if (folder / WEIGHTS_FILE).is_file():
        return [folder / WEIGHTS_FILE]
    index = folder / INDEX_FILE
    if not index.is_file():
        others = sorted(p.name for p in folder.glob("*.bin")) + sorted(p.name for p in folder.glob("*.pt"))
        hint = f"; {others} may be pickles, which are not loaded: convert them to safetensors" if others else ""
        raise InputError(f"{folder} has no {WEIGHTS_FILE}{hint}")
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{index} is no index of shards ({error!r}); copy the whole folder again") from None
    if strange := [name for name in names if not name.endswith(".safetensors") or Path(name).name != name]:
        raise InputError(f"{index} names {strange}; shards are safetensors files in the same folder")
    return [folder / name for name in names]
