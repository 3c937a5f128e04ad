"""Training batches of dense recall alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from infini.tasks.passkey.needles import FILLER
from infini.tasks.recall.text import NAMES, Statements, write_recall
from infini.tasks.rows import RowSource

from infini.errors import InputError


@dataclass(frozen=True, kw_only=True)
class RecallTraining(RowSource):
    """Rows of dense recall, each with its own number of names and its own density.

    Attributes:
        pools: the number of names of a row is one of these.
        longest_gaps: the longest filler between two statements of a row, in tokens, is one of these.

    Example:
        >>> source = RecallTraining(steps=100, max_segments=4)
        >>> batch = source[7]
        >>> batch.tokens.shape[1] == batch.segments * 256 + 1
        True
    """

    pools: tuple[int, ...] = (1, 2, 4, 8, 16)
    longest_gaps: tuple[int, ...] = (0, 32, 128, 512)

    def __post_init__(self):
        super().__post_init__()
        statements = Statements(self._tokenizer)
        check_recall(self.pools, self.longest_gaps, statements.names)
        object.__setattr__(self, "_statements", statements)
        object.__setattr__(self, "filler", self._tokenizer.encode_bytes(FILLER.encode()))

    def write_row(self, random, progress, tokens, answer) -> None:
        self.write_recall(random, tokens, answer, self.draw_filler(random, self.filler))

    def write_recall(self, random, tokens, answer, filler: np.ndarray) -> None:
        """Writes one row with this filler, ids ``[period]``."""
        pool, longest_gap = random.choice(self.pools), random.choice(self.longest_gaps)
        write_recall(random, tokens, answer, int(pool), int(longest_gap), filler=filler, statements=self._statements)


def check_recall(pools: tuple[int, ...], longest_gaps: tuple[int, ...], names: int = len(NAMES)) -> None:
    """Refuses pools and gaps that :func:`write_recall` cannot write.

    Raises:
        InputError: none given, a pool of more names than there are or of none, a negative gap.
    """
    if not pools or not longest_gaps:
        raise InputError("recall needs at least one pool size and one longest gap")
    if min(pools) < 1 or max(pools) > names:
        raise InputError(f"recall pools are {tuple(pools)}; each must be 1 to {names} names")
    if min(longest_gaps) < 0:
        raise InputError(f"recall gaps are {tuple(longest_gaps)} tokens; none may be negative")
