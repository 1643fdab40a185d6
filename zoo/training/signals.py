"""SIGTERM and the first SIGINT (Ctrl-C) ask the loop to stop after the step in progress; a second SIGINT interrupts."""

import signal
import threading


class StopSignal:
    """A context in which `name` becomes the signal's name once one has come."""

    def __init__(self):
        self.name: str | None = None

    def __enter__(self) -> "StopSignal":
        self._previous = {}
        if threading.current_thread() is threading.main_thread():  # Python lets no other thread set handlers
            self._previous = {s: signal.signal(s, self._receive) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_) -> None:
        for s, handler in self._previous.items():
            signal.signal(s, handler)

    def _receive(self, number: int, frame: object) -> None:
        self.name = signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
