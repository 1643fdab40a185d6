"""Turns typed at a terminal."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator

from zoo.errors import RunError, UsageError
from zoo.files import expand
from zoo.generate.session import Session
from zoo.terminal import printable

HELP = """\
A line is appended to the text as it is typed, and the model goes on from there; an empty one: it just goes on.
A line that ends in a backslash goes on, after a line end, in the next one; a line that begins with // begins with /.
/undo        back to before the last turn
/reset       begin a new document
/save FILE   the state, for --load_state
/help        this
Ctrl-C ends a turn, the end of input (Ctrl-D) ends all."""


def run(session: Session, write: Callable[[bytes], None], save: Callable[[str], None]) -> None:
    """Turns until input ends. `write` does one of what was typed; `save` keeps the state in a file."""
    for line in _lines():
        try:
            if line.startswith("/") and not line.startswith("//"):
                _obey(session, line, save)
            else:
                write(os.fsencode(line.removeprefix("/") if line.startswith("//") else line))
        except (UsageError, RunError) as error:
            print(f"error: {printable(error)}", file=sys.stderr)
        except KeyboardInterrupt:
            print("\ninterrupted; the text goes on from here", file=sys.stderr)


def _obey(session: Session, line: str, save: Callable[[str], None]) -> None:
    command, _, argument = line.partition(" ")
    match command, argument.strip():
        case "/undo", "":
            if not session.undo():
                raise UsageError("/undo: there is no turn before")
        case "/reset", "":
            session.reset()
        case "/help", "":
            print(HELP, file=sys.stderr)
        case "/save", path if path:
            save(expand(path))
        case _:
            raise UsageError(f"{line}: expected /undo, /reset, /save FILE or /help; text that begins with /: //")


def _lines() -> Iterator[str]:
    """What is typed, lines that go on as one."""
    is_terminal = sys.stdin.isatty()
    with contextlib.suppress(AttributeError):  # a notebook's
        sys.stdin.reconfigure(errors="surrogateescape")
    if is_terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # editing and history of input()
    kept: list[str] = []
    while True:
        try:
            line = input(("... " if kept else "> ") if is_terminal else "")
        except EOFError:
            break
        kept.append(line.removesuffix("\\"))
        if not line.endswith("\\"):
            yield "\n".join(kept)
            kept = []
    if kept:
        yield "\n".join(kept)
