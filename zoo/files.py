"""Files that others wrote: only regular ones are opened, none is waited for, none is read without a bound.

And files that others will read: JSON without NaN, whole or not there.
"""

import contextlib
import errno
import json
import math
import os
import pathlib
import secrets
import stat
from collections.abc import Iterator
from typing import Any, BinaryIO

from zoo.errors import RunError

_KINDS = {
    stat.S_IFDIR: "a directory", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device", stat.S_IFLNK: "a symbolic link",
}  # fmt: skip


class WriteError(RunError):
    """A file of a run could not be written: a full disk, a folder that may not be written to."""

    def __init__(self, path: str | os.PathLike, error: OSError):
        super().__init__(f"{path} cannot be written ({error.strerror or error})")


def expand(path: str | os.PathLike) -> str:
    """`~` is the home folder, which shells leave alone after `=`. Every flag that names a path goes through this."""
    return os.path.expanduser(os.fspath(path))


# --- Reading ----------------------------------------------------------------------------------------------------------


def check_regular(status: os.stat_result) -> None:
    """OSError if `status` is of anything but a regular file, which to open may block, or do something."""
    if not stat.S_ISREG(status.st_mode):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "no file")
        raise OSError(errno.EINVAL, f"it is {kind}, expected a regular file")


def open_regular(path: str | os.PathLike) -> BinaryIO:
    """A file to read. OSError for a FIFO, socket, device or directory, at once."""
    try:
        check_regular(os.stat(path))
    except ValueError as error:  # a name with a NUL in it
        raise OSError(errno.EINVAL, f"it is no path: {error}") from error
    file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    try:
        check_regular(os.fstat(file.fileno()))  # it may be another one by now
    except OSError:
        file.close()
        raise
    return file


def inside(path: str | os.PathLike) -> str | os.PathLike:
    """`path`, of a folder that others made. OSError where it is a link out of that folder: what it names may be no
    part of what was handed over. A snapshot in the Hugging Face hub's cache has its files in ../../blobs.
    """
    folder, real = (os.path.realpath(name) for name in (os.path.dirname(path) or ".", path))
    above, snapshots = os.path.split(os.path.dirname(folder))
    blobs = [os.path.join(above, "blobs")] if snapshots == "snapshots" else []
    if os.path.dirname(real) not in blobs and os.path.commonpath([folder, real]) != folder:
        raise OSError(errno.EXDEV, "it is a link out of its folder; put a copy in its place")
    return path


def read_bytes(path: str | os.PathLike, limit: int | None) -> bytes:
    """The content of a regular file of at most `limit` bytes (None: any number). OSError for others."""
    with open_regular(path) as file:
        content = file.read(-1 if limit is None else limit + 1)
    if limit is not None and len(content) > limit:
        raise OSError(errno.EFBIG, f"it is larger than {limit:,} bytes")
    return content


def read_json(path: str | os.PathLike, limit: int) -> Any:
    """JSON of at most `limit` bytes.

    Raises:
      OSError: as `read_bytes`.
      ValueError: not JSON, or nested too deeply to read.
    """
    try:
        return json.loads(read_bytes(path, limit))
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


# --- Writing ----------------------------------------------------------------------------------------------------------


def to_json(value: Any, indent: int | None = None) -> str:
    """Strict JSON: what is not finite becomes null, since NaN is no JSON."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """A new file beside `path`, which becomes `path` when all went well: whoever reads it, also after a kill or a power
    cut, finds the old content or the new. A link that stood there is not followed.

    Raises:
      OSError: the old content stands.
    """
    path = pathlib.Path(path)
    temporary = path.parent / f".{path.stem[:32]}.{secrets.token_hex(4)}{path.suffix}"  # plots go by the suffix
    temporary.touch(exist_ok=False)
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        with contextlib.suppress(OSError):  # it became `path`, or its folder is gone
            temporary.unlink()


def write(path: str | os.PathLike, content: str | bytes) -> None:
    """`replacing` by `content`, for a file of a run.

    Raises:
      WriteError: the old content stands.
    """
    try:
        with replacing(path) as temporary:
            temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    except OSError as error:
        raise WriteError(path, error) from error
