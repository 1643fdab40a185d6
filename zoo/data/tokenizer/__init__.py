"""Tokenizers: bytes, and Hugging Face's tokenizer.json. `python -m zoo.data.tokenizer` trains one.

Every tokenizer has

    vocab_size      number of ids, the separator among them
    separator_id    the id that stands before each document
    fingerprint     hash of what it does
    token_bytes     float32 [vocab_size]: bytes of text that a token stands for, separator 0 (see below)
    encode(str), encode_bytes(bytes) -> int32 [T];  encode_batch([bytes, ...]) -> [int32 [T], ...]
    decode(ids) -> str, decode_bytes(ids) -> bytes: separators are left out
    stream_decoder() -> decoder with push(id) -> str and flush() -> str: text as it becomes certain

`token_bytes` is exact for bytes and for byte-level BPE. For others it is 1, and the token cache scales it, document by
document, to the bytes that the document has.
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

from zoo.errors import UsageError

BYTES = "bytes"
SEPARATORS = ("<|endoftext|>", "</s>", "<eos>", "[SEP]", "<s>")  # the first one that a tokenizer.json has is taken


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
      UsageError: no such file, or not a tokenizer.json.
    """

    is_text = True

    def __init__(self, path: str):
        try:
            content = pathlib.Path(path).expanduser().read_bytes()
        except OSError as error:
            raise UsageError(
                f"data.tokenizer: {path!r} cannot be read ({error.strerror}); expected `bytes` or the path of a "
                "tokenizer.json (python -m zoo.data.tokenizer trains one)"
            ) from error
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(content.decode())
        except Exception as error:  # the library raises bare exceptions
            raise UsageError(
                f"data.tokenizer: {path!r} is no tokenizer.json of the Hugging Face tokenizers library: {error}"
            ) from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        self.fingerprint = hashlib.sha256(content).hexdigest()
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        last = max(vocabulary.values())
        special = {token.content for token in self._tokenizer.get_added_tokens_decoder().values() if token.special}
        self.separator_id = next((vocabulary[name] for name in SEPARATORS if name in special), last + 1)
        self.vocab_size = max(last, self.separator_id) + 1
        self.is_byte_level = any(part["type"] == "ByteLevel" for part in _parts(json.loads(content).get("decoder")))
        self._pieces = self._byte_pieces(vocabulary) if self.is_byte_level else []
        self.token_bytes = np.ones(self.vocab_size, np.float32)
        if self.is_byte_level:
            self.token_bytes[:] = [len(piece) for piece in self._pieces]
        self.token_bytes[self.separator_id] = 0

    def _byte_pieces(self, vocabulary: dict[str, int]) -> list[bytes]:
        added = {token.content for token in self._tokenizer.get_added_tokens_decoder().values()}
        pieces = [b""] * self.vocab_size
        for token, i in vocabulary.items():
            spelt = token not in added and all(c in _BYTE_OF for c in token)
            pieces[i] = bytes(_BYTE_OF[c] for c in token) if spelt else token.encode()
        pieces[self.separator_id] = b""
        return pieces

    def encode(self, text: str) -> np.ndarray:
        return np.asarray(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

    def encode_bytes(self, text: bytes) -> np.ndarray:
        return self.encode(text.decode())

    def encode_batch(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        encoded = self._tokenizer.encode_batch_fast([text.decode() for text in texts], add_special_tokens=False)
        return [np.asarray(e.ids, np.int32) for e in encoded]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        if self.is_byte_level:
            return self.decode_bytes(ids).decode(errors="replace")
        known = [int(i) for i in ids if i != self.separator_id and i < self.vocab_size]
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


def for_run(workdir: str | os.PathLike, config: Any) -> Tokenizer:
    """The tokenizer of a run: WORKDIR/tokenizer.json if the run has one, else the one that its config names."""
    kept = pathlib.Path(workdir, "tokenizer.json")
    return load(str(kept) if kept.exists() else config.data.tokenizer)


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


_BYTE_OF = _byte_alphabet()
