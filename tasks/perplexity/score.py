"""How badly a model predicts documents, by the place of the token, in one pass over each."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from infini.errors import InputError
from infini.protocol import TrainableModel


@torch.inference_mode()
def score_documents(
    model: TrainableModel,
    documents: Sequence[np.ndarray],
    piece: int = 4096,
    memory: bool = True,
    progress: Callable[[int], None] | None = None,
) -> list[list[float]]:
    """Negative log-likelihood of every token but a document's first, given all tokens before it.

    ``-log P(x_t | x_0 ... x_{t-1})`` for ``t = 1 ... n - 1``, summed over buckets of the position: bucket ``b`` holds ``2^b <= t <
    2^(b+1)``. Documents are rows of one batch; a row that has ended is taken out, so none is padded and all rows
    stand at the same place. How a document is cut and what stands beside it changes nothing but rounding.

    Args:
        model: in evaluation mode.
        documents: token ids ``[n]`` each, integers, ``n`` at least 2; in any order.
        piece: most tokens of a row at once. The model gives losses and not logits, so that a large vocabulary makes no piece shorter.
        memory: False silences the model's memory (the ``memory=False`` of :class:`infini.protocol.TrainableModel`) from the first
            token to the last. The silenced model carries a state of its own, as if it had never had a memory.
        progress: called with the tokens scored, after each piece.

    Returns:
        For each document its sums in nats, fp64, a list as long as its buckets.

    Raises:
        InputError: a document has fewer than 2 tokens, or its likelihood is not finite.

    Example:
        >>> from infini import InfiniConfig, InfiniTransformer
        >>> model = InfiniTransformer(InfiniConfig(hidden_size=32, num_hidden_layers=1, segment_length=4)).eval()
        >>> text, other = np.arange(20), np.arange(100, 109)
        >>> beside, _ = score_documents(model, [text, other], piece=3)
        >>> [alone] = score_documents(model, [text])
        >>> len(alone), np.allclose(alone, beside, rtol=1e-5)  # buckets of 1, 2, 4, 8 and 4 tokens
        (5, True)
    """
    if short := [i for i, document in enumerate(documents) if len(document) < 2]:
        raise InputError(f"document {short[0]} has {len(documents[short[0]])} tokens; nothing is predicted with fewer than 2")
    device, options = next(model.parameters()).device, {} if memory else {"memory": False}
    rows = sorted(range(len(documents)), key=lambda i: -len(documents[i]))
    sums = torch.zeros(len(rows), len(documents[rows[0]]).bit_length(), dtype=torch.float64, device=device)
    state, start = None, 0
    while rows:
        stop = min(start + piece, len(documents[rows[-1]]) - 1)
        window = np.stack([documents[i][start : stop + 1] for i in rows])
        ids = torch.from_numpy(window.astype(np.int64))
        if device.type == "cuda":  # any other copy makes the host wait for all kernels before it
            ids = ids.pin_memory().to(device, non_blocking=True)
        losses, state = model(ids[:, :-1], state, targets=ids[:, 1:], **options)
        for bucket in range((start + 1).bit_length() - 1, stop.bit_length()):
            first, last = max(2**bucket, start + 1), min(2 ** (bucket + 1) - 1, stop)
            sums[: len(rows), bucket] += losses[:, first - start - 1 : last - start].sum(dim=1, dtype=torch.float64)
        if progress is not None:
            progress(ids[:, 1:].numel())
        start, going = stop, [i for i in rows if len(documents[i]) - 1 > stop]
        if len(going) < len(rows):
            state = state.select(torch.arange(len(going))) if going else None
            rows = going
    found: list[list[float]] = [[] for _ in documents]
    for i, row in zip(sorted(range(len(documents)), key=lambda i: -len(documents[i])), sums.tolist(), strict=True):
        found[i] = row[: (len(documents[i]) - 1).bit_length()]
        if not np.isfinite(found[i]).all():
            raise InputError(
                "the model's logits are not finite: its weights hold NaN or its state has overflowed; check the checkpoint, "
                "or use dtype=float32"
            )
    return found


def tokens_of_buckets(tokens: int) -> list[int]:
    """How many of the predicted tokens of a document fall into each bucket.

    >>> tokens_of_buckets(20)
    [1, 2, 4, 8, 4]
    """
    return [min(2 ** (b + 1), tokens) - 2**b for b in range((tokens - 1).bit_length())]
