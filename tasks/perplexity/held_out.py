"""One number for how well a model predicts documents that it does not learn from."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from infini.tasks.perplexity.score import score_documents

from infini.data.tokenized import TokenizedDocuments
from infini.errors import InputError
from infini.protocol import SegmentModel


@dataclass(frozen=True)
class HeldOutText:
    """Documents to be predicted during training, whole, the state carried from their first to their last token.

    Attributes:
        text: the documents.
        batch_size: documents at once.
        piece: tokens of a document at once; like ``batch_size`` it changes nothing but rounding and memory.

    Example:
        >>> import torch
        >>> from infini import InfiniConfig, InfiniTransformer
        >>> model = InfiniTransformer(InfiniConfig(hidden_size=32, num_hidden_layers=1, segment_length=4)).eval()
        >>> ids = torch.arange(9, dtype=torch.uint8).numpy()
        >>> text = TokenizedDocuments(ids, np.array([9]), ("one",), (1,), (9,))
        >>> _ = torch.nn.init.zeros_(model.embedding.weight)
        >>> round(HeldOutText(text)(model), 4)  # 8 tokens of 8 bits, of 9 bytes
        7.1111
    """

    text: TokenizedDocuments
    batch_size: int = 4
    piece: int = 4096

    def __post_init__(self):
        if short := [name for name, size in zip(self.text.names, self.text.sizes, strict=True) if size < 2]:
            raise InputError(f"the held-out document {short[0]} has fewer than 2 tokens; nothing of it can be predicted: leave it out")

    def __call__(self, model: SegmentModel) -> float:
        """Bits per byte of all documents together, as `infini perplexity` reckons them: each token but a document's first, once."""
        order = sorted(range(len(self.text)), key=lambda i: -self.text.sizes[i])
        nats = []
        for start in range(0, len(order), self.batch_size):
            documents = [self.text[i] for i in order[start : start + self.batch_size]]
            nats += [value for buckets in score_documents(model, documents, self.piece) for value in buckets]
        return math.fsum(nats) / math.log(2) / sum(self.text.bytes)

    def require_apart(self, text: TokenizedDocuments) -> None:
        """Refuse documents that are learned from.

        Raises:
            InputError: one is among those of ``text``.
        """
        sizes = set(self.text.sizes.tolist())
        learned = {text[i].tobytes() for i in np.flatnonzero([size in sizes for size in text.sizes.tolist()])}
        for i, name in enumerate(self.text.names):
            if self.text[i].tobytes() in learned:
                raise InputError(f"the held-out document {name} is one of the texts that are learned from: leave it out of one of them")
