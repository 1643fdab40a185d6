"""Sources of text: the standard library's own, the user's files, data sets of the Hugging Face hub.

A source is a list of documents in a fixed order and a rule that says which of them are for validation:

- `stdlib`: the running Python's standard library (its .py files without test folders) and pydoc's topics, split by a
  hash of the file's path. Every machine has it; its content depends on the Python version, so its fingerprint stands
  beside every figure.
- `hf:NAME`: a data set of the Hugging Face hub (`zoo.data.hub`), split as files are.
- a path or glob (`~` and `**` work): split by a hash of each document's content, or, where there are too few
  documents for that, at a token near the end (`zoo.data.cache` does it).
"""

import dataclasses
import glob
import hashlib
import itertools
import json
import os
import pathlib
import sys
import sysconfig
from collections.abc import Iterator

from zoo import files
from zoo.data import hub, readers
from zoo.data.hub import HubText
from zoo.data.readers import Document
from zoo.errors import UsageError
from zoo.terminal import one_line

STDLIB = "stdlib"
_SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
_HASHED_WHOLE = 64 << 20  # bytes; larger files are known by path, size and time of change
_EXPECTED_VALIDATION_DOCUMENTS = 8  # fewer expected: the split by document is too uneven


@dataclasses.dataclass(frozen=True)
class Source:
    """One entry of data.source."""

    spec: str
    text_field: str
    paths: tuple[str, ...] = ()  # none for stdlib and the hub
    inodes: frozenset[tuple[int, int]] = frozenset()  # device and number of each file
    hub: HubText | None = None

    def documents(self) -> Iterator[Document]:
        """All documents, training and validation, in a fixed order. Memory: one piece of one document.

        Raises:
          UsageError: a file breaks its format.
        """
        if self.spec == STDLIB:
            yield from _stdlib()
        for number, text in enumerate(self.hub.rows(self.text_field) if self.hub else ()):
            yield readers.text_document(f"{one_line(self.spec)}: row {number}", text)
        for path in self.paths:
            yield from readers.documents(path, self.text_field)

    def texts(self, utf8: bool) -> Iterator[tuple[str, bytes, Iterator[bytes]]]:
        """The documents that have content: name, what decides their split, and their pieces, which must be read before
        the next document is asked for.

        Args:
          utf8: whether the text must be UTF-8.

        Raises:
          UsageError: as `documents`, and for text that is not UTF-8; names file and byte.
        """
        for document in self.documents():
            pieces = _checked(document) if utf8 else iter(document.pieces)
            if first := next(pieces, b""):
                yield document.name, document.split_key or first, itertools.chain([first], pieces)

    def identity(self) -> str:
        """A hash that changes when the text may have changed: of the files' content, or of path, size and time of
        change for files over 64 MiB; of the hub's commit, and what is read of it."""
        digest = hashlib.sha256(f"{self.text_field}\0".encode())
        if self.spec == STDLIB:
            for document in _stdlib():
                digest.update(hashlib.sha256(document.split_key).digest())
                digest.update(hashlib.sha256(b"".join(document.pieces)).digest())
        if self.hub:
            digest.update(json.dumps(dataclasses.astuple(self.hub)).encode())
        for path in self.paths:
            with readers.read_errors(path), files.open_regular(path) as file:
                status = os.fstat(file.fileno())
                kind = f"{readers.file_format(path)} {pathlib.PurePath(path).suffix} {status.st_size}\0"
                digest.update(os.fsencode(kind))
                if status.st_size <= _HASHED_WHOLE:
                    digest.update(hashlib.file_digest(file, "sha256").digest())
                else:
                    digest.update(os.fsencode(f"{os.path.realpath(path)} {status.st_mtime_ns}\0"))
        return digest.hexdigest()

    def stamp(self) -> list[tuple[int, ...]]:
        """Changes when a file is written to, replaced or deleted."""
        return [_stamp(path) for path in self.paths]

    def overlaps(self, other: "Source") -> bool:
        """Whether a file, whatever its name, or a split of a data set, is in both."""
        if self.hub and other.hub:
            return dataclasses.replace(self.hub, take=None) == dataclasses.replace(other.hub, take=None)
        return bool(self.inodes & other.inodes) or self.spec == other.spec == STDLIB

    def has_few_documents(self, fraction: float) -> bool:
        """Whether `fraction` of the documents may be none at all."""
        needed = int(min(_EXPECTED_VALIDATION_DOCUMENTS / fraction, sys.maxsize))
        return sum(1 for _ in itertools.islice(self.documents(), needed)) < needed


def in_validation(split_key: bytes, fraction: float) -> bool:
    """Whether a document belongs to the validation split: true for about `fraction` of all keys."""
    return int.from_bytes(hashlib.sha256(split_key).digest()[:8], "big") < fraction * 2**64


def find(spec: str, text_field: str, setting: str = "data.source") -> Source:
    """The source that one entry of `setting` means.

    Raises:
      UsageError: no such file, a glob that matches nothing, a directory, a file without content, or as `hub.find`.
    """
    if spec == STDLIB:
        return Source(STDLIB, text_field)
    if spec.startswith(hub.PREFIX):
        return Source(spec, text_field, hub=hub.find(spec, setting))
    found = regular_files(spec, setting, "`stdlib`, hf:NAME, a path or a glob")
    for path in found.values():
        readers.file_format(path)
    return Source(spec, text_field, tuple(found.values()), frozenset(found))


def regular_files(spec: str, setting: str, expected: str) -> dict[tuple[int, int], str]:
    """The files of a path or glob in order, by device and number: one of several names is one.

    Raises:
      UsageError: no such file, a glob that matches nothing, a directory, a file that cannot be read, or no content.
    """
    path = files.expand(spec)
    if os.path.isdir(path):
        raise UsageError(f"{setting}: {spec!r} is a directory; give a file or a glob, such as {spec.rstrip('/')}/*.txt")
    if os.path.lexists(path):
        paths = [path]
    elif glob.has_magic(path):
        paths = sorted(p for p in _expand(path) if not os.path.isdir(p))
        if not paths:
            raise UsageError(f"{setting}: no file matches {spec!r}; check the pattern")
    else:
        raise UsageError(f"{setting}: no file {spec!r}; expected {expected}")
    size, kept = 0, {}
    for path in paths:
        try:
            status = os.stat(path)
            files.check_regular(status)
        except OSError as error:
            raise UsageError(
                f"{setting}: {path!r} cannot be read: {error.strerror}; name another, or remove it"
            ) from error
        if not os.access(path, os.R_OK):
            raise UsageError(f"{setting}: {path!r} may not be read; check its permissions")
        size += status.st_size
        kept.setdefault((status.st_dev, status.st_ino), path)
    if size == 0:
        raise UsageError(f"{setting}: {spec!r} is empty; expected content")
    return kept


def _expand(pattern: str) -> list[str]:
    """The matches of a glob; links to folders are followed for `**` too, but none twice, so that loops end."""
    parts = pattern.split(os.sep)
    if "**" not in parts:
        return glob.glob(pattern)
    at = parts.index("**")
    start, rest = os.sep.join(parts[:at]) or (os.sep if at else ""), os.sep.join(parts[at + 1 :]) or "*"
    found, seen = set(), set()
    for root in glob.glob(start) if start else [""]:
        for folder, folders, _ in os.walk(root or ".", followlinks=True):
            if (real := os.path.realpath(folder)) in seen:
                folders.clear()
                continue
            seen.add(real)
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            folder = os.path.relpath(folder) if not root else folder
            found.update(_expand(os.path.join(glob.escape(folder), rest) if folder != "." else rest))
    return sorted(found)


def find_all(source: str, text_field: str, setting: str = "data.source") -> list[Source]:
    """The sources of a comma-separated list.

    Raises:
      UsageError: as `find`, and for an empty list.
    """
    specs = [spec.strip() for spec in source.split(",") if spec.strip()]
    if not specs:
        raise UsageError(f"{setting}: got nothing; expected `stdlib`, or a comma-separated list of paths and globs")
    sources = [find(spec, text_field, setting) for spec in specs]
    for one, other in itertools.combinations(sources, 2):
        if one.overlaps(other):
            raise UsageError(
                f"{setting}: {one.spec!r} and {other.spec!r} read the same text, and may split it differently; name it "
                "once (data.weights weigh sources)"
            )
    return sources


def _stdlib() -> Iterator[Document]:
    root = pathlib.Path(sysconfig.get_path("stdlib"))
    texts = {}
    for folder, folders, names in os.walk(root):
        # A build's own settings (config-3.11-x86_64-linux-gnu, _sysconfigdata_*) differ between machines.
        folders[:] = [name for name in folders if name not in _SKIPPED_FOLDERS and not name.startswith("config-")]
        for name in names:
            path = pathlib.Path(folder, name).relative_to(root).as_posix()
            if name.endswith(".py") and not name.startswith("_sysconfigdata") and path != "pydoc_data/topics.py":
                texts[path] = (root / path).read_bytes()
    from pydoc_data.topics import topics  # 0.7 MB that only this corpus needs

    texts.update((f"pydoc_data/topics/{name}", text.encode()) for name, text in topics.items())
    if len(texts) == len(topics):
        raise UsageError(f"data.source: this Python keeps no .py files in {root}; give a path or glob of your own text")
    for path, text in sorted(texts.items()):
        if _is_utf8(text):
            yield Document(f"{STDLIB}/{path}", [text] if text else [], split_key=path.encode())


def _checked(document: Document) -> Iterator[bytes]:
    offset = 0
    for piece in document.pieces:
        try:
            piece.decode()
        except UnicodeDecodeError as error:
            raise UsageError(
                f"{document.name}: not UTF-8 at byte {offset + error.start}; convert the file (iconv -t utf-8), or "
                "train on its bytes with data.tokenizer=bytes"
            ) from error
        yield piece
        offset += len(piece)


def _stamp(path: str) -> tuple[int, ...]:
    try:
        status = os.stat(path)
    except OSError:
        return ()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _is_utf8(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True
