"""A model and data of a few hundred numbers, so that whole training runs take a second."""

import dataclasses

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from infini.data.batch import Batch
from infini.train import TrainSettings

SEGMENT = 4


@dataclasses.dataclass(frozen=True)
class TinyConfig:
    vocab_size: int = 12
    hidden_size: int = 8
    segment_length: int = SEGMENT

    def to_dict(self):
        return dataclasses.asdict(self)


class TinyModel(nn.Module):
    """Embeds, mixes in the mean of the segments before through a gate, and reads out."""

    def __init__(self, config=TinyConfig()):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.out = nn.Linear(config.hidden_size, config.vocab_size)
        self.beta = nn.Parameter(torch.zeros(2))
        self.recomputes, self.compiles = False, False
        self.state_dtypes = set()

    def forward(self, tokens, state=None, *, targets=None, memory=True, trace=None):
        x = self.out.weight.new_zeros(()) + self.embedding(tokens)
        segments = x.unflatten(1, (-1, self.config.segment_length))
        past = segments.mean(2).cumsum(1).roll(1, 1)
        past[:, 0] = 0
        weight = torch.sigmoid(self.beta)
        if trace is not None:
            trace["layers"] = [{"memory_weight": weight.detach()}, None]
        share = weight.repeat_interleave(self.config.hidden_size // 2) * memory
        mixed = (segments * (1 - share) + share * past.unsqueeze(2)).flatten(1, 2)
        logits = self.out(mixed)
        if targets is not None:
            logits = cross_entropy(logits.transpose(1, 2).float(), targets, reduction="none")
        return logits, past[:, -1]

    def parameter_groups(self):
        return {
            "decay": ["out.weight"],
            "no_decay": ["embedding.weight", "out.bias"],
            "memory": ["beta"],
        }

    def enable_recompute(self, on=True):
        self.recomputes = on

    def enable_compile(self):
        self.compiles = True

    def save_pretrained(self, folder, dtype=None):
        folder.mkdir(exist_ok=True)
        torch.save({k: v.to(dtype) for k, v in self.state_dict().items()}, folder / "weights.pt")


@dataclasses.dataclass(frozen=True)
class CopySource:
    """Rows whose last token, the answer, repeats their first; two or three segments."""

    steps: int = 8
    seed: int = 0
    fixed: bool = False

    def __len__(self):
        return self.steps

    def __getitem__(self, index):
        random = torch.Generator().manual_seed(1000 * self.seed + (0 if self.fixed else index))
        segments = int(torch.randint(2, 4, (), generator=random))
        shape = (3, segments * SEGMENT + 1)
        tokens = torch.randint(12, shape, generator=random, dtype=torch.uint8)
        tokens[:, -1] = tokens[:, 0]
        answer = torch.zeros(shape, dtype=torch.bool)
        answer[:, -1] = True
        return Batch(tokens, answer, segments)


@pytest.fixture
def tiny_model():
    """Builds the tiny model, the same one each time."""

    def build():
        torch.manual_seed(1)
        return TinyModel()

    return build


@pytest.fixture
def copy_source():
    return CopySource


@pytest.fixture
def settings():
    """Builds settings of a short run on the CPU."""

    def build(**changes):
        defaults = dict(steps=8, warmup_steps=2, device="cpu", precision="fp32", workers=0, log_every=2)
        return TrainSettings(**defaults | dict(checkpoint_every=4, knockout_every=4) | changes)

    return build
