"""PEFT adapters beside gates that go on learning."""

from torch import nn

from infini.errors import InputError
from infini.hf.model import InfiniForCausalLM


def train_gates(model: nn.Module) -> list[str]:
    """Let the memory's own parameters learn beside an adapter: gates, write gates, scales and biases.

    PEFT freezes all that is not an adapter, and its adapter file holds adapters alone. What this function frees is kept by
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
    found = [module for module in model.modules() if isinstance(module, InfiniForCausalLM)]
    if not found:
        raise InputError(f"{type(model).__name__} holds no InfiniForCausalLM; give the model that get_peft_model returned")
    transformer = found[0].model
    # Adapters put in the place of a write gate have names of their own and train already.
    names = [name for name in transformer.parameter_groups()["memory"] if "lora_" not in name]
    if not names:
        raise InputError("the model has no memory in any layer; there are no gates to train")
    for name in names:
        transformer.get_parameter(name).requires_grad_(True)
    return names
