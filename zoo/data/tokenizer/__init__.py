"""Tokenizers: bytes, and Hugging Face's tokenizer.json. `python -m zoo.data.tokenizer` trains one.

Every tokenizer has

    vocab_size      number of ids, the separator among them
    separator_id    the id that stands before each document
    fingerprint     hash of what it does
    token_bytes     float32 [vocab_size]: bytes of text that a token stands for, separator 0 (see below)
    encode(str), encode_bytes(bytes) -> int32 [T];  encode_batch([bytes, ...]) -> [int32 [T], ...]
    lost_bytes([bytes, ...], their ids) -> [int, ...]: of each text, how much no token stands for
    decode(ids) -> str, decode_bytes(ids) -> bytes: separators are left out
    stream_decoder() -> decoder with push(id) -> str and flush() -> str: text as it becomes certain

`token_bytes` is exact for bytes and for byte-level BPE. For others it is 1 (0 for the unknown token), and the token
cache scales it, document by document, to the bytes of the document that are not lost.
"""

import codecs
import hashlib
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import tokenizers

from zoo import files
from zoo.data.tokenizer import library
from zoo.data.tokenizer.coverage import Coverage
from zoo.errors import UsageError

BYTES = "bytes"
LARGEST_FILE = 128 << 20  # bytes of a tokenizer.json; the largest in use have 40 MB
LARGEST_VOCABULARY = 1 << 22  # ids; tables of that many rows are made
# The first one that a tokenizer.json has is taken.
SEPARATORS = ("<|endoftext|>", "</s>", "<eos>", "[SEP]", "<s>", "<|end_of_text|>")


class ByteTokenizer:
    """Ids 0 to 255 are bytes, 256 is the separator."""

    vocab_size = 257
    separator_id = 256
    is_text = False  # takes any bytes, not only UTF-8
    fingerprint = hashlib.sha256(b"bytes, separator 256").hexdigest()

    def __init__(self):
        self.token_bytes = np.ones(self.vocab_size, np.float32)
        self.token_bytes[self.separator_id] = 0

    def encode(self, text: str) -> np.ndarray:
        return self.encode_bytes(text.encode())

    def encode_bytes(self, text: bytes) -> np.ndarray:
        return np.frombuffer(text, np.uint8).astype(np.int32)

    def encode_batch(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        return [self.encode_bytes(text) for text in texts]

    def lost_bytes(self, texts: Sequence[bytes], ids: Sequence[np.ndarray]) -> list[int]:
        return [0] * len(texts)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self.decode_bytes(ids).decode(errors="replace")

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        ids = np.asarray(ids)
        return ids[ids < 256].astype(np.uint8).tobytes()

    def stream_decoder(self) -> "BytesDecoder":
        return BytesDecoder(self)


class FileTokenizer:
    """A Hugging Face tokenizer.json. Text is never read as a special token: `<|endoftext|>` in it stays text.

    Raises:
      UsageError: no such file, not a tokenizer.json, no tokens, or absurd ids.
    """

    is_text = True

    def __init__(self, path: str):
        try:
            content = files.read_bytes(files.expand(path), LARGEST_FILE)
        except OSError as error:
            raise UsageError(
                f"data.tokenizer: {path!r} cannot be read ({error.strerror}); expected `bytes` or the path of a "
                "tokenizer.json (python -m zoo.data.tokenizer trains one)"
            ) from error
        with library.errors(f"data.tokenizer: {path!r} is no tokenizer.json of the Hugging Face tokenizers library"):
            self._tokenizer = tokenizers.Tokenizer.from_str(content.decode())
            self._tokenizer.no_truncation()
            self._tokenizer.no_padding()
            self._tokenizer.encode_special_tokens = True
            vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
            special = {token.content for token in self._tokenizer.get_added_tokens_decoder().values() if token.special}
            description = json.loads(content)
        last = max(vocabulary.values(), default=-1)
        if not 0 <= last < LARGEST_VOCABULARY:
            found = f"ids up to {last:,}" if vocabulary else "no tokens"
            raise UsageError(
                f"data.tokenizer: {path!r} has {found}; expected a vocabulary with ids below {LARGEST_VOCABULARY:,}"
            )
        if getattr(self._tokenizer.model, "dropout", None):
            self._tokenizer.model.dropout = None  # the same text, the same tokens
        self.fingerprint = hashlib.sha256(content).hexdigest()
        self.separator_id = next((vocabulary[name] for name in SEPARATORS if name in special), last + 1)
        self.vocab_size = max(last, self.separator_id) + 1
        self.is_byte_level = any(part["type"] == "ByteLevel" for part in _parts(description.get("decoder")))
        self._pieces = self._byte_pieces(vocabulary) if self.is_byte_level else []
        self.token_bytes = np.ones(self.vocab_size, np.float32)
        if self.is_byte_level:
            self.token_bytes[:] = [len(piece) for piece in self._pieces]
        self.token_bytes[self.separator_id] = 0
        self._coverage = Coverage(self._tokenizer, description, self.token_bytes if self.is_byte_level else None)
        if self._coverage.unknown_id is not None:
            self.token_bytes[self._coverage.unknown_id] = 0

    def _byte_pieces(self, vocabulary: dict[str, int]) -> list[bytes]:
        added = {token.content for token in self._tokenizer.get_added_tokens_decoder().values()}
        pieces = [b""] * self.vocab_size
        for token, i in vocabulary.items():
            spelt = token not in added and all(c in BYTE_OF for c in token)
            pieces[i] = bytes(BYTE_OF[c] for c in token) if spelt else token.encode()
        pieces[self.separator_id] = b""
        return pieces

    def encode(self, text: str) -> np.ndarray:
        return self._encode([text])[0]

    def encode_bytes(self, text: bytes) -> np.ndarray:
        return self.encode(text.decode())

    def encode_batch(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        return self._encode([text.decode() for text in texts])

    def _encode(self, texts: list[str]) -> list[np.ndarray]:
        def encode() -> list:
            return self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)

        encoded = library.bounded(encode, sum(map(len, texts)))
        return [np.asarray(e.ids, np.int32) for e in encoded]

    def lost_bytes(self, texts: Sequence[bytes], ids: Sequence[np.ndarray]) -> list[int]:
        return self._coverage.lost_bytes([text.decode() for text in texts], ids)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        if self.is_byte_level:
            return self.decode_bytes(ids).decode(errors="replace")
        known = [int(i) for i in ids if i != self.separator_id and i < self.vocab_size]
        with library.errors("data.tokenizer: the tokens cannot be decoded", quiet=False):
            return self._tokenizer.decode(known, skip_special_tokens=False)

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        if not self.is_byte_level:
            return self.decode(ids).encode()
        return b"".join(self._pieces[i] for i in map(int, ids) if i < len(self._pieces))

    def stream_decoder(self) -> "BytesDecoder | TextDecoder":
        return BytesDecoder(self) if self.is_byte_level else TextDecoder(self)


Tokenizer = ByteTokenizer | FileTokenizer


class BytesDecoder:
    """Tokens to text for tokens that are bytes: a character cut in two waits, bytes that are no UTF-8 become U+FFFD."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        return self._utf8.decode(self._tokenizer.decode_bytes([token]))

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


class TextDecoder:
    """Tokens to text where a token's text depends on its neighbours: decodes a few tokens anew with each push."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._told = 0  # number of ids whose text was returned; those kept before them are context

    def push(self, token: int) -> str:
        self._ids.append(int(token))
        return self._rest(final=False)

    def flush(self) -> str:
        return self._rest(final=True)

    def _rest(self, final: bool) -> str:
        before, text = self._tokenizer.decode(self._ids[: self._told]), self._tokenizer.decode(self._ids)
        if len(text) <= len(before) or (text.endswith("\ufffd") and not final):
            return ""
        self._ids = self._ids[self._told :]
        self._told = len(self._ids)
        return text[len(before) :]


def load(spec: str) -> Tokenizer:
    """The tokenizer that data.tokenizer means: `bytes`, or the path of a tokenizer.json.

    Raises:
      UsageError: no such file, or not a tokenizer.json.
    """
    return ByteTokenizer() if spec == BYTES else FileTokenizer(spec)


def spec_for_run(workdir: str | os.PathLike, config: Any) -> str:
    """The tokenizer of a run: WORKDIR/tokenizer.json if the run has one, else the one that its config names."""
    kept = pathlib.Path(workdir, "tokenizer.json")
    return str(kept) if kept.exists() else config.data.tokenizer


def for_run(workdir: str | os.PathLike, config: Any) -> Tokenizer:
    """`load` of `spec_for_run`."""
    return load(spec_for_run(workdir, config))


def _parts(component: dict | None) -> list[dict]:
    """A component of a tokenizer.json as a list: what a Sequence holds, or the component itself."""
    if component is None:
        return []
    return component.get("decoders", [component])


def _byte_alphabet() -> dict[str, int]:
    """The character that byte-level BPE (Radford et al. 2019) writes for each byte, to the byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}


BYTE_OF = _byte_alphabet()
