"""Models by name."""

import os

import torch

from infini import checkpoint
from infini.model import InfiniTransformer


def load(
    name_or_folder: str | os.PathLike | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    attention: str = "auto",
) -> InfiniTransformer:
    """Load a model, in evaluation mode: a checkpoint folder, or one that the library ships, by name (None: the first).

    Args:
        name_or_folder: for example `"passkey-mixed-12m"` or a path.
        device: where to.
        dtype: of the parameters, float32 by default; memories are float32 in any case.
        attention: backend of local attention: `auto`, `flash`, `sdpa`, `eager`.

    Raises:
        InputError: there is no such model, device, dtype or backend, or the model's files are damaged.
    """
    return InfiniTransformer.from_pretrained(checkpoint.resolve(name_or_folder), device, dtype, attention)
