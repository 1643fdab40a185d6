"""Sources of text: the standard library's own, and the user's files.

A source is a list of documents in a fixed order and a rule that says which of them are for validation:

- `stdlib`: the running Python's standard library (its .py files without test folders) and pydoc's topics, split by a
  hash of the file's path. Every machine has it; its content depends on the Python version, so its fingerprint stands
  beside every figure.
- a path or glob (`~` and `**` work): split by a hash of each document's content, or, where there are too few
  documents for that, at a token near the end (`zoo.data.cache` does it).
"""

import dataclasses
import glob
import hashlib
import itertools
import os
import pathlib
import sysconfig
from collections.abc import Iterator

from zoo.data import readers
from zoo.data.readers import Document
from zoo.errors import UsageError

STDLIB = "stdlib"
_SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
_HASHED_WHOLE = 64 << 20  # bytes; larger files are known by path, size and time of change
_EXPECTED_VALIDATION_DOCUMENTS = 8  # fewer expected: the split by document is too uneven


@dataclasses.dataclass(frozen=True)
class Source:
    """One entry of data.source."""

    spec: str
    text_field: str
    paths: tuple[str, ...] = ()  # none for stdlib

    def documents(self) -> Iterator[Document]:
        """All documents, training and validation, in a fixed order. Memory: one piece of one document.

        Raises:
          UsageError: a file breaks its format.
        """
        if self.spec == STDLIB:
            yield from _stdlib()
        for path in self.paths:
            yield from readers.documents(path, self.text_field)

    def pieces(self, utf8: bool) -> Iterator[tuple[Document, bool, bytes]]:
        """The documents' pieces, and whether each is its document's first. Documents without content are left out.

        Args:
          utf8: whether the text must be UTF-8.

        Raises:
          UsageError: as `documents`, and for text that is not UTF-8; names file and byte.
        """
        for document in self.documents():
            offset = 0
            for piece in document.pieces:
                if utf8:
                    _check_utf8(document.name, piece, offset)
                yield document, offset == 0, piece
                offset += len(piece)

    def identity(self) -> str:
        """A hash that changes when the text may have changed: of the files' content, or of path, size and time of
        change for files over 64 MiB."""
        digest = hashlib.sha256(f"{self.text_field}\0".encode())
        if self.spec == STDLIB:
            for document in _stdlib():
                digest.update(hashlib.sha256(document.split_key).digest())
                digest.update(hashlib.sha256(b"".join(document.pieces)).digest())
        for path in self.paths:
            status = os.stat(path)
            digest.update(f"{readers.file_format(path)} {pathlib.PurePath(path).suffix} {status.st_size}\0".encode())
            if status.st_size <= _HASHED_WHOLE:
                with open(path, "rb") as file:
                    digest.update(hashlib.file_digest(file, "sha256").digest())
            else:
                digest.update(f"{os.path.realpath(path)} {status.st_mtime_ns}\0".encode())
        return digest.hexdigest()

    def has_few_documents(self, fraction: float) -> bool:
        """Whether `fraction` of the documents may be none at all."""
        needed = int(_EXPECTED_VALIDATION_DOCUMENTS / fraction)
        return sum(1 for _ in itertools.islice(self.documents(), needed)) < needed


def in_validation(split_key: bytes, fraction: float) -> bool:
    """Whether a document belongs to the validation split: true for about `fraction` of all keys."""
    return int.from_bytes(hashlib.sha256(split_key).digest()[:8], "big") < fraction * 2**64


def find(spec: str, text_field: str, setting: str = "data.source") -> Source:
    """The source that one entry of `setting` means.

    Raises:
      UsageError: no such file, a glob that matches nothing, a directory, a file without content, or a kind of source
        that is not there yet.
    """
    if spec == STDLIB:
        return Source(STDLIB, text_field)
    if spec.startswith("hf:"):
        raise UsageError(
            f"{setting}: {spec!r}: streaming from the Hugging Face hub is not built yet; download the data set as "
            f"jsonl or parquet files and give their path, such as {setting}='data/*.parquet'"
        )
    path = os.path.expanduser(spec)
    if os.path.isdir(path):
        raise UsageError(f"{setting}: {spec!r} is a directory; give a file or a glob, such as {spec.rstrip('/')}/*.txt")
    if os.path.exists(path):
        paths = [path]
    elif glob.has_magic(path):
        paths = sorted(p for p in glob.glob(path, recursive=True) if not os.path.isdir(p))
        if not paths:
            raise UsageError(f"{setting}: no file matches {spec!r}; check the pattern")
    else:
        raise UsageError(f"{setting}: no file {spec!r}; expected `stdlib`, a path or a glob")
    for path in paths:
        if not os.access(path, os.R_OK):
            raise UsageError(f"{setting}: {path!r} may not be read; check its permissions")
    if not any(os.path.getsize(path) for path in paths):
        raise UsageError(f"{setting}: {spec!r} is empty; expected text")
    return Source(spec, text_field, tuple(paths))


def find_all(source: str, text_field: str, setting: str = "data.source") -> list[Source]:
    """The sources of a comma-separated list.

    Raises:
      UsageError: as `find`, and for an empty list.
    """
    specs = [spec.strip() for spec in source.split(",") if spec.strip()]
    if not specs:
        raise UsageError(f"{setting}: got nothing; expected `stdlib`, or a comma-separated list of paths and globs")
    return [find(spec, text_field, setting) for spec in specs]


def _stdlib() -> Iterator[Document]:
    root = pathlib.Path(sysconfig.get_path("stdlib"))
    texts = {}
    for folder, folders, files in os.walk(root):
        # A build's own settings (config-3.11-x86_64-linux-gnu, _sysconfigdata_*) differ between machines.
        folders[:] = [name for name in folders if name not in _SKIPPED_FOLDERS and not name.startswith("config-")]
        for name in files:
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


def _check_utf8(name: str, piece: bytes, offset: int) -> None:
    try:
        piece.decode()
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{name}: not UTF-8 at byte {offset + error.start}; convert the file (iconv -t utf-8), or train on its "
            "bytes with data.tokenizer=bytes"
        ) from error


def _is_utf8(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True
