"""Recurrent Memory Transformer (arXiv:2207.06881), one function per equation, in fp64: the oracle of the tests.

One document. Loops, no options, torch only, differentiable. The rotary scores are those of `baselines.full.reference`.
"""

import torch
from torch import Tensor


def segment_input(memory: Tensor, text: Tensor) -> Tensor:
    """Section 3.2: H~0 = [H_mem ; H0 ; H_mem], read tokens in front and write tokens at the end, `[memory + n + memory, D]`."""
    return torch.cat([memory, text, memory])


def visible(i: int, memory: int, text: int) -> list[int]:
    """Section 3.2: what place i of H~0 sees: read tokens each other, text the read tokens and what is not after it, the write
    tokens everything."""
    if i < memory:
        return list(range(memory))
    if i < memory + text:
        return list(range(i + 1))
    return list(range(2 * memory + text))


def split(H: Tensor, memory: int) -> tuple[Tensor, Tensor, Tensor]:
    """Section 3.2: [H_read ; H_text ; H_write] := H~N."""
    return H[:memory], H[memory : len(H) - memory], H[len(H) - memory :]


def recur(segments: list[Tensor], memory: Tensor, transformer) -> list[Tensor]:
    """Section 3.2: H_mem of segment tau + 1 := H_write of segment tau, for full segments; what each segment's text gives."""
    found = []
    for text in segments:
        _, H, memory = split(transformer(segment_input(memory, text), len(text)), len(memory))
        found.append(H)
    return found
