"""Paths as people write them, and files that are whole or not there."""

import contextlib
import os
import pathlib

from zoo.errors import RunError


class WriteError(RunError):
    """A file of a run could not be written: a full disk, a folder that may not be written to."""

    def __init__(self, path: str | os.PathLike, error: OSError):
        super().__init__(f"{path} cannot be written ({error.strerror or error})")


def expand(path: str | os.PathLike) -> str:
    """`~` is the home folder, which shells leave alone after `=`. Every flag that names a path goes through this."""
    return os.path.expanduser(os.fspath(path))


def replace(path: pathlib.Path, content: str | bytes) -> None:
    """Write a file so that whoever reads it, also after a kill or a power cut, finds the old content or the new.

    Raises:
      WriteError: the old content stands.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise WriteError(path, error) from error
