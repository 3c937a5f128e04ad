"""Every choice of the model, validated once. Fields carry Hugging Face's names."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from infini.errors import InputError
from infini.field_types import check_types

UPDATE_RULES = ("linear", "delta", "gamma_delta", "deltanet")
FEATURE_MAPS = ("elu", "dpfp", "none")
LOCAL_ATTENTIONS = ("segment", "sliding")


class ModelConfig:
    """What the configurations of all models do alike; they are frozen dataclasses that check themselves when they are made."""

    model_type: ClassVar[str]
    """Names the kind of model in a checkpoint folder."""

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-ready values; `from_dict` is its inverse."""
        return {name: list(x) if isinstance(x, tuple) else x for name, x in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Self:
        """Build from `to_dict`'s result; an unknown field is an `InputError`."""
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(fields) - known)
        if unknown:
            raise InputError(f"the configuration has unknown fields {unknown}; known are {sorted(known)}")
        return cls(**{name: tuple(x) if isinstance(x, list) else x for name, x in fields.items()})

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _require(self, name: str, holds: bool, limit: str) -> None:
        if not holds:
            raise InputError(f"{name} is {getattr(self, name)!r}; it must be {limit}")

    def _check_shape(self) -> None:
        """Check every field's type and the values of those that every decoder has; set `head_dim` where it is None."""
        check_types(self)
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "segment_length",
        ):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        if self.head_dim is None:
            self._require(
                "hidden_size",
                self.hidden_size % self.num_attention_heads == 0,
                f"a multiple of num_attention_heads = {self.num_attention_heads}, or head_dim must be given",
            )
            self._set("head_dim", self.hidden_size // self.num_attention_heads)
        self._require("head_dim", self.head_dim >= 2 and self.head_dim % 2 == 0, "even, for the positions")
        for name in ("rope_theta", "rms_norm_eps"):
            self._require(name, 0 < getattr(self, name) < math.inf, "greater than 0")
        self._require("initializer_range", 0 <= self.initializer_range < math.inf, "0 or more")


@dataclass(frozen=True, kw_only=True)
class InfiniConfig(ModelConfig):
    """Shape and rules of an `InfiniTransformer`; immutable, checked at construction.

    The defaults are the published layer in a small model. `InfiniConfig.paper(...)` and `InfiniConfig.long(...)` are the
    two presets: exactly arXiv:2404.07143, and what was made for long texts; the shipped model is the second with `short_conv` 8.

    Raises:
        InputError: a value is out of its range or two values contradict each other.

    Example:
        >>> InfiniConfig(num_attention_heads=8, num_key_value_heads=2, hidden_size=256).head_dim
        32
    """

    model_type: ClassVar[str] = "infini"

    vocab_size: int = 256
    hidden_size: int = 512
    intermediate_size: int = 1408
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int | None = None
    """Key/value heads, each with one memory that its group of query heads shares; None: as many as query heads."""
    head_dim: int | None = None
    """Width of a head; None: hidden_size / num_attention_heads."""

    segment_length: int = 512
    """Tokens between two writes of the memory."""
    update_rule: str = "linear"
    """`linear` or `delta` (the paper's), `gamma_delta` (ARMT's normalizer), `deltanet` (token by token, no normalizer)."""
    feature_map: str | None = None
    """sigma: `elu` (ELU + 1, the paper's) or `dpfp`; None: `elu`, and `none` for `deltanet`, which knows no other."""
    write_gate: bool = False
    """A learned strength in [0, 1] for every token and key/value head, with which its pair is written."""
    qk_norm: bool = False
    """RMSNorm, learned scale and bias per head on the memory's queries and keys; the local attention's stay as they are."""
    memory_layers: tuple[int, ...] | None = None
    """Layers that have a memory; None: all. The others attend locally."""
    local_attention: str = "segment"
    """`segment`: nothing is seen across a segment border (the paper). `sliding`: each token sees the last `window` tokens."""
    window: int | None = None
    """Tokens that sliding attention sees, itself included; None: segment_length."""
    short_conv: int = 0
    """Tokens back that a causal convolution of each attention layer's input reaches, over segment borders too; 0: none, the paper."""
    gate_when_empty: bool = False
    """The paper read literally: an empty memory reads 0 and is mixed in. False: local attention is left whole."""

    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = True
    initializer_range: float = 0.02
    tokenizer: str = "bytes"
    """`bytes`, or the path of the `tokenizer.json` that the model is trained with."""

    def __post_init__(self) -> None:
        self._check_shape()
        if self.num_key_value_heads is None:
            self._set("num_key_value_heads", self.num_attention_heads)
        self._require(
            "num_key_value_heads",
            self.num_key_value_heads >= 1 and self.num_attention_heads % self.num_key_value_heads == 0,
            f"a divisor of num_attention_heads = {self.num_attention_heads}",
        )
        self._require("update_rule", self.update_rule in UPDATE_RULES, f"one of {', '.join(UPDATE_RULES)}")
        if self.feature_map is None:
            self._set("feature_map", "none" if self.update_rule == "deltanet" else "elu")
        allowed = ("none",) if self.update_rule == "deltanet" else ("elu", "dpfp")
        self._require("feature_map", self.feature_map in allowed, f"one of {', '.join(allowed)} for {self.update_rule}")
        self._require(
            "qk_norm",
            not (self.qk_norm and self.update_rule == "deltanet"),
            "False for deltanet, whose queries and keys are unit vectors already",
        )
        # Sparse features leave directions in which z stays 0 and M does not; sharp ones make such reads unbounded.
        self._require(
            "feature_map",
            not (self.feature_map == "dpfp" and self.update_rule == "gamma_delta" and self.qk_norm),
            '"elu" for gamma_delta with qk_norm: with "dpfp" reads are unbounded',
        )
        if self.memory_layers is not None:
            self._set("memory_layers", tuple(sorted(set(self.memory_layers))))
            self._require(
                "memory_layers",
                all(0 <= layer < self.num_hidden_layers for layer in self.memory_layers),
                f"layer indices from 0 to {self.num_hidden_layers - 1}",
            )
        self._require(
            "local_attention", self.local_attention in LOCAL_ATTENTIONS, f"one of {', '.join(LOCAL_ATTENTIONS)}"
        )
        self._require("short_conv", self.short_conv >= 0, "0 or more tokens")
        if self.local_attention == "sliding" and self.window is None:
            self._set("window", self.segment_length)
        if self.local_attention == "segment":
            self._require("window", self.window is None, 'None, because local_attention is "segment"')
        else:
            # A token behind the window that is not written yet would be seen by nobody.
            self._require(
                "window", self.window >= self.segment_length, f"at least segment_length = {self.segment_length}"
            )

    @classmethod
    def paper(cls, **changes: Any) -> Self:
        """The published layer: ELU + 1, no norm, no write gate, segmented local attention; linear unless changed."""
        return cls(**{"update_rule": "linear", "feature_map": "elu", "local_attention": "segment"} | changes)

    @classmethod
    def long(cls, **changes: Any) -> Self:
        """For long texts: normalised memory queries and keys, a write gate, local attention across borders."""
        rule = {"update_rule": "linear", "qk_norm": True, "write_gate": True, "local_attention": "sliding"}
        return cls(**rule | changes)

    @property
    def has_memory(self) -> tuple[bool, ...]:
        """For every layer, whether it has a memory."""
        layers = range(self.num_hidden_layers)
        return tuple(self.memory_layers is None or layer in self.memory_layers for layer in layers)

    @property
    def span(self) -> int:
        """Tokens, itself included, that a token's local attention can reach: what a state keeps of the recent text, plus 1."""
        return self.window if self.local_attention == "sliding" else self.segment_length
