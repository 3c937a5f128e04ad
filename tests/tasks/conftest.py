"""Models that know the passkey task by heart, to test the ruler and not the ruled."""

import re
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch

from infini.data.tokenizer import ByteTokenizer


@dataclass(frozen=True)
class _Text:
    """The oracle's state: all it has read, one string per row."""

    rows: tuple[str, ...]

    @property
    def batch_size(self):
        return len(self.rows)

    @property
    def nbytes(self):
        return sum(map(len, self.rows))

    def detach(self):
        return replace(self)


class PasskeyOracle(torch.nn.Module):
    """Writes `` KEY.`` after the question; ``spoil(key) -> str`` changes what it believes the key to be.

    It repeats what it has *written*, digit after digit: after one wrong digit it is lost, as a real
    model may be. So a benchmark that feeds it the right digits would find a better score.
    """

    def __init__(self, spoil=lambda key: key, segment_length=64):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.config = SimpleNamespace(vocab_size=256, segment_length=segment_length)
        self.spoil = spoil
        self.calls = 0

    def init_state(self, batch_size, device=None):
        return _Text(("",) * batch_size)

    def state_bytes(self, tokens, batch_size=1):
        return tokens * batch_size

    def forward(self, tokens, state=None, *, reset=None, padding=None, keep="all", hidden=False):
        self.calls += 1
        state = state or self.init_state(len(tokens))
        rows = tuple(old + bytes(new).decode("latin-1") for old, new in zip(state.rows, tokens.tolist()))
        logits = torch.zeros(len(rows), 1, 256)
        for row, text in enumerate(rows):
            logits[row, 0, ord(self._next(text))] = 1.0 + self.weight.item()
        return logits, _Text(rows)

    def _next(self, text):
        before, asked, written = text.rpartition("What is the pass key? The pass key is")
        if not asked:
            return "?"
        said = " " + self.spoil(re.search("The pass key is ([0-9]+)", before)[1]) + "."
        return said[len(written)] if said.startswith(written) and written != said else "?"


@pytest.fixture
def oracle():
    return PasskeyOracle


@pytest.fixture
def tokenizer():
    return ByteTokenizer()
