"""The steps since the last line of metrics, measured without making the host wait."""

from __future__ import annotations

import math
import time

import torch

from infini.errors import InputError
from infini.train.step import StepResult


class Window:
    """Keeps losses and gradient norms on the device until they are asked for, all at once.

    Attributes:
        tokens: predicted so far.
        seconds: from the window's making to :meth:`read`.

    Example:
        >>> from infini.train.loss import LossSums
        >>> window = Window()
        >>> sums = LossSums(torch.tensor(6.0), torch.tensor(2.0))
        >>> window.add(1, StepResult(sums, torch.tensor(0.5), tokens=3, answers=1))
        >>> window.read()
        {'loss': 4.0, 'token_loss': 2.0, 'answer_loss': 2.0, 'gradient_norm': 0.5}
    """

    def __init__(self, token_weight: float = 1.0, answer_weight: float = 1.0):
        self._token_weight, self._answer_weight = token_weight, answer_weight
        self.tokens = 0
        self.seconds = 0.0
        self._began = time.perf_counter()
        self._answers = 0
        self._steps: list[int] = []
        self._measured: list[torch.Tensor] = []

    def add(self, step: int, result: StepResult) -> None:
        """Note what step number ``step`` measured."""
        self.tokens += result.tokens
        self._answers += result.answers
        self._steps.append(step)
        self._measured.append(torch.stack([*result.sums, result.gradient_norm]))

    def read(self) -> dict:
        """Mean losses in nats, ``loss`` the one that is minimized, and the mean gradient norm; ``answer_loss`` is None without answers.

        This waits for the device, and sets ``seconds`` to the wall time since the window opened.

        Raises:
            InputError: a loss or gradient of one of the steps is not a finite number.
        """
        measured = torch.stack(self._measured).tolist()
        self.seconds = time.perf_counter() - self._began
        for step, (tokens, answers, norm) in zip(self._steps, measured, strict=True):
            for what, value in (("loss", tokens + answers), ("gradient norm", norm)):
                if not math.isfinite(value):
                    raise InputError(
                        f"the {what} became {value} in step {step}: lower learning_rate or clip, or use "
                        "precision=fp32; no checkpoint was written since, the last one is sound"
                    )
        tokens, answers, norms = (sum(column) for column in zip(*measured, strict=True))
        token_loss = tokens / self.tokens
        answer_loss = answers / self._answers if self._answers else None
        return {
            "loss": self._token_weight * token_loss + self._answer_weight * (answer_loss or 0.0),
            "token_loss": token_loss,
            "answer_loss": answer_loss,
            "gradient_norm": norms / len(measured),
        }
