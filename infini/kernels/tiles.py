"""Sizes of the kernels' tiles, and which products are exact.

The sizes are such that sums stay in the registers of a program and its tiles in shared memory: each was compiled for compute
capabilities 8.0 and 9.0 and its spilled registers counted (`tests/kernels/test_compiles.py` watches the shared memory).
"""

import contextlib
import functools
from typing import NamedTuple, Self

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources as OutOfResources

# Tokens of a segment that one program takes. Longer segments are shared out, for enough programs in a short text; each loads
# the memory once.
PART = 512

# Bytes of shared memory of the GPUs with the most and the least of it that the tiles are made for.
MUCH_SHARED, LITTLE_SHARED = 163 * 1024, 99 * 1024

# Kernel -> (BD, exact products) -> columns of a block, tokens, warps, stages. `infini.bench.tiles` times others.
TABLE = {
    "outer": {
        (16, False): (16, 64, 4, 2),
        (32, False): (32, 64, 4, 2),
        (64, False): (64, 64, 4, 2),
        (128, False): (128, 64, 8, 2),
        (256, False): (64, 32, 8, 2),
        (16, True): (16, 64, 4, 1),
        (32, True): (32, 64, 4, 1),
        (64, True): (64, 32, 8, 1),
        (128, True): (64, 32, 8, 1),
        (256, True): (32, 16, 8, 1),
    },
    "read": {
        (16, False): (16, 64, 4, 2),
        (32, False): (32, 64, 4, 2),
        (64, False): (64, 64, 4, 2),
        (128, False): (128, 64, 8, 2),
        (256, False): (64, 32, 8, 2),
        (16, True): (16, 64, 4, 1),
        (32, True): (32, 64, 4, 1),
        (64, True): (64, 32, 8, 1),
        (128, True): (64, 32, 8, 1),
        (256, True): (32, 16, 8, 1),
    },
    "backward": {
        (16, False): (16, 32, 4, 2),
        (32, False): (32, 32, 4, 2),
        (64, False): (64, 32, 4, 2),
        (128, False): (128, 32, 8, 2),
        (256, False): (32, 32, 8, 1),
        (16, True): (16, 32, 4, 1),
        (32, True): (32, 32, 4, 1),
        (64, True): (64, 32, 8, 1),
        (128, True): (64, 16, 8, 1),
        (256, True): (32, 16, 8, 1),
    },
}


class Tiles(NamedTuple):
    """BD: columns of a head, a power of two. BV: of these in one block. BT: tokens of a tile; `warps` and `stages` of a program."""

    BD: int
    BV: int
    BT: int
    warps: int
    stages: int

    @classmethod
    def of(cls, kernel: str, dim: int, segment_length: int, exact: bool, shared_memory: int = MUCH_SHARED) -> Self:
        """For heads of `dim` numbers on a GPU whose programs may have so many bytes of shared memory.

        Args:
            kernel: a key of `TABLE`; the gradients of read and write are both `backward`.
        """
        wide = max(16, _power(dim))
        block, tokens, warps, stages = TABLE[kernel][wide, exact]
        if shared_memory < MUCH_SHARED:
            block = min(block, 64)
        return cls(wide, block, max(16, min(tokens, _power(segment_length))), warps, stages)

    @property
    def wide_blocks(self) -> int:
        """Blocks of a head."""
        return self.BD // self.BV


def parts_of(segment_length: int) -> int:
    """Programs that share the tokens of one segment."""
    return -(-segment_length // PART)


def is_exact(*operands: Tensor) -> bool:
    """Whether products need the precision of fp32: bf16 operands are products of bf16; fp16's range is too small for features."""
    return any(x.dtype != torch.bfloat16 for x in operands)


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes that one program may have; the interpreter has no limit."""
    if device.type != "cuda":
        return MUCH_SHARED
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def on_device_of(x: Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device, which need not be that of `x`."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def _power(number: int) -> int:
    """The next power of two."""
    return 1 << (number - 1).bit_length()
