"""Held-out text during training: how good the weights are on it, the best of them kept, and when to stop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from infini.data.loader import BatchSource
from infini.errors import InputError
from infini.report.record import write_atomically
from infini.train.checkpoint import Progress
from infini.train.reach import write_reach
from infini.train.run_folder import whole_folder
from infini.train.settings import TrainSettings

FOLDER = Path("best", "model")
FILE = "held_out.json"  # in that folder: which step its weights are of


class HeldOut:
    """Reads the held-out text of a source every ``validate_every`` steps and at the end, and keeps the best weights.

    Nothing of training depends on it but, with ``patience``, where it ends. The weights are written behind a checkpoint of their own
    step: a process that dies between the two has them in that checkpoint, and `keep` writes them when the run goes on.

    Args:
        source: of the batches; its ``held_out`` is called with the model, see :class:`infini.data.loader.BatchSource`.
        settings: of the run.
        output: folder of the run; the best weights lie in ``best/model``.

    Raises:
        InputError: there is text and nobody asks for it, or no text for what is asked.
    """

    def __init__(self, source: BatchSource, settings: TrainSettings, output: Path):
        self._bits_per_byte, self._settings = getattr(source, "held_out", None), settings
        self._folder = output / FOLDER
        if settings.validate_every and self._bits_per_byte is None:
            raise InputError(
                f"validate_every is {settings.validate_every}, but the data has no held-out text: use task=stream and give "
                "task.validation_texts=[...], or leave train.validate_every out"
            )
        if self._bits_per_byte is not None and not settings.validate_every:
            raise InputError("the data has held-out text, but validate_every is null: say how many steps apart it is read, train.validate_every=N")

    def due(self, step: int) -> bool:
        """Whether the text is read after this step."""
        every = self._settings.validate_every
        return every is not None and (step % every == 0 or step == self._settings.steps)

    def over(self, progress: Progress) -> bool:
        """Whether as many readings in a row as ``patience`` says have found nothing better."""
        return self._settings.patience is not None and progress.worse_since >= self._settings.patience

    def measure(self, model: nn.Module, device: torch.device, progress: Progress) -> dict[str, Any]:
        """Read the text, in the precision of training, and note in ``progress`` whether these weights are the best so far.

        Returns:
            A row of metrics.
        """
        training = model.training
        model.eval()
        # Text of many lengths comes seldom: nothing to compile for.
        with torch.autocast(device.type, torch.bfloat16, enabled=self._settings.precision == "bf16"), torch.compiler.set_stance("force_eager"):
            found = self._bits_per_byte(model)
        model.train(training)
        progress.held_out = found
        if progress.best_held_out is None or found < progress.best_held_out:
            progress.best_held_out, progress.best_step, progress.worse_since = found, progress.step, 0
        else:
            progress.worse_since += 1
        return {"step": progress.step, "held_out_bits_per_byte": found}

    def keep(self, model: nn.Module, progress: Progress) -> None:
        """Write the weights where they are the best and not written yet; after the checkpoint of this step."""
        note = {"step": progress.best_step, "bits_per_byte": progress.best_held_out}
        if progress.best_held_out is None or progress.best_step != progress.step or read_note(self._folder) == note:
            return
        with whole_folder(self._folder) as folder:
            model.save_pretrained(folder, dtype=torch.float16)
            write_reach(folder, progress.gradient_tokens, progress.text_tokens)
            write_atomically(folder / FILE, (json.dumps(note) + "\n").encode())

    def result(self, progress: Progress) -> dict[str, Any]:
        """For the record: bits per byte of the last weights and of the best, and their step; nothing without held-out text."""
        if progress.best_held_out is None:
            return {}
        return {
            "held_out_bits_per_byte": progress.held_out,
            "best_held_out_bits_per_byte": progress.best_held_out,
            "best_step": progress.best_step,
        }


def read_note(folder: Path) -> dict[str, Any] | None:
    """Of the weights in a checkpoint folder: their step and bits per byte; None for weights that were not picked by held-out text."""
    try:
        return json.loads((folder / FILE).read_text())
    except FileNotFoundError:
        return None
