"""The choices that all baselines share, with the defaults of `InfiniConfig`, so that models of one size meet."""

from dataclasses import dataclass

from infini.config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class DecoderConfig(ModelConfig):
    """Shape of a decoder; immutable, checked at construction.

    Raises:
        InputError: a value is out of its range.
    """

    vocab_size: int = 256
    hidden_size: int = 512
    intermediate_size: int = 1408
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    head_dim: int | None = None
    """Width of a head; None: hidden_size / num_attention_heads."""
    segment_length: int = 512
    """Tokens of a segment."""
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = True
    initializer_range: float = 0.02
    tokenizer: str = "bytes"
    """Name of the tokenizer that the checkpoint was trained with."""

    def __post_init__(self) -> None:
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
