"""How likely a text is after another, in one pass and bounded memory."""

from collections.abc import Sequence

import torch
from torch import Tensor

from infini.errors import InputError
from infini.protocol import SegmentModel

LOGITS = 2**24  # numbers of one block of logits: 64 MiB in fp32


def read(model: SegmentModel, rows: Sequence[Sequence[int]], piece: int):
    """The state after each row, none of which moves another's segments; a row may be empty.

    Args:
        model: in evaluation mode.
        rows: token ids.
        piece: most tokens of a row at once.

    Returns:
        A state of `len(rows)` rows.
    """
    device = next(model.parameters()).device
    ids, lengths = _together(rows)
    state = model.init_state(len(rows), device)
    for start in range(0, ids.shape[1], piece):
        part = ids[:, start : start + piece]
        with torch.inference_mode():
            _, state = model(part.to(device), state, padding=_padding(lengths, start, part, device), keep="none")
    return state


def score(model: SegmentModel, state, before: Sequence[int], rows: Sequence[Sequence[int]], piece: int) -> list[tuple[float, bool]]:
    """log P(row | what the state has read, then the token `before`), each text scored once from left to right.

    Args:
        model: in evaluation mode.
        state: of as many rows; it has not read `before` yet.
        before: for each row the token in front of it.
        rows: token ids, at least one each.
        piece: most tokens of a row at once; fewer where a vocabulary is large.

    Returns:
        For each row the sum of natural logarithms, in fp64, and whether every token was the likeliest.

    Raises:
        InputError: logits are not finite.

    Example:
        >>> from infini import InfiniConfig, InfiniTransformer
        >>> model = InfiniTransformer(InfiniConfig(hidden_size=32, num_hidden_layers=1, segment_length=4)).eval()
        >>> [(whole, _)] = score(model, read(model, [[]], 99), [10], [[1, 2, 3, 4, 5, 6]], piece=99)
        >>> state = read(model, [[10, 1]], 99)
        >>> [(rest, _)] = score(model, state, [2], [[3, 4, 5, 6]], piece=1)
        >>> [(start, _)] = score(model, read(model, [[]], 99), [10], [[1, 2]], piece=99)
        >>> abs(whole - start - rest) < 1e-5  # the chain rule
        True
    """
    device = next(model.parameters()).device
    targets, lengths = _together(rows)
    ids = torch.cat([torch.tensor(list(before), dtype=torch.long)[:, None], targets[:, :-1]], dim=1)
    piece = max(1, min(piece, LOGITS // (model.config.vocab_size * len(rows))))
    total, greedy = torch.zeros(len(rows), dtype=torch.float64), torch.ones(len(rows), dtype=torch.bool)
    for start in range(0, ids.shape[1], piece):
        part = ids[:, start : start + piece]
        real = torch.arange(start, start + part.shape[1]) < lengths[:, None]
        with torch.inference_mode():
            logits, state = model(part.to(device), state, padding=_padding(lengths, start, part, device), keep="all")
            wanted = targets[:, start : start + piece].to(device)
            chances = logits.float().log_softmax(dim=-1)
            found = chances.gather(-1, wanted.unsqueeze(-1)).squeeze(-1).double().cpu()
            likeliest = (logits.argmax(dim=-1) == wanted).cpu()
        if not torch.isfinite(found[real]).all():
            raise InputError("the model's logits are not finite: its weights hold NaN or its state has overflowed; check the checkpoint")
        total += torch.where(real, found, 0.0).sum(dim=1)
        greedy &= (likeliest | ~real).all(dim=1)
    return list(zip(total.tolist(), greedy.tolist(), strict=True))


def _together(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Rows of unequal length in one int64 tensor, what is missing on the right 0, and their lengths."""
    lengths = torch.tensor([len(row) for row in rows])
    ids = torch.zeros(len(rows), int(lengths.max()), dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.as_tensor(row, dtype=torch.long)
    return ids, lengths


def _padding(lengths: Tensor, start: int, part: Tensor, device: torch.device) -> Tensor | None:
    missing = torch.arange(start, start + part.shape[1]) >= lengths[:, None]
    return missing.to(device) if bool(missing.any()) else None
