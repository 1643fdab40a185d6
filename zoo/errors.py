"""The two ways a command ends badly, and a warning. A message says what was wrong, what was expected and what to do."""

import contextlib
import os
import select
import sys
from collections.abc import Iterator
from typing import NoReturn

from zoo.terminal import one_line, printable


class UsageError(ValueError):
    """What the user asked for cannot be done as asked: exit code 2."""


class RunError(RuntimeError):
    """The run failed: exit code 1."""


def ended_by(error: BaseException) -> tuple[bool, int, str]:
    """Whether it is one of the two errors, or Ctrl-C; the exit code that it means, and what to say."""
    for kind, code in ((UsageError, 2), (RunError, 1), (KeyboardInterrupt, 130)):  # 128 + SIGINT, as shells count
        if isinstance(error, kind):
            return True, code, str(error) or "interrupted"
    return False, 1, f"{type(error).__name__}: {error}".splitlines()[0][:300]


def warn(message: str) -> None:
    """Say what was wrong and does not stop anything."""
    print(f"warning: {one_line(message)}", file=sys.stderr)


@contextlib.contextmanager
def until_nobody_reads() -> Iterator[None]:
    """Whoever reads stdout and has seen enough (`| head`) ends the command without a word, as it ends others."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        stdout = select.poll()
        stdout.register(sys.stdout.fileno(), 0)
        if not stdout.poll(0):  # it was another pipe
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python flushes at its end
        sys.exit(141)  # 128 + SIGPIPE


@contextlib.contextmanager
def exit_with_message(*, at_once: bool = False) -> Iterator[None]:
    """Turn the two errors, and Ctrl-C, into one line on stderr and an exit code; other errors keep their traceback.

    Args:
      at_once: a run that failed ends without waiting for its threads. After a save that failed, those of Orbax wait ten
        minutes for what never comes, and Python's shutdown waits for them.
    """
    try:
        yield
    except (UsageError, RunError, KeyboardInterrupt) as error:
        _, code, message = ended_by(error)
        message = "\ninterrupted" if isinstance(error, KeyboardInterrupt) else f"error: {printable(message)}"
        _exit(code, message, at_once and not isinstance(error, UsageError))


def _exit(code: int, message: str, at_once: bool) -> NoReturn:
    print(message, file=sys.stderr)
    if not at_once:
        sys.exit(code)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(code)
