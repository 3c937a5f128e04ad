"""What every baseline's attention stands in and is made of: the block of `infini.layers`, and the projections of heads."""

from torch import Tensor, nn

from baselines.config import DecoderConfig
from infini.compiled import Part
from infini.errors import InputError
from infini.layers.block import Block
from infini.layers.rotary import rotate

__all__ = ["Block", "Heads", "RotaryHeads", "require_sdpa"]


class Heads(nn.Module):
    """The projections of multi-head attention (arXiv:1706.03762).

    Parameters (hidden size D, heads h, head width d): q_proj, k_proj, v_proj `[h d, D]`, o_proj `[D, h d]`, no biases.
    """

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.config = config
        width = config.num_attention_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=False)


class RotaryHeads(Heads):
    """Heads whose queries and keys are turned as soon as they are made (arXiv:2104.09864)."""

    def __init__(self, config: DecoderConfig):
        super().__init__(config)
        self.project = Part(project, (), (0, 1), (0, 1), (0, 1))


def project(heads: Heads, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Turned queries, turned keys, and values `[batch, tokens, heads, d]` of `x` `[batch, tokens, D]`."""
    q, k, v = (proj(x).unflatten(-1, (-1, heads.config.head_dim)) for proj in (heads.q_proj, heads.k_proj, heads.v_proj))
    return rotate(q, cos, sin), rotate(k, cos, sin), v


def require_sdpa(attention: str) -> str:
    """The backend, if it is one of a model whose attention runs through torch alone.

    Raises:
        InputError: it is not.
    """
    if attention not in ("auto", "sdpa"):
        raise InputError(f"the attention backend is {attention!r}; this model has 'sdpa' alone: use 'auto' or 'sdpa'")
    return attention
