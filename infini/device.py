"""Whether a device is here."""

import torch

from infini.errors import InputError


def require_device(name: torch.device | str) -> torch.device:
    """The device of that name.

    Raises:
        InputError: there is no such device here.

    Example:
        >>> require_device("cpu")
        device(type='cpu')
    """
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        raise InputError(f"device is {str(name)!r}, which names none: use cpu, cuda or cuda:N") from None
    if device.type == "cuda":
        if (device.index or 0) >= torch.cuda.device_count():
            raise InputError(f"device is {str(name)!r}, but there are {torch.cuda.device_count()} CUDA devices: use device=cpu")
        return device
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ImportError):  # what torch says of each kind that it was built without
        raise InputError(f"device is {str(name)!r}, which is not here: use cpu, cuda or cuda:N") from None
    return device
