"""A model as a folder: `config.json` and `model.safetensors`. Nothing in it is ever executed."""

import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from infini.config import InfiniConfig
from infini.errors import InputError
from infini.tensor_file import write_tensors

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
FORMAT = "infini-1"
SHIPPED = Path(__file__).parent / "weights"


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


def write(folder: str | os.PathLike, config: InfiniConfig, weights: dict[str, Tensor]) -> None:
    """Write a checkpoint folder; each file appears whole or not at all, the weights last."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    fields = {"model_type": "infini", "format": FORMAT, **config.to_dict()}
    part = folder / (CONFIG_FILE + ".part")
    part.write_text(json.dumps(fields, indent=2) + "\n")
    os.replace(part, folder / CONFIG_FILE)
    write_tensors(folder / WEIGHTS_FILE, weights, {"format": "pt"})


def read_config(folder: str | os.PathLike) -> InfiniConfig:
    """The configuration in a checkpoint folder.

    Raises:
        InputError: it is missing, not JSON, of another format, or has fields or values that this version does not know.
    """
    path = Path(folder) / CONFIG_FILE
    if not path.is_file():
        raise InputError(f"{folder} is no checkpoint: it has no {CONFIG_FILE}")
    try:
        fields = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not JSON ({error}); the file is damaged") from None
    if not isinstance(fields, dict) or fields.pop("model_type", None) != "infini":
        raise InputError(f"{path} does not describe a model of this library (model_type is not 'infini')")
    found = fields.pop("format", None)
    if found != FORMAT:
        raise InputError(f"{path} has format {found!r}; this version reads {FORMAT!r}")
    return InfiniConfig.from_dict(fields)


def read_weights(folder: str | os.PathLike, expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights in a checkpoint folder, checked against `expected` names and shapes.

    Raises:
        InputError: the file is missing, a pickle, cut short, of another configuration, or holds a NaN or an infinity.
    """
    path = Path(folder) / WEIGHTS_FILE
    if not path.is_file():
        others = sorted(p.name for p in Path(folder).glob("*.bin")) + sorted(p.name for p in Path(folder).glob("*.pt"))
        hint = f"; {others} may be pickles, which are not loaded: convert them to safetensors" if others else ""
        raise InputError(f"{folder} has no {WEIGHTS_FILE}{hint}")
    try:
        weights = load_file(path)
    except SafetensorError as error:
        raise InputError(f"{path} cannot be read ({error}); it is cut short or no safetensors file: copy it again") from None
    if set(weights) != set(expected):
        missing, extra = sorted(set(expected) - set(weights)), sorted(set(weights) - set(expected))
        raise InputError(f"{path} belongs to another configuration: missing {missing[:3]}, unexpected {extra[:3]}")
    for name, tensor in weights.items():
        if tensor.shape != expected[name].shape:
            raise InputError(
                f"{path} belongs to another configuration: {name} is {list(tensor.shape)}, "
                f"{CONFIG_FILE} asks for {list(expected[name].shape)}"
            )
        if not torch.isfinite(tensor).all():
            raise InputError(f"{path}: {name} holds a NaN or an infinity; the training that wrote it diverged")
    return weights
