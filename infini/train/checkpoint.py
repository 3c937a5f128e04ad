"""Checkpoints: all that a run needs to go on as if it had never stopped."""

from __future__ import annotations

import errno
import random
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from infini.errors import InputError
from infini.train.run_folder import remove_folder, whole_folder
from infini.train.streams import Streams

_FILE = "training.pt"


@dataclass
class Progress:
    """How far a run has come.

    Attributes:
        step: optimizer steps taken; times the accumulation, it is the position in the data, and
            the learning rate follows from it.
        tokens: tokens predicted.
        seconds: wall time spent, over all resumptions.
        gradient_tokens: most tokens that a gradient went through.
        text_tokens: tokens of the longest text that a state has seen, long gaps counted.
        held_out: bits per byte of held-out text when it was last read; None: never.
        best_held_out, best_step: the lowest of them, and after which step.
        worse_since: readings since then.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    gradient_tokens: int = 0
    text_tokens: int = 0
    held_out: float | None = None
    best_held_out: float | None = None
    best_step: int = 0
    worse_since: int = 0

    def reached(self, gradient_tokens: int, text_tokens: int) -> None:
        """Note how far a batch reached, see :func:`infini.train.reach.reach_of`."""
        self.gradient_tokens = max(self.gradient_tokens, gradient_tokens)
        self.text_tokens = max(self.text_tokens, text_tokens)


def save_checkpoint(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    streams: Streams | None = None,
) -> Path:
    """Write ``folder/step-N`` whole, then delete the older ones.

    Raises:
        InputError: no space left; the checkpoint before this one is intact.
    """
    final = folder / f"step-{progress.step:08d}"
    content = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "progress": asdict(progress),
        "random": _random_states(),
    }
    older = _complete(folder)
    try:
        # Through Python's file: torch's own writer reports a full disk as a RuntimeError of zip.
        with whole_folder(final) as temporary, open(temporary / _FILE, "wb") as file:
            torch.save(content, file)
            if streams is not None:
                streams.save(temporary)
    except (OSError, RuntimeError) as error:
        # Where the disk fills up inside a tensor, torch's writer ends its file once more and fails with words of its own about it.
        system = error if isinstance(error, OSError) else error.__context__
        if getattr(system, "errno", None) not in (errno.ENOSPC, errno.EDQUOT):
            raise
        kept = f"the checkpoint of step {_step(older[-1])} is intact" if older else "none is lost"
        raise InputError(
            f"no space left to write {final}: {kept}; free some space and run the same command to go on"
        ) from error
    for old in older:
        if old != final:
            remove_folder(old)
    return final


def latest_checkpoint(folder: Path) -> Path | None:
    """The complete checkpoint with the most steps, or None."""
    complete = _complete(folder)
    return complete[-1] if complete else None


def load_checkpoint(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, streams: Streams | None = None
) -> Progress:
    """Put model, optimizer, streams and every random state back as they were; return how far the run was.

    The file is read with ``weights_only=True``: a pickle that would run code is refused.

    Raises:
        InputError: the file cannot be read, or belongs to another model.
    """
    try:
        content = torch.load(path / _FILE, map_location="cpu", weights_only=True)
        model.load_state_dict(content["model"])
        optimizer.load_state_dict(content["optimizer"])
        if streams is not None:
            streams.load(path, model)
        _set_random_states(content["random"])
        return Progress(**content["progress"])
    except Exception as error:
        # torch.load and load_state_dict raise half a dozen types, by the kind of damage.
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"checkpoint {path} cannot be loaded ({reason}): delete it to start the run again"
        ) from error


def _complete(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*"))


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _random_states() -> dict:
    name, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (name, keys.tolist(), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all(),
    }


def _set_random_states(states: dict) -> None:
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if len(states["cuda"]) == torch.cuda.device_count():  # the same GPUs; torch's other uses differ
        torch.cuda.set_rng_state_all(states["cuda"])
