"""What a memory holds after a text that is read once and counts many times."""

from __future__ import annotations

import torch

from infini.errors import InputError
from infini.memory import MemoryState


def stretch(
    before: MemoryState, after: MemoryState, carried: torch.Tensor | None, times: int
) -> tuple[MemoryState, torch.Tensor | None]:
    """The memory after writing ``times`` times what was written once.

    Reading a text lays one affine map on a memory, M_after = A M + B. The same keys, values and strengths ``times`` over lay

        M' = A^t M + (I + A + ... + A^(t-1)) B,    A = I in ``linear``, where also z' = z + t (z_after - z),

    which squaring gives in log2(t) products. Filler that repeats does write the same again, but for what its tokens
    read of the memory while that grows.

    Args:
        before: the memory before the text.
        after: the memory after reading it once.
        carried: A `[rows, kv_heads, k, k]`, see :func:`infini.memory.write_segments_with_map`; None: the identity.
        times: at least 1.

    Returns:
        The memory, and its map A^t.

    Raises:
        InputError: a rule whose map hangs on a normalizer that grows: ``delta`` and ``gamma_delta``.

    Example:
        >>> one = torch.ones(1, 1, 1, 1)
        >>> memory, carried = stretch(MemoryState(3 * one, None), MemoryState(2.5 * one, None), 0.5 * one, 2)
        >>> memory.matrix.item(), carried.item()  # 3 -> 2.5 -> 2.25: halved, and 1 added
        (2.25, 0.25)
    """
    if before.normalizer is None:
        normalizer = None
    elif carried is None:
        normalizer = before.normalizer + times * (after.normalizer - before.normalizer)
    else:
        raise InputError(
            "gap_read_segments is set, but in this model's update rule (delta or gamma_delta) the normalizer changes what a "
            "text writes the second time: set gap_read_segments=null, or use linear or deltanet"
        )
    if carried is None:
        return MemoryState(before.matrix + times * (after.matrix - before.matrix), normalizer), None
    addition = after.matrix - carried @ before.matrix
    matrix, total = before.matrix, None
    while times:
        if times % 2:
            matrix = carried @ matrix + addition
            total = carried if total is None else carried @ total
        addition = carried @ addition + addition
        carried = carried @ carried
        times //= 2
    return MemoryState(matrix, normalizer), total
