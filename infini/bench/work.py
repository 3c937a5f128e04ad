"""What must be moved and computed, counted from shapes; what a kernel moves or computes beyond it is its own fault.

Bytes: every input read once and every output written once. FLOP: of products alone, two for each multiply-add; of causal
scores only those below the diagonal; no recomputation. A backward pass computes twice what its forward pass does.
"""

from dataclasses import dataclass
from typing import Self

from infini.config import InfiniConfig

HALF = 2


@dataclass(frozen=True)
class Work:
    """Bytes and FLOP of a call."""

    bytes: float
    flop: float

    def __add__(self, other: Self) -> Self:
        return type(self)(self.bytes + other.bytes, self.flop + other.flop)

    def times(self, number: float) -> Self:
        """As much, so many times."""
        return type(self)(number * self.bytes, number * self.flop)


def attention(tokens: int, reach: int, heads: int, groups: int, dim: int, gradient: bool = False) -> Work:
    """Causal attention of `tokens` queries inside stretches of `reach` tokens, in 16 bits.

    Forward q, k, v are read and the output is written; with the gradient they, the output and its gradient are read again and
    three gradients are written.

    Example:
        >>> attention(8, 4, 1, 1, 16).flop  # 2 stretches x 10 pairs x 2 products x 16 x 2
        1280
    """
    flop = 4 * tokens * (reach + 1) // 2 * heads * dim
    many, few = HALF * tokens * heads * dim, HALF * tokens * groups * dim
    forward = Work(2 * many + 2 * few, flop)
    return forward + Work(4 * many + 4 * few, 2 * flop) if gradient else forward


def memory_part(tokens: int, heads: int, groups: int, dim: int, rule: str, gradient: bool = False) -> Work:
    """Write, read and mix of a layer's memory: q, k, v and the local output in, the mixed output out.

    `delta` must know the sums of the keys before it can write, so it reads them twice; beside sigma(K)^T V it makes sigma(K)^T
    sigma(K). A token of `deltanet` reads its own key's value before it writes. Memories themselves are not counted.

    Example:
        >>> memory_part(1, 1, 1, 16, "delta").flop / memory_part(1, 1, 1, 16, "linear").flop
        1.5
    """
    write = {"linear": 1, "delta": 2, "gamma_delta": 2, "deltanet": 2}[rule]
    flop = 2 * tokens * dim * dim * (groups * write + heads)
    many, few = HALF * tokens * heads * dim, HALF * tokens * groups * dim
    again = few if rule in ("delta", "gamma_delta") else 0
    forward = Work(3 * many + 2 * few + again, flop)
    # q, local output, its and the mix's gradient, k, v and their gradients.
    return forward + Work(5 * many + 4 * few + again, 2 * flop) if gradient else forward


def model_flop(config: InfiniConfig, tokens: int) -> int:
    """FLOP of the forward pass of one text: products with weights (the head's too), local attention, memory.

    Example:
        >>> one = InfiniConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=1, intermediate_size=16, memory_layers=())
        >>> model_flop(one, 1) == 2 * (4 * 16 * 16 + 3 * 16 * 16 + 16 * 256) + 4 * 16  # a token sees itself
        True
    """
    heads, groups, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    weights = config.hidden_size * (2 * (heads + groups) * dim + 3 * config.intermediate_size)
    reach = min(tokens, config.span)
    flop = 2 * tokens * (config.num_hidden_layers * weights + config.hidden_size * config.vocab_size)
    flop += config.num_hidden_layers * attention(tokens, reach, heads, groups, dim).flop
    return flop + sum(config.has_memory) * memory_part(tokens, heads, groups, dim, config.update_rule).flop
