"""The digest of a checkpoint: sha256 of each of its files, and its evaluation loss."""

import hashlib
import json
import math
import os
import pathlib
import stat
from typing import NamedTuple

from zoo import files, processes

DIGEST = "DIGEST.json"
LARGEST = 64 << 20  # bytes of a DIGEST.json


class Digest(NamedTuple):
    """What DIGEST.json holds."""

    loss: float | None  # on the evaluation, nats per token
    files: dict[str, str]  # sha256 by name, "params/manifest.ocdbt"


def write_digest(path: pathlib.Path, loss: float | None) -> None:
    """Declare the checkpoint at `path` complete: sha256 of every file, and its evaluation loss."""
    digests = {}
    for name in sorted(_sizes(path)):
        if name != DIGEST:
            digests[name] = _sha256(path / name)
            processes.done()  # all of them may take longer than a step may
    files.write(path / DIGEST, json.dumps(Digest(loss, digests)._asdict(), indent=1))


def read_digest(path: pathlib.Path) -> Digest:
    """Of the checkpoint at `path`. Raises ValueError, or OSError, if it is damaged or the loss in it is not finite."""
    found = files.read_json(path / DIGEST, LARGEST)
    if not isinstance(found, dict) or not isinstance(found.get("files"), dict) or not found["files"]:
        raise ValueError(f"{DIGEST} holds no digests")
    loss = found.get("loss")
    if loss is not None and not (type(loss) in (int, float) and math.isfinite(loss)):
        raise ValueError(f"its evaluation loss is {loss!r}")
    return Digest(loss, found["files"])


def recorded_loss(path: pathlib.Path) -> float | None:
    """Of the checkpoint at `path`, nats per token; None: it was not evaluated, or is damaged."""
    try:
        return read_digest(path).loss
    except (ValueError, OSError):
        return None


def fingerprint(path: pathlib.Path) -> str:
    """Of the parameters of the checkpoint at `path`."""
    parameters = sorted(item for item in read_digest(path).files.items() if item[0].startswith("params/"))
    return hashlib.sha256(json.dumps(parameters).encode()).hexdigest()


def verify(path: pathlib.Path, limit: int | None = None, only: str = "", share: tuple[int, int] = (0, 1)) -> None:
    """Raise ValueError if a file of the checkpoint is missing, differs from its digest, or is no file inside it.

    Args:
      limit: bytes that all files together may have; None: any number.
      only: what the names of the files begin with; others are not read.
      share: (i, n): of the files, those that process i of n reads.
    """
    recorded, sizes = read_digest(path).files, _sizes(path)
    if limit is not None and sum(sizes.values()) > limit:
        raise ValueError(f"it holds {sum(sizes.values()):,} bytes, more than a model of this size has")
    for name, digest in sorted(recorded.items())[share[0] :: share[1]]:
        if not name.startswith(only):
            continue
        if name not in sizes:
            raise ValueError(f"{name} is missing")
        if _sha256(path / name) != digest:
            raise ValueError(f"{name} differs from its digest")


def _sizes(path: pathlib.Path) -> dict[str, int]:
    """Bytes of every file below `path`. ValueError for what is no regular file: Orbax would follow it, or wait."""
    found = {}
    for root, folders, names in os.walk(path):
        for name in [*folders, *names]:
            status = os.lstat(os.path.join(root, name))
            if stat.S_ISREG(status.st_mode):
                found[os.path.relpath(os.path.join(root, name), path)] = status.st_size
            elif not stat.S_ISDIR(status.st_mode):
                raise ValueError(f"{name} is no regular file")
    return found


def _sha256(path: pathlib.Path) -> str:
    with files.open_regular(path) as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
