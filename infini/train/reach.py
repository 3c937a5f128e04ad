"""How far training reached: what a claim about longer texts has to be read beside."""

from __future__ import annotations

import json
from pathlib import Path

from infini.data.batch import Batch
from infini.errors import InputError
from infini.report.record import write_atomically

FILE = "training.json"


def reach_of(batch: Batch, bptt_segments: int | None = None, stream_tokens: int = 0, gap_gradient_segments: int | None = None) -> tuple[int, int]:
    """Tokens that the gradient of a batch goes through, and tokens of the longest text that its states have seen.

    Of a stream it is told to the length of a batch: a document is looked at where batches end.

    Args:
        batch: any; what stands in its gap counts as seen, be it read in full or stretched from a part.
        bptt_segments: where the gradient is cut, see :class:`infini.train.settings.TrainSettings`.
        stream_tokens: tokens of the longest document so far, for a batch that goes on from the one before.
        gap_gradient_segments: of a gap that have gradient.

    Example:
        >>> import torch
        >>> from infini.data.batch import Gap
        >>> text = torch.zeros(1, 9, dtype=torch.long)
        >>> gap = Gap(position=1, segments=100, filler=torch.zeros(1, 1, dtype=torch.long))
        >>> reach_of(Batch(text, text > 0, segments=2, gap=gap))
        (8, 408)
        >>> reach_of(Batch(text, text > 0, segments=2, gap=gap), gap_gradient_segments=3)
        (20, 408)
    """
    tokens, n = batch.tokens.shape[1] - 1, batch.segment_length
    gradient = tokens if bptt_segments is None else min(tokens, bptt_segments * n)
    gap = 0 if batch.gap is None else batch.gap.segments * n
    gradient += min(gap, (gap_gradient_segments or 0) * n)
    return gradient, max(tokens + gap, stream_tokens)


def write_reach(folder: Path, gradient_tokens: int, text_tokens: int) -> None:
    """Leave a note beside the weights, for the records of what is measured with them."""
    note = json.dumps({"gradient_tokens": gradient_tokens, "text_tokens": text_tokens}) + "\n"
    write_atomically(folder / FILE, note.encode())


def read_reach(folder: Path) -> dict[str, int] | None:
    """What `write_reach` left in a checkpoint folder; None where nothing was left."""
    try:
        return json.loads((folder / FILE).read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise InputError(f"{folder / FILE} is not JSON ({error}); copy the folder again, or remove that file") from None
