"""Rotary positions (arXiv:2104.09864), for local attention only: the memory knows no positions."""

import torch
from torch import Tensor


def rotary_table(positions: Tensor, dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines `[batch, tokens, 1, dim / 2]` for integer positions `[batch, tokens]`.

    Angles are made in fp64: in fp32 a position of ten million has no digits left behind the comma.
    """
    frequency = theta ** (-torch.arange(0, dim, 2, dtype=torch.float64, device=positions.device) / dim)
    angle = (positions.double().unsqueeze(-1) * frequency).unsqueeze(2)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (x_i, x_{i + d/2}) of `[batch, tokens, heads, d]` by their positions' angles; dtype of `x` is kept.

    Args:
        x: queries or keys.
        cos, sin: `rotary_table` of its tokens.

    Example:
        >>> x = torch.randn(1, 1, 1, 8)
        >>> turned = [rotate(x, *rotary_table(torch.tensor([[p]]), 8, 1e4, torch.float32)) for p in (3, 5, 13, 15)]
        >>> near, far = (turned[0] * turned[1]).sum(), (turned[2] * turned[3]).sum()
        >>> torch.allclose(near, far, atol=1e-5)  # scores depend on the distance alone
        True
    """
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)
