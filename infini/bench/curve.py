"""Two hundred steps of training with the kernels and without: the same curve, as far as 16 bits allow."""

from collections.abc import Callable

import torch

from infini.bench.memory import VARIANTS
from infini.bench.trial import Trial, Trials
from infini.config import InfiniConfig
from infini.data.batch import Batch
from infini.model import InfiniTransformer
from infini.train.optimizer import build_optimizer
from infini.train.settings import TrainSettings
from infini.train.step import take_step

# Nats by which the means of two curves may differ beyond twice what plain bf16 differs from fp32.
FLOOR = 0.01


def trials(device: torch.device, rules: tuple[str, ...], steps: int, segment_length: int, heads: int, head_dim: int, layers: int) -> Trials:
    """Each rule: plain fp32, plain bf16 and the kernels in bf16, same weights, same texts. Times a step of the last.

    In the texts every other segment says the one before again, which only the memory can tell.
    """
    for rule in rules:
        config = InfiniConfig(
            hidden_size=heads * head_dim,
            intermediate_size=2 * heads * head_dim,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            segment_length=segment_length,
            **VARIANTS[rule],
        )
        facts = {"part": "curve", "what": "training step", "rule": rule, "backend": "triton", "model": config.to_dict()}

        def prepare(config=config, facts=facts) -> Callable[[], object]:
            exact, plain = (Run(config, device, "torch", half).losses(steps) for half in (False, True))
            run = Run(config, device, "triton", True)
            fast = run.losses(steps)
            facts |= {"losses": fast, "plain_losses": plain, "fp32_losses": exact}
            facts |= {"apart": _apart(fast, exact), "plain_apart": _apart(plain, exact)}
            if not facts["apart"] <= 2 * facts["plain_apart"] + FLOOR:
                raise AssertionError(f"the curve is {facts['apart']:.3f} nats from fp32's, the plain one {facts['plain_apart']:.3f}")
            return run.step

        yield Trial(facts, prepare, Run.ROWS * Run.SEGMENTS * segment_length)


class Run:
    """A model in training on made-up texts.

    Args:
        half: under bf16 autocast; otherwise fp32.
    """

    ROWS, SEGMENTS = 4, 8

    def __init__(self, config: InfiniConfig, device: torch.device, backend: str, half: bool):
        torch.manual_seed(0)
        self.model, self.device, self.half = InfiniTransformer(config, "sdpa", backend).to(device), device, half
        self.optimizer = build_optimizer(self.model, TrainSettings(steps=1, warmup_steps=0))
        self._random = torch.Generator().manual_seed(1)

    def losses(self, steps: int) -> list[float]:
        """Mean losses of the next steps, in nats."""
        return torch.stack([self.step() for _ in range(steps)]).tolist()

    def step(self) -> torch.Tensor:
        """One step; its mean loss, on the device."""
        config = self.model.config
        said = torch.randint(config.vocab_size, (self.ROWS, self.SEGMENTS // 2, 1, config.segment_length), generator=self._random)
        text = said.expand(-1, -1, 2, -1).flatten(1)
        text = torch.cat([text, text[:, :1]], dim=1)
        batch = Batch(text, torch.zeros_like(text, dtype=torch.bool), segments=self.SEGMENTS)
        result = take_step(self._called, self.optimizer, [batch], 1.0, self.device)
        return result.sums.tokens / result.tokens

    def _called(self, *arguments, **keywords):
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
            return self.model(*arguments, **keywords)


def _apart(losses: list[float], others: list[float]) -> float:
    """Mean distance of two curves, in nats."""
    return sum(abs(a - b) for a, b in zip(losses, others, strict=True)) / len(losses)
