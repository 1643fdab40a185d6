"""The stream of tokens that a split of a source is, and the writing of it.

separator, document, separator, document, ..., separator: as three arrays in files, of which readers map into memory
what they need. Writing holds a few megabytes of text at a time, so a corpus, and a document, may be larger than memory.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from zoo.data.corpora import Source, in_validation
from zoo.data.readers import PIECE_BYTES
from zoo.data.tokenizer import Tokenizer, cutting
from zoo.errors import UsageError

ARRAYS = ("tokens", "starts", "scales")
_ENCODED_AT_ONCE = 4 * PIECE_BYTES  # bytes of text: enough for the tokenizer's threads


def dtype_of(array: str, tokenizer: Tokenizer) -> str:
    """The dtype of one of `ARRAYS` in its file."""
    return {"tokens": _token_dtype(tokenizer), "starts": "uint64", "scales": "float32"}[array]


def content_hash(*parts: object) -> str:
    """SHA-256 of numbers and strings, in hexadecimal."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class Stream:
    """The tokens of one split of one source."""

    tokens: np.ndarray  # uint16 or uint32 [N], memory-mapped
    starts: np.ndarray  # uint64 [documents], memory-mapped
    scales: np.ndarray  # float32 [documents], memory-mapped
    text_bytes: int  # that tokens stand for
    lost_bytes: int  # of text that the tokenizer has no tokens for
    max_id: int
    fingerprint: str  # of the text

    @property
    def num_targets(self) -> int:
        """Tokens that can be predicted: all but the first separator."""
        return len(self.tokens) - 1

    def bytes_of(self, start: int, stop: int, token_bytes: np.ndarray) -> np.ndarray:
        """Bytes of text that tokens [start, stop) stand for, float32."""
        document = np.searchsorted(self.starts, np.arange(start, stop, dtype=np.uint64), side="right") - 1
        return token_bytes[self.tokens[start:stop]] * self.scales[document]


def _token_dtype(tokenizer: Tokenizer) -> str:
    return "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"


class _Writer:
    """Appends documents to one split's files."""

    def __init__(self, folder: pathlib.Path, split: str, tokenizer: Tokenizer, stack: contextlib.ExitStack):
        self._files = {name: stack.enter_context(open(folder / f"{split}.{name}", "wb")) for name in ARRAYS}
        self._tokenizer, self._dtype = tokenizer, _token_dtype(tokenizer)
        self._length = 0  # tokens
        self._units = self._bytes = self._lost = 0  # of the open document: the table's bytes, the text's, those lost
        self._digest, self._document_digest = hashlib.sha256(), None
        self.text_bytes = self.lost_bytes = self.max_id = 0

    def start_document(self) -> None:
        self._end_document()
        self._document_digest = hashlib.sha256()
        self._files["starts"].write(np.uint64(self._length).tobytes())
        self._append(np.array([self._tokenizer.separator_id]))

    def write(self, text: bytes, ids: np.ndarray, lost_bytes: int) -> None:
        self._document_digest.update(text)
        self._bytes += len(text)
        self._lost += lost_bytes
        self._units += float(self._tokenizer.token_bytes[ids].sum(dtype=np.float64))
        self._append(ids)

    def finish(self) -> dict:
        """Close the last document with a separator, so that its end can be predicted too."""
        self._end_document()
        self._append(np.array([self._tokenizer.separator_id]))
        return {
            "text_bytes": self.text_bytes,
            "lost_bytes": self.lost_bytes,
            "max_id": self.max_id,
            "fingerprint": self._digest.hexdigest(),
        }

    def _append(self, ids: np.ndarray) -> None:
        self._files["tokens"].write(ids.astype(self._dtype).tobytes())
        self._length += len(ids)
        self.max_id = max(self.max_id, int(ids.max(initial=0)))

    def _end_document(self) -> None:
        if self._document_digest is not None:
            self._digest.update(self._document_digest.digest())
            represented = self._bytes - self._lost if self._units else 0
            self._files["scales"].write(np.float32(represented / self._units if self._units else 0).tobytes())
            self.text_bytes += represented
            self.lost_bytes += self._bytes - represented
            self._units = self._bytes = self._lost = 0


def write_streams(folder: pathlib.Path, source: Source, tokenizer: Tokenizer, fraction: float) -> dict[str, dict]:
    """Split by document. A split that gets no document is missing in the result."""
    with contextlib.ExitStack() as stack:
        writers, writer = {}, None
        for key, piece, ids, lost_bytes in _encoded(source, tokenizer):
            if key is not None:
                split = "validation" if in_validation(key, fraction) else "train"
                if split not in writers:
                    writers[split] = _Writer(folder, split, tokenizer, stack)
                writer = writers[split]
                writer.start_document()
            writer.write(piece, ids, lost_bytes)
        counts = {split: writers[split].finish() for split in sorted(writers)}
    if not any(count["text_bytes"] for count in counts.values()):
        if counts:
            raise UsageError(f"data.tokenizer: it has no token for any of the text of {source.spec!r}; use another one")
        raise UsageError(f"data.source: {source.spec!r} holds no text; expected at least one document")
    return counts


class _Piece(NamedTuple):
    key: bytes | None  # of the document's first piece: what decides its split
    context: bytes  # see `cutting`
    text: bytes
    name: str  # of the document


def _pieces(source: Source, tokenizer: Tokenizer) -> Iterator[_Piece]:
    def encode(texts):
        return tokenizer.encode_batch([text.encode() for text in texts])

    for name, key, blocks in source.texts(utf8=tokenizer.is_text):
        if tokenizer.is_text:
            cut = cutting.pieces(map(bytes.decode, blocks), encode, name, cutting.SIZES)
            parts = ((piece.context.encode(), piece.text.encode()) for piece in cut)
        else:  # bytes may be cut anywhere
            parts = ((b"", block) for block in blocks)
        for number, (context, text) in enumerate(parts):
            yield _Piece(None if number else key, context, text, name)


def _encoded(source: Source, tokenizer: Tokenizer) -> Iterator[tuple[bytes | None, bytes, np.ndarray, int]]:
    """Each piece of each document: what decides its split if it is the first, text, tokens, bytes lost."""
    waiting, size = [], 0
    for piece in _pieces(source, tokenizer):
        waiting.append(piece)
        size += len(piece.text)
        if size >= _ENCODED_AT_ONCE:
            yield from _encode(waiting, tokenizer)
            waiting, size = [], 0
    yield from _encode(waiting, tokenizer)


def _encode(waiting: list[_Piece], tokenizer: Tokenizer) -> Iterator[tuple[bytes | None, bytes, np.ndarray, int]]:
    texts = [piece.text for piece in waiting]
    encoded = tokenizer.encode_batch([piece.context + piece.text for piece in waiting])
    later = [i for i, piece in enumerate(waiting) if piece.context]
    for i, known in zip(later, tokenizer.encode_batch([waiting[i].context for i in later]), strict=True):
        if not np.array_equal(encoded[i][: len(known)], known):
            raise UsageError(f"{waiting[i].name}: too long for this tokenizer; break it into documents")
        encoded[i] = encoded[i][len(known) :]
    for piece, ids, lost in zip(waiting, encoded, tokenizer.lost_bytes(texts, encoded), strict=True):
        yield piece.key, piece.text, ids, lost


def write_split_at_tail(folder: pathlib.Path, source: Source, tokenizer: Tokenizer, fraction: float) -> dict[str, dict]:
    """Too few documents to split by document: the last `fraction` of the tokens, at least one, is for validation.

    A document that the cut goes through is continued in the validation stream after a separator of its own.
    """
    counts = write_streams(folder, source, tokenizer, 0.0)["train"]
    dtype, separator = _token_dtype(tokenizer), np.array([tokenizer.separator_id], _token_dtype(tokenizer))
    paths = {name: folder / f"train.{name}" for name in ARRAYS}
    tokens = np.memmap(paths["tokens"], dtype, mode="r")
    starts, scales = np.fromfile(paths["starts"], "uint64"), np.fromfile(paths["scales"], "float32")
    stream = Stream(tokens, starts, scales, **counts)
    cut = len(tokens) - 1 - min(max(1, round(fraction * stream.num_targets)), len(tokens) - 2)
    cut_by_document = tokens[cut] == separator[0]
    text_bytes = 0.0
    with open(folder / "validation.tokens", "wb") as file:
        if not cut_by_document:
            file.write(separator.tobytes())
        for start in range(cut, len(tokens), PIECE_BYTES):
            part = tokens[start : start + PIECE_BYTES]
            text_bytes += stream.bytes_of(start, start + len(part), tokenizer.token_bytes).sum(dtype=np.float64)
            file.write(part.tobytes())
    later = starts >= cut
    moved = starts[later] - np.uint64(cut) + np.uint64(not cut_by_document)
    if not cut_by_document:
        moved, scales_moved = np.append(np.uint64(0), moved), scales[np.sum(~later) - 1 :]
    else:
        scales_moved = scales[later]
    moved.tofile(folder / "validation.starts")
    scales_moved.tofile(folder / "validation.scales")
    starts[~later].tofile(paths["starts"])
    scales[~later].tofile(paths["scales"])
    del tokens, stream
    with open(paths["tokens"], "r+b") as file:
        file.truncate(cut * separator.itemsize)
        file.seek(0, os.SEEK_END)
        file.write(separator.tobytes())
    text_bytes = round(text_bytes)
    of_split = {"train": counts["text_bytes"] - text_bytes, "validation": text_bytes}
    return {
        split: counts
        | {
            "text_bytes": size,
            "lost_bytes": round(counts["lost_bytes"] * size / counts["text_bytes"]),  # as if spread evenly
            "fingerprint": content_hash(counts["fingerprint"], split, cut),
        }
        for split, size in of_split.items()
    }
