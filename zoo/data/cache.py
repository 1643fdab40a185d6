"""Text tokenized once, in memory-mapped files.

One folder of `data.cache_dir` per source, tokenizer and split rule, named by a hash of the three (of the text itself,
so that an edited file gets a new one). It holds one stream of tokens per split:

    <split>.tokens      uint16 or uint32 [N]: separator, document, separator, document, ..., separator
    <split>.starts      uint64 [documents]: where each document's separator is
    <split>.scales      float32 [documents]: bytes of text per `tokenizer.token_bytes`; 1 where that table is exact
    header.json         sizes, checksums, counts, and a hash of the text

A folder is written under another name and renamed, so that a reader sees a whole one or none, and two writers do no
harm. Opening checks the sizes and a checksum (of samples, if a file is over 64 MiB).
"""

import contextlib
import fcntl
import json
import os
import pathlib
import shutil
import socket
import tempfile
import zlib
from collections.abc import Iterator

import numpy as np

from zoo import files
from zoo.data.corpora import STDLIB, Source
from zoo.data.streams import ARRAYS, Stream, content_hash, dtype_of, write_split_at_tail, write_streams
from zoo.data.tokenizer import Tokenizer
from zoo.errors import UsageError, warn

_VERSION = 2
_LARGEST_HEADER = 1 << 16  # bytes


def default_folder() -> pathlib.Path:
    """$XDG_CACHE_HOME/sequence-zoo, or ~/.cache/sequence-zoo."""
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "sequence-zoo"


def root_of(cache_dir: str) -> pathlib.Path:
    """Of the setting data.cache_dir."""
    return pathlib.Path(files.expand(cache_dir)) if cache_dir else default_folder()


def unwritable(root: pathlib.Path, error: OSError) -> UsageError:
    return UsageError(
        f"data.cache_dir: cannot write the token cache to {root}: {error.strerror or error}; free some space "
        "there, or set data.cache_dir to another folder"
    )


def open_streams(source: Source, tokenizer: Tokenizer, fraction: float, cache_dir: str = "") -> dict[str, Stream]:
    """The streams of a source, tokenized now if no run did it before.

    Args:
      fraction: of the documents that form the stream "validation"; 0: all form the stream "train".

    Returns:
      {"train": ..., "validation": ...}; without the second if fraction is 0.

    Raises:
      UsageError: no text, text that the tokenizer cannot take, a folder that cannot be written, or a file that is
        written to meanwhile.
    """
    root, stamp = root_of(cache_dir), source.stamp()
    folder = (
        root / content_hash(_VERSION, source.identity(), source.spec == STDLIB, tokenizer.fingerprint, fraction)[:32]
    )
    if (streams := _open(folder)) is not None:
        return streams
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _only_writer(folder):
            if (streams := _open(folder)) is None:  # nobody wrote it while this process waited
                if folder.exists():
                    warn(f"the token cache {folder} is damaged; it is written anew")
                _write(folder, source, tokenizer, fraction, stamp)
                streams = _open(folder)
    except OSError as error:
        raise unwritable(root, error) from error
    if streams is None:
        raise UsageError(f"data.cache_dir: {root} does not keep what is written to it; choose another folder")
    return streams


# --- Reading ----------------------------------------------------------------------------------------------------------


def _open(folder: pathlib.Path) -> dict[str, Stream] | None:
    """None: not there, or damaged."""
    try:
        header = files.read_json(folder / "header.json", _LARGEST_HEADER)
        if header["checksum"] != _checksum_of(header["streams"]):
            return None
        streams = {}
        for split, about in header["streams"].items():
            arrays = {}
            for name in ARRAYS:
                path, dtype = folder / f"{split}.{name}", about[name]["dtype"]
                if path.stat().st_size != about[name]["bytes"] or _sampled_checksum(path) != about[name]["checksum"]:
                    return None
                arrays[name] = np.asarray(np.memmap(path, dtype, mode="r"))  # plain views are faster to slice
            stream = streams[split] = Stream(**arrays, **about["counts"])
            counts = [stream.text_bytes, stream.lost_bytes, stream.max_id]
            if not all(type(count) is int and count >= 0 for count in counts):
                return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return streams


def _checksum_of(about: dict) -> int:
    return zlib.crc32(json.dumps(about, sort_keys=True).encode())


def _sampled_checksum(path: pathlib.Path, samples: int = 64, width: int = 1 << 20) -> int:
    """Of the whole file up to 64 MiB, else of evenly spaced samples, both ends among them."""
    size, checksum = path.stat().st_size, 0
    with files.open_regular(path) as file:
        if size <= samples * width:
            return zlib.crc32(file.read())
        for n in range(samples):
            file.seek((size - width) * n // (samples - 1))
            checksum = zlib.crc32(file.read(width), checksum)
    return checksum


# --- Writing ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _only_writer(folder: pathlib.Path) -> Iterator[None]:
    """Waits for another process that writes the same folder. Saves work; file systems without locks do without."""
    with open(folder.with_suffix(".lock"), "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:
            yield
            return
        for left in folder.parent.glob(f"{folder.name}.{socket.gethostname()}.*.partial"):
            shutil.rmtree(left, ignore_errors=True)  # its writer was killed: who holds the lock is the only one here
        yield


def _write(folder: pathlib.Path, source: Source, tokenizer: Tokenizer, fraction: float, stamp: list) -> None:
    prefix, suffix = f"{folder.name}.{socket.gethostname()}.", ".partial"
    partial = pathlib.Path(tempfile.mkdtemp(prefix=prefix, suffix=suffix, dir=folder.parent))
    try:
        by_tail = fraction > 0 and source.spec != STDLIB and source.has_few_documents(fraction)
        about = {} if by_tail else write_streams(partial, source, tokenizer, fraction)
        if fraction > 0 and len(about) < 2:
            about = write_split_at_tail(partial, source, tokenizer, fraction)
        if source.stamp() != stamp:  # the folder's name is a hash of what was there
            raise UsageError(f"data.source: files of {source.spec!r} changed while they were read; start again")
        for split, counts in about.items():
            about[split] = _describe(partial, split, counts, tokenizer)
        (partial / "header.json").write_text(json.dumps({"streams": about, "checksum": _checksum_of(about)}, indent=1))
        os.chmod(partial, 0o755)
        _rename(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _rename(partial: pathlib.Path, folder: pathlib.Path) -> None:
    if folder.exists() and _open(folder) is None:
        shutil.rmtree(folder)
    try:
        partial.rename(folder)
    except OSError:
        if _open(folder) is None:  # else another process was faster
            raise


def _describe(folder: pathlib.Path, split: str, counts: dict, tokenizer: Tokenizer) -> dict:
    about = {"counts": counts}
    for name in ARRAYS:
        path = folder / f"{split}.{name}"
        about[name] = {"dtype": dtype_of(name, tokenizer), "bytes": path.stat().st_size}
        about[name]["checksum"] = _sampled_checksum(path)
    return about
