"""AdamW with one group per kind of parameter, and its learning-rate schedule."""

from __future__ import annotations

import math

import torch
from torch import nn

from infini.train.settings import TrainSettings


def build_optimizer(model: nn.Module, settings: TrainSettings) -> torch.optim.AdamW:
    """AdamW over ``model.parameter_groups()``: "decay", "no_decay" and "memory".

    Only "decay" is decayed. "memory" (gate logits, write gates, the memory's scales) learns
    ``memory_learning_rate_scale`` times faster and is never decayed: decay would pull every gate
    back to 1/2. The step is fused on CUDA.

    Raises:
        ValueError: the groups do not hold every trainable parameter exactly once.
    """
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    groups = model.parameter_groups()
    listed = [name for names in groups.values() for name in names]
    if sorted(listed) != sorted(trainable):
        wrong = set(listed) ^ set(trainable) or {n for n in listed if listed.count(n) > 1}
        raise ValueError(
            "parameter_groups() must list every trainable parameter exactly once; "
            f"missing, unknown or repeated: {', '.join(sorted(wrong))}"
        )
    device = next(iter(trainable.values())).device
    return torch.optim.AdamW(
        [
            {
                "name": group,
                "params": [trainable[name] for name in names],
                "weight_decay": settings.weight_decay if group == "decay" else 0.0,
                "scale": settings.memory_learning_rate_scale if group == "memory" else 1.0,
            }
            for group, names in groups.items()
            if names
        ],
        lr=settings.learning_rate,
        betas=settings.betas,
        fused=device.type == "cuda",
    )


def learning_rate_at(step: int, settings: TrainSettings) -> float:
    """The rate of step ``step`` (from 0): linear warm-up to the peak, then half a cosine.

    It is a function of the step alone, so a checkpoint needs to hold no schedule.

    Example:
        >>> settings = TrainSettings(steps=110, warmup_steps=10, learning_rate=1.0)
        >>> [round(learning_rate_at(step, settings), 3) for step in (0, 9, 10, 60, 110)]
        [0.1, 1.0, 1.0, 0.55, 0.1]
    """
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    progress = (step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
    floor = settings.min_learning_rate_ratio
    return settings.learning_rate * (floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group ``rate`` times its own scale."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["scale"]
