"""The functions that the files of conf/ may call: ${multiply:${a},${b}}, ${folder_name:...}, ${jobs_at_once:}."""

import os
import re
from hashlib import sha256

from omegaconf import OmegaConf

LONGEST_NAME = 160  # file systems allow 255 bytes, and records have folders below


def folder_name(overrides: str) -> str:
    """A name for a job's folder, made of characters that file names, shells and overrides (``weights=FOLDER``) take as they are.

    One that is too long keeps what sweeps compare, as far as there is room: groups and seeds, then how a model is trained, then the rest,
    short ones first; a checksum stands for what is left out.

    Example:
        >>> folder_name("experiment=ablation/linear,seed=0,task.texts=[books/*.txt]")
        'experiment-ablation_linear+seed-0+task.texts-_books__.txt_'
        >>> long = ",".join([f"model.key_{i}=a_long_value_{i}" for i in range(9)] + ["model=rmt", "seed=1", "train.learning_rate=1e-3"])
        >>> folder_name(long)[:45], len(folder_name(long)), folder_name(long) == folder_name(long.replace("value_8", "value_7"))
        ('model-rmt+seed-1+train.learning_rate-1e-3+mod', 135, False)
    """
    parts = re.split(r",(?=[^,=\[\]]+=)", overrides)
    name = "+".join(map(_plain, parts))
    if len(name) <= LONGEST_NAME:
        return name
    kept, left = [], LONGEST_NAME - 13
    for part in sorted(map(_plain, parts), key=_rank):
        if len(part) < left:
            kept.append(part)
            left -= len(part) + 1
    return "+".join([*kept, sha256(overrides.encode()).hexdigest()[:12]])


def _plain(override: str) -> str:
    return re.sub(r"[^\w.+-]", "_", override.replace("=", "-", 1))


def _rank(part: str) -> tuple[int, int, str]:
    if "." not in part.partition("-")[0]:
        return 0, 0, part
    return 1 if part.startswith("train.") else 2, len(part), part


def jobs_at_once() -> int:
    """One job for each visible GPU; without GPUs one for every two cores."""
    import torch

    return torch.cuda.device_count() or max(1, len(os.sched_getaffinity(0)) // 2)


def register() -> None:
    """Makes them known to OmegaConf."""
    for function in (multiply, folder_name, jobs_at_once):
        OmegaConf.register_new_resolver(function.__name__, function, replace=True)


def multiply(a: int, b: int) -> int:
    """Their product."""
    return a * b
