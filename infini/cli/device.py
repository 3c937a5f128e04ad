"""The device that a word on the command line means."""

import torch

from infini.device import require_device
from infini.errors import InputError


def choose_device(name: str) -> torch.device:
    """Returns the device named `name`; "auto" is cuda where there is one.

    Raises:
        InputError: there is no such device here.

    >>> choose_device("cpu")
    device(type='cpu')
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.partition(":")[0] not in ("cpu", "cuda"):
        raise InputError(f"device is {name!r}: use auto, cpu, cuda or cuda:N")
    return require_device(name)
