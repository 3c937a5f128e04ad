"""A whole model: training steps against the same model with full attention, and prefill of long texts."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from infini.bench.attend import Stretch, best_kernel, trials_of
from infini.bench.memory import VARIANTS
from infini.bench.trial import Trial, Trials
from infini.bench.work import Work, model_flop
from infini.causal import KERNELS
from infini.config import InfiniConfig
from infini.data.batch import Batch
from infini.model import InfiniTransformer
from infini.session import StreamingSession
from infini.train.optimizer import build_optimizer
from infini.train.settings import TrainSettings
from infini.train.step import take_step

# Relative difference of two bf16 results that is still rounding.
CLOSE = 0.05


@dataclass(frozen=True)
class ModelShape:
    """The decoder that is timed."""

    layers: int = 12
    heads: int = 8
    head_dim: int = 128
    intermediate_size: int = 4096
    segment_length: int = 2048
    vocab_size: int = 256

    def config(self, rule: str, **changes) -> InfiniConfig:
        """Its configuration with the memory of a rule, see `infini.bench.memory.VARIANTS`."""
        shape = {
            "hidden_size": self.heads * self.head_dim,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "segment_length": self.segment_length,
            "vocab_size": self.vocab_size,
        }
        return InfiniConfig(**shape | VARIANTS[rule] | changes)

    def full(self, tokens: int) -> InfiniConfig:
        """The same with full attention: no memory, and one segment as long as the text."""
        return self.config("linear", memory_layers=(), segment_length=tokens)


def step_trials(
    device: torch.device,
    shape: ModelShape,
    tokens: int,
    rules: tuple[str, ...],
    backends: tuple[str, ...],
    compiled: tuple[bool, ...],
    kernels: tuple[str, ...] = KERNELS,
) -> Trials:
    """Training steps on one text: full attention by its fastest kernel, then ours; optimizer, clipping and loss included.

    fp32 parameters, bf16 autocast, fused AdamW, nothing recomputed.
    """
    size = (shape.heads, shape.heads, shape.head_dim)
    full, _ = best_kernel((yield from trials_of(Stretch(1, tokens, *size), device, "step", kernels, (True,))), True)
    local, _ = best_kernel((yield from trials_of(Stretch(1, tokens, *size, shape.segment_length), device, "step", kernels, (True,))), True)
    best = None
    for compile in compiled:
        row = yield step_trial(device, shape.full(tokens), "full attention", full, "torch", compile, tokens, None)
        if "milliseconds" in row and (best is None or row["milliseconds"] < best[1]):
            best = ("full attention" + ", compiled" * compile, row["milliseconds"])
    for rule in rules:
        for backend in backends:
            for compile in compiled:
                yield step_trial(device, shape.config(rule), rule, local, backend, compile, tokens, best)


def step_trial(
    device: torch.device,
    config: InfiniConfig,
    rule: str,
    kernel: str,
    backend: str,
    compile: bool,
    tokens: int,
    against: tuple[str, float] | None,
) -> Trial:
    """Training steps of one model; its gradient must be that of the plain code, attention by `sdpa`, nothing compiled."""

    def prepare() -> Callable[[], object]:
        model = _made(config, device, kernel, backend)
        if compile:
            torch._dynamo.reset()  # graphs of other models
            model.enable_compile()
        text = torch.randint(config.vocab_size, (1, tokens + 1))
        # More than two segments, so that the memory is read; whole ones, or a compiler would see other shapes.
        short = text[:, : min(tokens, 3 * config.segment_length) + 1].to(device)
        plain = _made(config, device, "sdpa", "torch")
        _assert_close("gradient", _gradient(model, short), _gradient(plain, short))
        del plain
        optimizer = build_optimizer(model, TrainSettings(steps=1, warmup_steps=0))
        batch = Batch(text, torch.zeros_like(text, dtype=torch.bool), segments=1)

        def called(*arguments, **keywords):
            with torch.autocast(device.type, torch.bfloat16):
                return model(*arguments, **keywords)

        return lambda: take_step(called, optimizer, [batch], 1.0, device)

    facts = {"part": "step", "what": "training step", "rule": rule, "backend": backend, "kernel": kernel, "compiled": compile}
    facts["model"] = config.to_dict()
    # Parameters, gradients and AdamW's two moments are moved too, but that is little beside the products.
    return Trial(facts, prepare, tokens, Work(0, 3 * model_flop(config, tokens)), against, counts_use=True)


def prefill_trials(
    device: torch.device,
    shape: ModelShape,
    lengths: tuple[int, ...],
    piece: int,
    rules: tuple[str, ...],
    backends: tuple[str, ...],
    compiled: tuple[bool, ...],
    kernels: tuple[str, ...] = KERNELS,
) -> Trials:
    """A text is read in pieces by a session, bf16 weights, to its last logits; `against` is the best rate at any shorter length."""
    size = (shape.heads, shape.heads, shape.head_dim, shape.segment_length)
    tokens = -(-piece // shape.segment_length) * shape.segment_length
    kernel, _ = best_kernel((yield from trials_of(Stretch(1, tokens, *size), device, "prefill", kernels, (False,))), False)
    for rule in rules:
        for backend in backends:
            for compile in compiled:
                model, best = _made(shape.config(rule), device, kernel, backend).to(torch.bfloat16).eval(), None
                if compile:
                    torch._dynamo.reset()
                    model.enable_compile()
                agreed: list[bool] = []
                for length in lengths:
                    against = None if best is None else (f"the same rate as at {best[1]:,}", 1000 * length / best[0])
                    row = yield prefill_trial(device, model, rule, kernel, backend, compile, length, piece, against, agreed)
                    if "milliseconds" in row and (best is None or row["tokens_per_second"] > best[0]):
                        best = (row["tokens_per_second"], length)


def prefill_trial(
    device: torch.device,
    model: InfiniTransformer,
    rule: str,
    kernel: str,
    backend: str,
    compile: bool,
    tokens: int,
    piece: int,
    against: tuple[str, float] | None,
    agreed: list[bool],
) -> Trial:
    """A text of `tokens` tokens; the last logits after a few segments must be those of the plain code."""
    config = model.config

    def prepare() -> Callable[[], object]:
        text = torch.randint(config.vocab_size, (1, tokens))
        if not agreed:
            short = torch.randint(config.vocab_size, (1, 5 * config.segment_length))
            pieces = 2 * config.segment_length
            plain = _made(config, device, "sdpa", "torch").to(torch.bfloat16).eval()
            _assert_close("logits", *(StreamingSession(each, piece=pieces).feed(short) for each in (model, plain)))
            agreed.append(True)
        return lambda: StreamingSession(model, piece=piece).feed(text)

    facts = {"part": "prefill", "what": "prefill", "rule": rule, "backend": backend, "kernel": kernel, "compiled": compile, "piece": piece}
    facts["model"] = config.to_dict()
    weights = 2 * sum(p.numel() for p in model.parameters()) * -(-tokens // piece)
    # Of the head the last token alone is asked, a piece at a time.
    flop = model_flop(config, tokens) - 2 * tokens * config.hidden_size * config.vocab_size
    return Trial(facts, prepare, tokens, Work(weights, flop), against, counts_use=True)


def _made(config: InfiniConfig, device: torch.device, kernel: str, backend: str) -> InfiniTransformer:
    """The same random weights for every kernel and backend, with gates off their start."""
    torch.manual_seed(0)
    with device:
        model = InfiniTransformer(config, kernel, backend)
    return model.to(device)


def _gradient(model: InfiniTransformer, text: Tensor) -> Tensor:
    with torch.autocast(text.device.type, torch.bfloat16):
        losses, _ = model(text[:, :-1], targets=text[:, 1:])
    return torch.autograd.grad(losses.mean(), model.blocks[0].attention.k_proj.weight)[0]


def _assert_close(name: str, found: Tensor, plain: Tensor) -> None:
    apart = float((found.double() - plain.double()).norm() / plain.double().norm())
    if not apart < CLOSE:
        raise AssertionError(f"{name}: {apart:.1%} of its norm from the plain code's")
