"""Tensors in a safetensors file that appears whole or not at all."""

import os
import re
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from infini.errors import InputError


def write_tensors(path: str | os.PathLike, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors from any device to `path`: to a file beside it first, then renamed.

    Args:
        path: the file; what stands there is replaced.
        tensors: by name, any dtype; detached and copied to the CPU.
        metadata: strings for the file's header.

    Raises:
        InputError: at `path` stands something else than a file, a device or a pipe, which a file would replace.
        OSError: the disk is full or the folder cannot be written; `path` is as it was, and nothing is left beside it.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise InputError(f"{path} is no regular file, and saving would replace it: name a file")
    part = path.with_name(path.name + ".part")
    try:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, part, metadata and dict(metadata))
        os.replace(part, path)
    except SafetensorError as error:
        # The writer reports the system's errors as text of its own; callers know an error by its number.
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        code = int(number[1])
        raise OSError(code, os.strerror(code), str(path)) from None
    finally:
        part.unlink(missing_ok=True)
