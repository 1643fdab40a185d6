"""Where texts go: to a terminal as they are made, or as JSON lines as they are finished."""

import hashlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

from zoo import files
from zoo.errors import UsageError
from zoo.terminal import printable

STDOUT = "-"


class Finished(NamedTuple):
    """A text that has ended."""

    text: str
    ended: str
    tokens: int
    logprobs: list[dict[str, Any]]  # of each token, if they were asked for


class Output(Protocol):
    """Hears of texts, by number."""

    def piece(self, number: int, text: str) -> None:
        """What is certain of a text now."""

    def finish(self, number: int, finished: Finished) -> None: ...


class Printer(Output):
    """Prompts and what follows them, in their order: the first that is not finished as it is made, since there is one
    cursor; the others are kept until it is their turn."""

    def __init__(self, count: int, heading: Callable[[int], str], raw: bool = False):
        """`heading(n)`: what stands before text n, its prompt included."""
        self._count, self._heading, self._raw = count, heading, raw
        self._current = 0
        self._kept: dict[int, list[str]] = {}
        self._finished: set[int] = set()
        self._write(self._heading(0))

    def piece(self, number: int, text: str) -> None:
        if number == self._current:
            self._write(text)
        else:
            self._kept.setdefault(number, []).append(text)

    def finish(self, number: int, _: Finished) -> None:
        self._finished.add(number)
        while self._current in self._finished:
            self._write("\n")
            self._current += 1
            if self._current < self._count:
                self._write(self._heading(self._current) + "".join(self._kept.pop(self._current, [])))

    def _write(self, text: str) -> None:
        sys.stdout.write(text if self._raw else printable(text))
        sys.stdout.flush()


class JsonLines(Output):
    """A line for each text that is finished, written at once: a kill loses none. What the file has already is not
    written again, so that the same command goes on where one was stopped.

    Raises:
      UsageError: a file that cannot be read, or holds something else than results of the same requests.
    """

    def __init__(self, path: str, keys: Sequence[str], record: Callable[[int], dict[str, Any]]):
        """`keys`: of each text, `key` of all that it depends on; `record(n)`: what is said of text n beside it."""
        self._path, self._keys, self._record = path, keys, record
        self.done: set[int] = set()
        if path == STDOUT:
            return
        try:
            if os.path.lexists(path):
                files.check_regular(os.stat(path))
                self._resume({key: number for number, key in enumerate(keys)})
            open(path, "ab").close()
        except OSError as error:
            raise UsageError(f"--output: {path!r} cannot be written ({error.strerror}); name another file") from error

    def _resume(self, numbers: dict[str, int]) -> None:
        whole = 0
        with open(self._path, "r+b") as file:
            for n, line in enumerate(file, 1):
                if not line.endswith(b"\n"):  # cut off by a kill
                    file.truncate(whole)
                    return
                whole += len(line)
                self.done.add(self._number(numbers, line, n))

    def _number(self, numbers: dict[str, int], line: bytes, n: int) -> int:
        try:
            return numbers[json.loads(line)["key"]]
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise UsageError(
                f"--output: {self._path!r}, line {n}, is no result of these prompts, settings and parameters; "
                "name another file, or delete it"
            ) from error

    def piece(self, number: int, text: str) -> None:
        pass

    def finish(self, number: int, finished: Finished) -> None:
        record = {"key": self._keys[number], **self._record(number), "text": finished.text}
        record |= {"ended": finished.ended, "tokens": finished.tokens}
        if finished.logprobs:
            record["logprobs"] = finished.logprobs
        line = files.to_json(record) + "\n"
        if self._path == STDOUT:
            sys.stdout.write(line)
            sys.stdout.flush()
            return
        try:
            with open(self._path, "ab") as file:
                file.write(line.encode())
        except OSError as error:
            raise files.WriteError(self._path, error) from error


def key(*values: Any) -> str:
    """A short name of all that a text depends on."""
    return hashlib.sha256(files.to_json(values).encode()).hexdigest()[:16]
