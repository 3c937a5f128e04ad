"""The device that a word on the command line means."""

import torch

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
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"device is {name!r}: use auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"device is {name!r}: use auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device is {name!r}, but there are {torch.cuda.device_count()} CUDA devices: use device=cpu")
    return device
