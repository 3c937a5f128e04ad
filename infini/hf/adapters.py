"""PEFT adapters beside gates that go on learning."""

import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from infini.checkpoint import require_finite
from infini.errors import InputError
from infini.hf.model import InfiniForCausalLM
from infini.tensor_file import write_tensors

GATES_FILE = "gates.safetensors"


def train_gates(model: nn.Module) -> list[str]:
    """Let the memory's own parameters learn beside an adapter: gates, write gates, scales and biases.

    PEFT freezes all that is not an adapter, and its adapter file holds adapters alone, that of a `Trainer`'s checkpoint too. What
    this function frees is kept by `save_gates`, in a `Trainer`'s checkpoints by its callback `KeepGates`, or by
    `model.merge_and_unload().save_pretrained(folder)`, which writes a whole checkpoint.

    Args:
        model: what `peft.get_peft_model` returned, or an `InfiniForCausalLM`.

    Returns:
        Names of the parameters, as in `InfiniTransformer.parameter_groups()["memory"]`.

    Raises:
        InputError: there is no `InfiniForCausalLM` in it, or it has no memory.

    Example:
        >>> from infini.hf import InfiniHFConfig
        >>> model = InfiniForCausalLM(InfiniHFConfig(hidden_size=32, num_hidden_layers=1)).requires_grad_(False)
        >>> train_gates(model)
        ['blocks.0.attention.beta']
        >>> [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        ['model.blocks.0.attention.beta']
    """
    gates = gates_of(model)
    for parameter in gates.values():
        parameter.requires_grad_(True)
    return list(gates)


def save_gates(model: nn.Module, folder: str | os.PathLike) -> None:
    """Write what `train_gates` frees to `gates.safetensors`, for example beside an adapter.

    Args:
        model: as in `train_gates`.
        folder: made if it is missing.

    Raises:
        InputError: as `train_gates`.
    """
    gates = gates_of(model)
    Path(folder).mkdir(parents=True, exist_ok=True)
    write_tensors(Path(folder) / GATES_FILE, gates)


@torch.no_grad()
def load_gates(model: nn.Module, folder: str | os.PathLike) -> list[str]:
    """Put back what `save_gates` wrote, after the adapter is loaded; returns the names as `train_gates` does.

    Raises:
        InputError: as `train_gates`, or the file is missing, damaged, of another model or not finite.
    """
    gates, path = gates_of(model), Path(folder) / GATES_FILE
    try:
        found = load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} cannot be read ({error}); it is written by save_gates") from None
    missing, extra = sorted(gates.keys() - found.keys()), sorted(found.keys() - gates.keys())
    if missing or extra:
        raise InputError(f"{path} belongs to another model: missing {missing[:3]}, unexpected {extra[:3]}")
    for name, tensor in found.items():
        if tensor.shape != gates[name].shape:
            raise InputError(f"{path} belongs to another model: {name} is {list(tensor.shape)}, not {list(gates[name].shape)}")
    require_finite(path, found)
    for name, parameter in gates.items():
        parameter.copy_(found[name])
    return list(gates)


def gates_of(model: nn.Module) -> dict[str, Tensor]:
    """What `train_gates` frees, by name.

    Raises:
        InputError: as `train_gates`.
    """
    found = [module for module in model.modules() if isinstance(module, InfiniForCausalLM)]
    if not found:
        raise InputError(f"{type(model).__name__} holds no InfiniForCausalLM; give the model that get_peft_model returned")
    transformer = found[0].model
    # Adapters put in the place of a write gate have names of their own and train already.
    names = [name for name in transformer.parameter_groups()["memory"] if "lora_" not in name]
    if not names:
        raise InputError("the model has no memory in any layer; there are no gates to train")
    return {name: transformer.get_parameter(name) for name in names}
