"""Ctrl-C and SIGTERM as a request: stop after this step."""

from __future__ import annotations

import signal
import threading


class StopRequest:
    """Inside the ``with`` block the first SIGINT or SIGTERM sets ``requested``; the second acts as before.

    Signals reach only the main thread of Python; in another thread the block changes nothing.
    """

    def __init__(self):
        self.requested = False
        self._before = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _ask(self, number: int, frame: object) -> None:
        self.requested = True
        self.__exit__()
