"""Calls into the tokenizers library that end: in time, and in one line where they fail.

Its Rust code panics for what a tokenizer.json may say. A panic is no `Exception`, and writes a stack to the standard
error before Python sees it. A regular expression that backtracks may take for ever.
"""

import contextlib
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

from zoo.errors import UsageError

T = TypeVar("T")

_SECONDS, _SECONDS_PER_CHARACTER = 30.0, 30.0 / (1 << 20)  # a hundred times what ordinary text takes


@contextlib.contextmanager
def errors(what: str, quiet: bool = True) -> Iterator[None]:
    """UsageError "`what`: reason" for whatever the library raises, panics too.

    Args:
      quiet: leave nothing of a panic on the terminal; it costs as much as opening a file.
    """
    failed = None
    with _held_back_stderr() if quiet else contextlib.nullcontext(lambda: None) as discard:
        try:
            yield
        except UsageError:
            raise
        except BaseException as error:
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            discard()
            failed = error
    if failed is not None:
        lines = str(failed).strip().splitlines() or [type(failed).__name__]
        raise UsageError(f"{what}: {lines[0][:200]}") from failed


def bounded(call: Callable[[], T], size: int) -> T:
    """`call()`, given up after a time that grows with the characters of text it is for.

    Raises:
      UsageError: it took longer, or the library failed.
    """
    outcome: list[T] = []
    failure: list[BaseException] = []

    def work() -> None:
        try:
            outcome.append(call())
        except BaseException as error:
            failure.append(error)

    seconds = _SECONDS + size * _SECONDS_PER_CHARACTER
    with errors("data.tokenizer: the text cannot be tokenized"):
        thread = threading.Thread(target=work, daemon=True)  # it cannot be stopped, and shall keep no exit waiting
        thread.start()
        thread.join(seconds)
        if failure:
            raise failure[0]
    if not outcome:
        raise UsageError(
            f"data.tokenizer: {size:,} characters were not tokenized within {seconds:.0f} s; a regular expression of "
            "its pre_tokenizer or normalizer seems to backtrack. Simplify it, or use another tokenizer"
        )
    return outcome[0]


@contextlib.contextmanager
def _held_back_stderr() -> Iterator[Callable[[], None]]:
    """Keeps what is written to file descriptor 2, and writes it at the end unless it is discarded."""
    try:
        kept = os.dup(2)
    except OSError:  # it is closed
        yield lambda: None
        return
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield lambda: held.truncate(0)
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            held.seek(0)
            if text := held.read():
                os.write(2, text)
