"""How likely a model finds texts after what it has read, any model of the protocol."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from infini.tasks.booksum.prompt import Asked, ask_blank
from torch import Tensor

from infini.data.tokenizer import Tokenizer
from infini.errors import InputError
from infini.session import StreamingSession


class Silenced:
    """A model whose memory says nothing (``memory=False`` of :class:`infini.protocol.TrainableModel`), with a state of its own."""

    def __init__(self, model: Any):
        self._model = model

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        return self._model(*arguments, memory=False, **keywords)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


@torch.inference_mode()
def target_nll(model: Any, state: Any, asked: Sequence[Asked], rows: int = 8) -> list[float]:
    """Negative log-likelihood of each target after its row of a state and its prompt.

    ``-sum_t log P(target_t | what was read, prompt, target_1 ... target_{t-1})``, in nats.

    Args:
        model: of the protocol, in evaluation mode.
        state: of ``len(asked)`` rows; not changed.
        asked: prompts and targets, none of them empty.
        rows: read at a time.

    Raises:
        InputError: a likelihood is not finite.

    Example:
        >>> from infini import InfiniConfig, InfiniTransformer
        >>> model = InfiniTransformer(InfiniConfig(hidden_size=32, num_hidden_layers=1, segment_length=4)).eval()
        >>> one, other = Asked(np.arange(3), np.arange(5)), Asked(np.arange(2), np.arange(9))
        >>> both, alone = target_nll(model, model.init_state(2), [one, other]), target_nll(model, model.init_state(1), [one])
        >>> bool(np.isclose(both[0], alone[0])), both[1] > both[0]
        (True, True)
    """
    found: list[float] = []
    for start in range(0, len(asked), rows):
        part = asked[start : start + rows]
        ids, padding = _padded(model, [np.concatenate(one) for one in part])
        begins = torch.tensor([len(one.prompt) for one in part], device=ids.device)
        here = state.select(torch.arange(start, start + len(part)))
        losses, _ = model(ids[:, :-1], here, targets=ids[:, 1:], padding=padding[:, 1:])
        wanted = ~padding[:, 1:] & (torch.arange(1, ids.shape[1], device=ids.device) >= begins[:, None])
        found += (losses.double() * wanted).sum(dim=1).tolist()
    return _finite(found)


@torch.inference_mode()
def choice_scores(
    model: Any, state: Any, tokenizer: Tokenizer, questions: Sequence[Any], rows: int = 32, piece: int = 4096
) -> np.ndarray:
    """Log-likelihood of each choice of each question, the end of an answer included, asked after a state of one row.

    Every question is asked of the state alone, not of the questions before it.

    Args:
        model: of the protocol, in evaluation mode.
        state: of one row; not changed.
        tokenizer: the model's.
        questions: :class:`infini.tasks.booksum.cloze.Question` with equally many choices.
        rows: questions read at a time.
        piece: tokens of a question read at a time.

    Returns:
        fp64 ``[questions, choices]`` in nats.
    """
    found: list[float] = []
    for start in range(0, len(questions), rows):
        part = questions[start : start + rows]
        asked = [[ask_blank(tokenizer, question.passage, choice) for choice in question.choices] for question in part]
        ids, padding = _padded(model, [choices[0].prompt for choices in asked])
        session = StreamingSession(model, state=state.select(torch.zeros(len(part), dtype=torch.long)), piece=piece)
        first = session.feed(ids, padding).log_softmax(dim=-1)
        row = torch.tensor([i for i, choices in enumerate(asked) for _ in choices])
        ids, padding = _padded(model, [one.target for choices in asked for one in choices])
        losses, _ = model(ids[:, :-1], session.state.select(row), targets=ids[:, 1:], padding=padding[:, 1:])
        begun = first[row.to(first.device), ids[:, 0]].double()
        found += (begun - (losses.double() * ~padding[:, 1:]).sum(dim=1)).tolist()
    width = len(questions[0].choices) if questions else 0
    return np.array(_finite(found)).reshape(len(questions), width)


def _padded(model: Any, texts: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
    """Token ids ``[rows, longest]`` on the model's device, and where there is none."""
    ids = torch.zeros(len(texts), max(map(len, texts)), dtype=torch.long)
    padding = torch.ones(ids.shape, dtype=torch.bool)
    for row, text in enumerate(texts):
        ids[row, : len(text)] = torch.from_numpy(text.astype(np.int64))
        padding[row, : len(text)] = False
    device = next(model.parameters()).device
    return ids.to(device), padding.to(device)


def _finite(values: list[float]) -> list[float]:
    if not np.isfinite(values).all():
        raise InputError(
            "the model's logits are not finite: its weights hold NaN or its state has overflowed; check the checkpoint, or use dtype=float32"
        )
    return values
