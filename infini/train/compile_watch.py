"""Says when torch's compiler made a step of training wait: a progress bar that stands still has a reason."""

from __future__ import annotations

import logging
import time
from typing import Self

from infini.errors import InputError

logger = logging.getLogger(__name__)


class CompileWatch:
    """Counts the compiler's work while it is entered, and logs it; a compiler that fails is an InputError.

    Args:
        on: whether anything is compiled; otherwise nothing is watched, and the compiler is not imported.
    """

    def __init__(self, on: bool):
        self._on = on
        self._graphs, self._seconds, self._began = 0, 0.0, 0.0

    def __enter__(self) -> Self:
        if self._on:
            from torch._dynamo.callback import callback_handler

            callback_handler.register_start_callback(self._start)
            callback_handler.register_end_callback(self._end)
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if self._on:
            from torch._dynamo.callback import callback_handler
            from torch._dynamo.exc import BackendCompilerFailed

            callback_handler.remove_start_callback(self._start)
            callback_handler.remove_end_callback(self._end)
            if isinstance(error, BackendCompilerFailed):
                reason = str(error).strip().splitlines()[0]
                raise InputError(f"compile is true, but torch's compiler fails here ({reason}): use train.compile=false") from error

    def tell(self, step: int) -> None:
        """Log, in one line, what was compiled since it was last asked; nothing if nothing was."""
        if self._graphs:
            logger.info("step %d: %d graphs were compiled in %.1f s", step, self._graphs, self._seconds)
            self._graphs, self._seconds = 0, 0.0

    def _start(self, *_: object) -> None:
        self._began = time.perf_counter()

    def _end(self, *_: object) -> None:
        self._graphs += 1
        self._seconds += time.perf_counter() - self._began
