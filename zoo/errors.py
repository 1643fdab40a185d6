"""The two ways a command ends badly. A message says what was wrong, what was expected and what to do."""

import contextlib
import sys
from collections.abc import Iterator

from zoo.terminal import printable


class UsageError(ValueError):
    """What the user asked for cannot be done as asked: exit code 2."""


class RunError(RuntimeError):
    """The run failed: exit code 1."""


@contextlib.contextmanager
def exit_with_message() -> Iterator[None]:
    """Turn the two errors, and Ctrl-C, into one line on stderr and an exit code; other errors keep their traceback."""
    try:
        yield
    except UsageError as error:
        print(f"error: {printable(error)}", file=sys.stderr)
        sys.exit(2)
    except RunError as error:
        print(f"error: {printable(error)}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)  # 128 + SIGINT, as shells count
