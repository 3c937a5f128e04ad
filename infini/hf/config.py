"""`InfiniConfig` as a configuration of transformers."""

import dataclasses
import json
from typing import Any

from transformers import PreTrainedConfig

from infini.checkpoint import FORMAT
from infini.config import InfiniConfig
from infini.errors import InputError
from infini.tokenizer_file import stored_name

# What transformers may hand over that is none of our choices.
_BOOKKEEPING = {"model_type", "name_or_path", "attn_implementation", "torch_dtype", "num_labels", "experts_implementation"}


class InfiniHFConfig(PreTrainedConfig):
    """The fields of :class:`infini.InfiniConfig`, with its defaults and its checks, for transformers.

    `config.json` written by it is the one that `infini train` writes, and `infini.load` opens it.

    Raises:
        InputError: as `InfiniConfig`, an unknown field, or a file of another format.

    Example:
        >>> config = InfiniHFConfig(hidden_size=64, num_attention_heads=2)
        >>> config.head_dim, config.infini == InfiniConfig(hidden_size=64, num_attention_heads=2)
        (32, True)
    """

    model_type = "infini"
    keys_to_ignore_at_inference = ["past_key_values"]

    vocab_size: int = 256
    hidden_size: int = 512
    intermediate_size: int = 1408
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    segment_length: int = 512
    update_rule: str = "linear"
    feature_map: str | None = None
    write_gate: bool = False
    qk_norm: bool = False
    memory_layers: list[int] | None = None
    local_attention: str = "segment"
    window: int | None = None
    short_conv: int = 0
    gate_when_empty: bool = False
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = True
    initializer_range: float = 0.02
    tokenizer: str = "bytes"

    def __post_init__(self, **kwargs: Any) -> None:
        if (found := kwargs.pop("format", FORMAT)) != FORMAT:
            raise InputError(f"the configuration has format {found!r}; this version reads {FORMAT!r}")
        if unknown := sorted(name for name in kwargs if name not in _BOOKKEEPING and not name.startswith("_")):
            raise InputError(f"the configuration has unknown fields {unknown}; known are {sorted(_FIELDS)}")
        for name, value in self.infini.to_dict().items():  # derived values, such as head_dim
            setattr(self, name, value)
        super().__post_init__(**kwargs)

    @property
    def infini(self) -> InfiniConfig:
        """The same choices as the model takes them, checked again."""
        return InfiniConfig.from_dict({name: getattr(self, name) for name in _FIELDS})

    @property
    def max_position_embeddings(self) -> int:
        """There is no limit; tools that cut a text at this length then cut nothing."""
        return 2**40

    def to_json_string(self, use_diff: bool = True) -> str:
        """The text of `config.json`: every choice, whatever `use_diff`, so that a later change of a default changes no model."""
        fields = {"model_type": self.model_type, "format": FORMAT, **self.infini.to_dict()}
        fields["tokenizer"] = stored_name(self.tokenizer)
        fields |= {"architectures": ["InfiniForCausalLM"], "transformers_version": self.to_dict()["transformers_version"]}
        return json.dumps(fields, indent=2) + "\n"


_FIELDS = tuple(field.name for field in dataclasses.fields(InfiniConfig))
