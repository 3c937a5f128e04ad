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

# Segments up to so many tokens are `short`, others `long`: of short ones the memories are as many bytes as the tokens.
SHORT = 512

# Bytes of shared memory of the GPUs with the most and the least of it that the tiles are made for, and of Hopper's.
MUCH_SHARED, LITTLE_SHARED, HOPPER_SHARED = 163 * 1024, 99 * 1024, 227 * 1024

# Kernel -> (BD, exact products) -> columns of a block, tokens, warps, stages: what fits everywhere.
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
} | {
    # Of `deltanet` heads are up to 128 wide; the tokens are those of a chunk, the same for its first four kernels.
    kernel: {(wide, exact): (min(wide, block), 32, warps, 1) for wide in (16, 32, 64, 128) for exact in (False, True)}
    for kernel, block, warps in (
        ("prepare", 128, 4),
        ("map", 64, 4),
        ("chunks_backward", 128, 8),
        ("prepare_backward", 128, 8),
        ("read_deltanet", 128, 8),
    )
}

# (Kernel, BD, exact products, short or long) -> all of `Tiles` behind BD, for GPUs with the shared memory of Hopper: the fastest of
# those that `infini.bench.tiles` timed.
TUNED: dict[tuple[str, int, bool, str], tuple] = {
    # results/benchmarks/h100/tiles/tiles.json; behind each its time over its floor there.
    ("outer", 128, False, "long"): (128, 32, 4, 3, 512, 0, False, False, False),  # 1.06
    ("read", 128, False, "long"): (128, 64, 4, 3, 2048, 0, False, False, True),  # 1.08
    ("read_backward", 128, False, "long"): (128, 32, 8, 3, 2048, 0, True, True, True),  # 1.79
    ("write_backward", 128, False, "long"): (128, 64, 4, 3, 2048, 0, True, False, False),  # 1.21
    ("gram", 128, False, "long"): (128, 64, 4, 3, 512, 0, False, False, False),  # 1.38
    ("gram_backward", 128, False, "long"): (128, 32, 4, 1, 1024, 168, False, False, True),  # 2.22
    # results/benchmarks/h200/tiles/tiles.json.
    ("outer", 128, False, "short"): (128, 32, 4, 2, 512, 0, False, False, False),  # 1.90
    ("read", 128, False, "short"): (128, 32, 8, 3, 256, 0, False, False, True),  # 1.91
    ("read_backward", 128, False, "short"): (128, 32, 4, 2, 256, 0, True, False, True),  # 3.35
    ("write_backward", 128, False, "short"): (128, 64, 8, 2, 512, 0, False, False, True),  # 3.77
    ("gram", 128, False, "short"): (128, 32, 8, 3, 512, 128, False, False, False),  # timed with long segments only
    ("gram_backward", 128, False, "short"): (128, 32, 4, 1, 1024, 168, False, False, True),  # timed with long segments only
    # results/benchmarks/h200/tiles/wide.json; timed with segments of 1,024 only. Of the write's backward pass nothing beat TABLE.
    **{("outer", 256, False, kind): (128, 32, 8, 3, 512, 0, False, False, False) for kind in ("short", "long")},  # 5.52
    **{("read", 256, False, kind): (128, 64, 8, 3, 512, 0, False, False, True) for kind in ("short", "long")},  # 4.49
    **{("read_backward", 256, False, kind): (128, 32, 8, 3, 256, 0, False, False, True) for kind in ("short", "long")},  # 12.35
}


class Tiles(NamedTuple):
    """How a kernel is cut up.

    Attributes:
        BD: columns of a head, a power of two.
        BV: of these in one block.
        BT: tokens of a tile.
        warps, stages: of a program.
        part: tokens of a segment that one program takes.
        registers: at most so many for a thread, so that more programs run beside each other; 0: as many as it wants.
        ahead: all tiles are loaded ahead, not only those that products take as they are.
        fused: the backward pass of the read sums the memory's gradient itself, instead of leaving weights for another kernel.
        turned: the memory gives products their rows, instead of the tokens.
    """

    BD: int
    BV: int
    BT: int
    warps: int
    stages: int
    part: int = PART
    registers: int = 0
    ahead: bool = False
    fused: bool = False
    turned: bool = False

    @classmethod
    def of(cls, kernel: str, dim: int, segment_length: int, exact: bool, shared_memory: int = MUCH_SHARED) -> Self:
        """For heads of `dim` numbers on a GPU whose programs may have so many bytes of shared memory.

        Args:
            kernel: a key of `USES`.
        """
        wide = max(16, _power(dim))
        tuned = TUNED.get((kernel, wide, exact, kind_of(segment_length)))
        if tuned is not None and shared_memory >= HOPPER_SHARED:
            return cls(wide, *tuned).within(segment_length)
        block, tokens, warps, stages = TABLE[USES[kernel]][wide, exact]
        if shared_memory < MUCH_SHARED:
            block = min(block, 64)
        return cls(wide, block, tokens, warps, stages).within(segment_length)

    def within(self, segment_length: int) -> Self:
        """With no more tokens in a tile than a segment has."""
        return self._replace(BT=max(16, min(self.BT, _power(segment_length))))

    @property
    def wide_blocks(self) -> int:
        """Blocks of a head."""
        return self.BD // self.BV

    @property
    def rows(self) -> int:
        """Rows to which the sums over a tile's tokens are folded: as many as the threads cover at once, 8 numbers each."""
        return max(1, min(self.BT, self.warps * 256 // self.BD))

    @property
    def loop_stages(self) -> int | None:
        """Of the loop over tokens; None: what the products need."""
        return self.stages if self.ahead else None

    @property
    def options(self) -> dict[str, int]:
        """Of a launch."""
        limit = {"maxnreg": self.registers} if self.registers else {}
        return {"num_warps": self.warps, "num_stages": self.stages} | limit

    def parts(self, segment_length: int) -> tuple[int, int]:
        """Programs that share the tokens of one segment, and the tokens of each."""
        parts = -(-segment_length // self.part)
        return parts, segment_length if parts == 1 else self.part


# Attention within reach: kernel -> (BD, fp32) -> queries, keys, warps, stages: what fits everywhere.
LOCAL = {
    "local": {
        (16, False): (128, 64, 4, 2),
        (32, False): (128, 64, 4, 2),
        (64, False): (128, 64, 4, 2),
        (128, False): (64, 64, 4, 2),
        (256, False): (64, 32, 8, 2),
        (16, True): (64, 32, 4, 1),
        (32, True): (64, 32, 4, 1),
        (64, True): (64, 32, 4, 1),
        (128, True): (32, 16, 8, 1),
        (256, True): (16, 16, 8, 1),
    },
    "local_queries": {
        (16, False): (64, 64, 4, 2),
        (32, False): (64, 64, 4, 2),
        (64, False): (64, 64, 4, 2),
        (128, False): (64, 64, 4, 2),
        (256, False): (32, 32, 8, 2),
        (16, True): (64, 32, 4, 1),
        (32, True): (64, 32, 4, 1),
        (64, True): (32, 32, 4, 1),
        (128, True): (32, 16, 8, 1),
        (256, True): (16, 16, 8, 1),
    },
    "local_keys": {
        (16, False): (64, 64, 4, 2),
        (32, False): (64, 64, 4, 2),
        (64, False): (32, 64, 4, 2),
        (128, False): (32, 64, 8, 2),
        (256, False): (32, 32, 8, 2),
        (16, True): (32, 32, 4, 1),
        (32, True): (32, 32, 4, 1),
        (64, True): (32, 32, 8, 1),
        (128, True): (32, 16, 8, 1),
        (256, True): (16, 16, 8, 1),
    },
}

# The same for 16 bits on GPUs with the shared memory of Hopper, by BD. Not timed yet: chosen by registers, shared memory and whether
# the products are warp groups' own, which take at least 64 rows.
LOCAL_ON_HOPPER = {
    "local": {64: (128, 64, 8, 3), 128: (64, 64, 4, 3), 256: (128, 64, 8, 2)},
    "local_queries": {64: (64, 64, 4, 3), 128: (64, 64, 4, 2), 256: (64, 64, 8, 2)},
    "local_keys": {64: (64, 64, 4, 3), 128: (64, 64, 4, 2), 256: (32, 64, 8, 2)},
}


class LocalTiles(NamedTuple):
    """How a kernel of the attention within reach is cut up.

    Attributes:
        BD: columns of a head, a power of two.
        BQ, BK: queries and keys of a tile.
        warps, stages: of a program.
    """

    BD: int
    BQ: int
    BK: int
    warps: int
    stages: int

    @classmethod
    def of(cls, kernel: str, dim: int, dtype: torch.dtype, shared_memory: int = MUCH_SHARED) -> Self:
        """For heads of `dim` numbers on a GPU whose programs may have so many bytes of shared memory; `kernel`: a key of `LOCAL`."""
        wide, full = max(16, _power(dim)), dtype.itemsize > 2
        here = LOCAL_ON_HOPPER[kernel].get(wide) if shared_memory >= HOPPER_SHARED and not full else None
        return cls(wide, *(here or LOCAL[kernel][wide, full]))

    def within(self, tokens: int) -> Self:
        """With no more queries in a tile than there are."""
        return self._replace(BQ=max(16, min(self.BQ, _power(tokens))))

    @property
    def options(self) -> dict[str, int]:
        """Of a launch."""
        return {"num_warps": self.warps, "num_stages": self.stages}


DELTANET = ("prepare", "map", "chunks_backward", "prepare_backward", "read_deltanet")

# Kernel -> its line in TABLE.
USES = {"outer": "outer", "gram": "outer", "read": "read"}
USES |= {name: name for name in DELTANET}
USES |= dict.fromkeys(("read_backward", "write_backward", "gram_backward"), "backward")


def widest_deltanet(exact: bool, shared_memory: int) -> int:
    """The widest heads of `deltanet`: a program holds a memory and its gradient, for products in fp32's precision twice each."""
    return 128 if shared_memory >= MUCH_SHARED and not exact else 64


def kind_of(segment_length: int) -> str:
    """`short` or `long`."""
    return "short" if segment_length <= SHORT else "long"


def is_exact(*operands: Tensor) -> bool:
    """Whether products need the precision of fp32: bf16 operands are products of bf16; fp16's range is too small for features."""
    return any(x.dtype != torch.bfloat16 for x in operands)


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes that one program may have; the interpreter has no limit."""
    if device.type != "cuda":
        return MUCH_SHARED
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


@functools.cache
def processors(device: torch.device) -> int:
    """Programs that run at a time, if each takes a processor of its own; the interpreter runs one after the other."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def on_device_of(x: Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device, which need not be that of `x`."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def _power(number: int) -> int:
    """The next power of two."""
    return 1 << (number - 1).bit_length()
