"""Times the kernels with other tile sizes than `infini.kernels.tiles.TABLE`: `python -m infini.bench.tiles [HEAD_DIM ...]`.

Prints, for each kernel, the sizes that run on this GPU, the fastest first; a winner goes into the table by hand.
"""

import itertools
import sys
from collections.abc import Iterator, Sequence

import torch

from infini.bench.clock import milliseconds
from infini.bench.memory import MemoryCase, Shape
from infini.kernels.tiles import TABLE, OutOfResources, is_exact

Sizes = tuple[int, int, int, int]


def candidates(wide: int) -> Iterator[Sizes]:
    """Columns of a block, tokens, warps and stages worth a try for heads padded to `wide` numbers."""
    blocks = [block for block in (32, 64, 128) if block <= wide] or [wide]
    yield from itertools.product(blocks, (16, 32, 64, 128), (4, 8), (1, 2, 3))


def tune(shape: Shape, device: torch.device, tries: Sequence[Sizes] | None = None, repeats: int = 10) -> dict[str, list[tuple[float, Sizes]]]:
    """Kernel -> (milliseconds, sizes), sorted; the time is that of the whole memory part, forward or with its gradient.

    The table is as before afterwards.
    """
    case = MemoryCase(shape, device)
    wide = max(16, 1 << (shape.head_dim - 1).bit_length())
    key, found = (wide, is_exact(case.inputs["q"])), {}
    for kernel, table in TABLE.items():
        gradient, usual = kernel == "backward", table[key]

        call = case.timed("triton", gradient)
        found[kernel] = []
        for sizes in candidates(wide) if tries is None else tries:
            table[key] = sizes
            try:
                found[kernel].append((milliseconds(call, device, repeats), sizes))
            except OutOfResources:
                continue
            finally:
                table[key] = usual
        found[kernel].sort()
    return found


def main(dims: Sequence[int]) -> None:
    """Tune for heads of these widths, in the shape of the shipped model."""
    for dim in dims:
        for kernel, timed in tune(Shape(20, 4096, 256, 4, 4, dim), torch.device("cuda")).items():
            print(f"{kernel}, heads of {dim}: BV, BT, warps, stages")
            for took, sizes in timed[:8]:
                print(f"  {took:8.3f} ms  {sizes}", flush=True)


if __name__ == "__main__":
    main([int(dim) for dim in sys.argv[1:]] or [128])
