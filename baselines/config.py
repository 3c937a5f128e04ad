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
    """`bytes`, or the path of the `tokenizer.json` that the model is trained with."""

    def __post_init__(self) -> None:
        self._check_shape()
