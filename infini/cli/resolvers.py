"""The functions that the files of conf/ may call: ${multiply:${a},${b}}, ${folder_name:...}, ${jobs_at_once:}."""

import os
import re
from hashlib import sha256

from omegaconf import OmegaConf

LONGEST_NAME = 160  # file systems allow 255 bytes, and records have folders below


def folder_name(overrides: str) -> str:
    """A name for a job's folder: without characters that a file name or a shell minds, cut with a checksum where it is too long.

    Example:
        >>> folder_name("experiment=ablation/linear,seed=0,task.texts=[books/*.txt]")
        'experiment=ablation_linear,seed=0,task.texts=_books__.txt_'
        >>> len(folder_name("x" * 1000)), folder_name("x" * 1000) == folder_name("x" * 1001)
        (160, False)
    """
    name = re.sub(r"[^\w=.,+-]", "_", overrides)
    if len(name) > LONGEST_NAME:
        name = f"{name[: LONGEST_NAME - 13]}-{sha256(overrides.encode()).hexdigest()[:12]}"
    return name


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
