"""What a memory holds after a text that is read once and counts many times."""

from __future__ import annotations

import torch

from infini.errors import InputError
from infini.memory import MemoryState


def require_stretchable(rule: str) -> None:
    """An `InputError` for ``gamma_delta``, whose second turn writes another normalizer than its first."""
    if rule == "gamma_delta":
        raise InputError(
            "gap_read_segments is set, but in the update rule gamma_delta the normalizer changes what a text writes the "
            "second time: set gap_read_segments=null, or use linear, delta or deltanet"
        )


def stretch(
    rule: str, before: MemoryState, after: MemoryState, carried: torch.Tensor | None, times: int
) -> tuple[MemoryState, torch.Tensor | None]:
    """The memory after writing ``times`` times what was written once.

    Reading a text lays one affine map on a memory, M_after = A M + B. The same keys, values and strengths ``times`` over lay

        M' = A^t M + (I + A + ... + A^(t-1)) B,    A = I in ``linear``, where also z' = z + t (z_after - z),

    which squaring gives in log2(t) products. Filler that repeats does write the same again, but for what its tokens
    read of the memory while that grows.

    In ``delta`` the normalizer grows with every turn, and what a turn erases becomes less: with S = sum over z,

        A_j = I - S_0 / S_j (I - A),    S_j = sum(z + (j + 1/2) (z_after - z)),    M' = A_j M' + B,

    a product for each turn. This is an estimate, exact while z is large against what the turns add: for random keys the
    memory is off by 4 percent where they are written weakly and by 20 percent where in full, the map by 2 percent.

    Args:
        rule: the model's update rule.
        before: the memory before the text.
        after: the memory after reading it once.
        carried: A `[rows, kv_heads, k, k]`, see :func:`infini.memory.write_segments_with_map`; None: the identity.
        times: at least 1.

    Returns:
        The memory, and its map: A^t, or the product of all A_j.

    Raises:
        InputError: ``times`` is less, or the rule is ``gamma_delta``, whose second turn writes another normalizer than its first.

    Example:
        >>> one = torch.ones(1, 1, 1, 1)
        >>> memory, carried = stretch("deltanet", MemoryState(3 * one, None), MemoryState(2.5 * one, None), 0.5 * one, 2)
        >>> memory.matrix.item(), carried.item()  # 3 -> 2.5 -> 2.25: halved, and 1 added
        (2.25, 0.25)
    """
    if times < 1:
        raise InputError(f"a text cannot count {times} times; at least once")
    require_stretchable(rule)
    normalizer = before.normalizer
    if normalizer is not None:
        grown = after.normalizer - normalizer
        normalizer = normalizer + times * grown
    if carried is None:
        return MemoryState(before.matrix + times * (after.matrix - before.matrix), normalizer), None
    addition = after.matrix - carried @ before.matrix
    matrix, total = before.matrix, None
    if normalizer is not None:
        identity = torch.eye(carried.shape[-1], dtype=carried.dtype, device=carried.device)
        sums, grown = (x.sum(-1)[..., None, None] for x in (before.normalizer + grown / 2, grown))
        for turn in range(times):
            one = identity - sums / (sums + turn * grown) * (identity - carried)
            matrix = one @ matrix + addition
            total = one if total is None else one @ total
        return MemoryState(matrix, normalizer), total
    while times:
        if times % 2:
            matrix = carried @ matrix + addition
            total = carried if total is None else carried @ total
        addition = carried @ addition + addition
        carried = carried @ carried
        times //= 2
    return MemoryState(matrix, normalizer), total
