"""One training batch: the tokens, and which of them are answers."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Batch:
    """Token rows of equal length, one longer than what the model reads.

    The model reads ``tokens[:, :-1]`` and predicts ``tokens[:, 1:]``, so the token at
    position ``t`` is predicted from the tokens up to ``t - 1``.

    Attributes:
        tokens: token ids ``[rows, S * n + 1]`` for ``S`` segments of ``n`` tokens; any integer
            dtype. ``uint8`` is the fast choice for byte models: an eighth of the bytes cross from
            worker to GPU, and :meth:`to` widens them on the device.
        answer: bool ``[rows, S * n + 1]``; True where the token is part of an answer that the text
            before it determines. ``answer[:, 0]`` is predicted by nothing and is ignored.
        segments: ``S``, the number of segments of each row.

    Example:
        >>> bytes_ = torch.tensor([[104, 105, 33]], dtype=torch.uint8)
        >>> batch = Batch(bytes_, bytes_ == 33, segments=1)
        >>> batch.to("cpu").tokens.dtype
        torch.int64
        >>> batch.predicted_tokens
        2
    """

    tokens: torch.Tensor
    answer: torch.Tensor
    segments: int

    def __post_init__(self):
        if self.tokens.dim() != 2 or self.tokens.shape[1] < 2:
            raise ValueError(
                f"tokens must be [rows, at least 2], got shape {tuple(self.tokens.shape)}"
            )
        if self.answer.shape != self.tokens.shape or self.answer.dtype != torch.bool:
            raise ValueError(
                f"answer must be bool of shape {tuple(self.tokens.shape)}, "
                f"got {self.answer.dtype} of shape {tuple(self.answer.shape)}"
            )

    @property
    def predicted_tokens(self) -> int:
        """Number of tokens that the model is asked to predict."""
        return self.tokens.shape[0] * (self.tokens.shape[1] - 1)

    def to(self, device: torch.device | str) -> Batch:
        """The batch on ``device`` with int64 tokens; widened after the copy, which does not wait."""
        tokens = self.tokens.to(device, non_blocking=True).long()
        return Batch(tokens, self.answer.to(device, non_blocking=True), self.segments)

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory, from which copies to a GPU do not block.

        ``DataLoader(pin_memory=True)`` calls it by this name.
        """
        return Batch(self.tokens.pin_memory(), self.answer.pin_memory(), self.segments)
