"""The curve of a run: one JSON object a line, and TensorBoard where asked for."""

from __future__ import annotations

import json
from pathlib import Path

from infini.errors import InputError
from infini.report.record import write_atomically


class MetricsLog:
    """Appends rows to ``folder/metrics.jsonl``.

    Args:
        folder: the run's output folder.
        step: the step the run goes on from; rows after it, of steps that are taken again, go.
        tensorboard: also write events to ``folder/tensorboard``.

    Raises:
        InputError: TensorBoard is asked for and not installed.
    """

    def __init__(self, folder: Path, step: int = 0, *, tensorboard: bool = False):
        self._path = folder / "metrics.jsonl"
        self._events = _event_writer(folder / "tensorboard", step) if tensorboard else None
        if self._path.exists():
            kept = [line for line in self._path.read_bytes().splitlines(True) if _is_up_to(line, step)]
            write_atomically(self._path, b"".join(kept))
        self._file = self._path.open("a")

    def write(self, row: dict) -> None:
        """Append one row; it must have the key ``step``. NaN and infinity are an InputError, JSON has no such numbers."""
        try:
            line = json.dumps(row, allow_nan=False)
        except ValueError as error:
            raise InputError(
                f"a number measured after step {row['step']} is not finite: lower learning_rate or clip, or use precision=fp32; "
                "no checkpoint was written since, the last one is sound"
            ) from error
        self._file.write(line + "\n")
        self._file.flush()
        if self._events:
            for name, value in row.items():
                if isinstance(value, int | float) and name != "step":
                    self._events.add_scalar(name, value, row["step"])

    def last(self, key: str) -> dict | None:
        """The last row that has ``key``, or None."""
        rows = (json.loads(line) for line in reversed(self._path.read_text().splitlines()))
        return next((row for row in rows if key in row), None)

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *error) -> None:
        self._file.close()
        if self._events:
            self._events.close()


def _is_up_to(line: bytes, step: int) -> bool:
    # A line without its end was cut when the process died.
    return line.endswith(b"\n") and json.loads(line)["step"] <= step


def _event_writer(folder: Path, step: int):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise InputError(
            "tensorboard=true needs TensorBoard, which is not installed: "
            "pip install 'infini-attention[tensorboard]'"
        ) from error
    return SummaryWriter(str(folder), purge_step=step + 1)
