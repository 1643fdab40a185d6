"""SIGTERM, SIGHUP (the terminal is gone) and the first SIGINT (Ctrl-C) ask the loop to stop after the step in progress;
a second SIGINT interrupts. Of several processes all stop, at the same step, whichever got the signal."""

import signal
import threading

from zoo import processes

STOPPING = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)


class StopSignal:
    """A context in which `name` becomes the signal's name once one has come. Ignored ones (nohup) stay ignored."""

    def __init__(self):
        self.name: str | None = None

    def __enter__(self) -> "StopSignal":
        self._previous = {}
        if threading.current_thread() is threading.main_thread():  # Python lets no other thread set handlers
            heard = [s for s in STOPPING if signal.getsignal(s) is not signal.SIG_IGN]
            self._previous = {s: signal.signal(s, self._receive) for s in heard}
        return self

    def before(self, step: int) -> bool:
        """Whether the run stops before `step`; all processes ask before each."""
        if processes.count() > 1:
            self.name = processes.stops_before(step)
        return self.name is not None

    def __exit__(self, *_) -> None:
        for s, handler in self._previous.items():
            signal.signal(s, handler)

    def _receive(self, number: int, frame: object) -> None:
        self.name = signal.Signals(number).name
        processes.ask_to_stop(self.name)
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
