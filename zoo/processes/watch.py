"""What each of several processes does beside its run: show that it lives, and hear what became of the others.

Every `POLL` seconds a thread writes a beat to the coordination service and reads the news there:

    zoo/beat/<process>    how often it has beaten, steps begun, things done; process 0's is zoo/news/beat
    zoo/news/error        why all end: what one raised, or that process 0 found one gone or all of them stuck
    zoo/news/stop         the signal that one has got
    zoo/stop/<process>    steps that it had begun when it heard of the signal; it begins no more until there is
    zoo/news/stop_after   the most of these, after which all stop

Process 0 watches all beats, the others that of process 0. No step waits for any of it, but while a stop is agreed on;
and that waits for no device, so that it cannot wait for a step that another process does not begin.
"""

import contextlib
import json
import os
import sys
import threading
import time
import traceback
from typing import NoReturn

import jax

from zoo.errors import ended_by
from zoo.processes import world
from zoo.terminal import printable

POLL = 0.5
_AGAIN = "repeat the command, on fewer processes if need be, to go on from the newest checkpoint"


class Watch:
    """Of this process, until `end`.

    Args:
      heartbeat_timeout: seconds without a beat after which a process is gone.
      step_timeout: seconds in which nothing was done on any process, after which all are stuck.
    """

    def __init__(self, heartbeat_timeout: float, step_timeout: float):
        self._heartbeat_timeout, self._step_timeout = heartbeat_timeout, step_timeout
        self._client, self._index, self._count = world.client(), world.index(), world.count()
        self._asked: str | None = None  # the signal that this process got
        self._stop: str | None = None  # the signal that any of them got
        self._stop_after: int | None = None
        self._agreement = threading.Condition()
        self._begun, self._done = 0, 0
        self._heard = time.monotonic()  # from the coordinator
        # Of each process: its last beat and when it came; and of all: how much was done, and when that was more.
        self._beats: dict[int, tuple[str, float]] = {}
        self._all_done = (0, self._heard)
        self._ended = threading.Event()
        self._threads = [threading.Thread(target=f, daemon=True) for f in (self._talk, self._hear_silence)]
        for thread in self._threads:
            thread.start()

    def end(self) -> None:
        """All processes have come to their ends."""
        self._ended.set()
        self._threads[0].join()

    def done(self) -> None:
        """Something is finished: a step, a batch of an evaluation, a save."""
        self._done += 1

    def ask_to_stop(self, signal: str) -> None:
        """All processes are to stop after the same step. Takes no lock: a signal's handler may call it."""
        self._asked = self._asked or signal

    def stops_before(self, step: int) -> str | None:
        """The signal for which no process begins `step`; None: this process begins it."""
        with self._agreement:
            while self._stop and self._stop_after is None:
                self._agreement.wait()
            if self._stop_after is not None and step > self._stop_after:
                return self._stop
            self._begun = step
            return None

    def fail(self, error: BaseException) -> NoReturn:
        """End this process, and all others with the same message and exit code."""
        if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            # A collective breaks when one of the others is gone. Who is, its missing beats will tell.
            time.sleep(self._heartbeat_timeout + 4 * POLL)
        expected, code, message = ended_by(error)
        if not expected:
            traceback.print_exception(error)
        self._publish("error", json.dumps([self._index, code, message]))
        _leave(code, message)

    # --- Of its threads -----------------------------------------------------------------------------------------------

    def _talk(self) -> None:
        beats = 0
        while not self._ended.wait(POLL):
            beats += 1
            try:
                key = "zoo/news/beat" if self._index == 0 else f"zoo/beat/{self._index}"
                beat = json.dumps([beats, self._begun, self._done])
                self._client.key_value_set(key, beat, allow_overwrite=True)
                if self._asked and not self._stop:
                    self._publish("stop", f"{self._asked} of process {self._index}")
                news = self._read("zoo/news/")
                self._heed(news)
                others = {int(p): beat for p, beat in self._read("zoo/beat/").items()} if self._index == 0 else {}
                wrong = self._judge(others | ({0: news["beat"]} if "beat" in news else {}))
            except jax.errors.JaxRuntimeError:  # the coordinator: how long, `_hear_silence` counts
                continue
            self._heard = time.monotonic()
            if wrong and self._index == 0:
                self._publish("error", json.dumps([None, 1, wrong]))
            elif wrong:
                _leave(1, wrong)

    def _hear_silence(self) -> None:
        """A call of a coordinator that is gone with its machine may take minutes."""
        while not self._ended.wait(POLL):
            if time.monotonic() - self._heard > self._heartbeat_timeout:
                _leave(1, f"process 0's machine does not answer, for {self._heartbeat_timeout:g} s; {_AGAIN}")

    def _heed(self, news: dict[str, str]) -> None:
        if "error" in news:
            process, code, message = json.loads(news["error"])
            if process != self._index:  # else `fail` is about to end it
                _leave(code, message if process is None else f"process {process}: {message}")
        if "stop" in news and self._stop is None:
            with self._agreement:
                self._stop = news["stop"]
            self._client.key_value_set(f"zoo/stop/{self._index}", str(self._begun), allow_overwrite=True)
        if self._index == 0 and self._stop and "stop_after" not in news:
            begun = self._read("zoo/stop/")
            if len(begun) == self._count:
                self._publish("stop_after", str(max(map(int, begun.values()))))
        if "stop_after" in news:
            with self._agreement:
                self._stop_after = int(news["stop_after"])
                self._agreement.notify_all()

    def _judge(self, beats: dict[int, str]) -> str:
        """What is wrong with the processes that this one watches, given their last beats; "": nothing."""
        now = time.monotonic()
        for process in range(1 if self._index == 0 else 0, self._count if self._index == 0 else 1):
            beat, since = self._beats.get(process, ("", now))
            if beats.get(process, "") != beat or process not in self._beats:
                self._beats[process] = (beats.get(process, ""), now)
            elif now - since > self._heartbeat_timeout:
                return f"process {process} is gone, no sign of it for {self._heartbeat_timeout:g} s; {_AGAIN}"
        if self._index or len(beats) < self._count:
            return ""
        _, begun, done = zip(*(json.loads(beats[process]) for process in range(self._count)), strict=True)
        if sum(done) != self._all_done[0]:
            self._all_done = (sum(done), now)
        elif sum(done) and now - self._all_done[1] > self._step_timeout:
            behind = [str(process) for process in range(self._count) if begun[process] < max(begun)]
            where = f"process {', '.join(behind)} did not begin step {max(begun)}, which the others wait in"
            where = where if behind else f"all processes wait in step {max(begun)} or in what comes after it"
            return f"nothing was finished for {self._step_timeout:g} s: {where}; {_AGAIN}"
        return ""

    def _read(self, folder: str) -> dict[str, str]:
        return {key.removeprefix(folder): value for key, value in self._client.key_value_dir_get(folder)}

    def _publish(self, name: str, value: str) -> None:
        """As news, unless there is such news."""
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self._client.key_value_set(f"zoo/news/{name}", value)


def _leave(code: int, message: str) -> NoReturn:
    """At once: the run's thread may wait in the device for what never comes."""
    with contextlib.suppress(OSError):
        if sys.stdout.isatty():
            sys.stdout.write("\x1b[?25h")  # the cursor, which a live line hides
        sys.stdout.flush()
        print(f"error: {printable(message)}", file=sys.stderr, flush=True)
    os._exit(code)
