"""How much of a text no token stands for: dropped without a word, or turned into the unknown token.

BPE and Unigram know characters or do not, so each character that occurs is tried once. WordPiece and WordLevel know
words or do not: words are tried where the unknown token came up. White space that a tokenizer cuts words at, and gives
no token to (as BERT's does), is not counted as lost.
"""

import collections
import re
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tokenizers

from zoo.data.tokenizer import library

_ASCII, _NOT_ASCII = set(map(chr, range(128))), re.compile("[^\x00-\x7f]+")
_WORDS_KEPT = 1 << 20
_CUT_AT_SPACE = {"Whitespace", "WhitespaceSplit", "BertPreTokenizer"}


class Coverage:
    """Of one tokenizer.

    Args:
      description: its tokenizer.json.
      token_bytes: float32 [vocab_size], of a byte-level tokenizer; None for others.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, description: dict[str, Any], token_bytes: np.ndarray | None):
        self._tokenizer, self._token_bytes = tokenizer, token_bytes
        self.unknown_id = _unknown_id(tokenizer, description["model"])
        self._by_words = isinstance(tokenizer.model, tokenizers.models.WordPiece | tokenizers.models.WordLevel)
        self._normalizes = description.get("normalizer") is not None
        self._skips_space = any(kind in _CUT_AT_SPACE for kind in _kinds(description.get("pre_tokenizer")))
        self._tried: set[str] = set()  # characters
        self._lost: set[str] = set()  # of these
        self._pattern: re.Pattern[str] | None = None  # of the lost ones
        self._words: dict[str, tuple[int, int]] = {}  # their unknown tokens, and the bytes these stand for

    def lost_bytes(self, texts: Sequence[str], ids: Sequence[np.ndarray]) -> list[int]:
        """Bytes (UTF-8) of each text that its ids do not stand for."""
        if self._by_words:
            unknown = [int((found == self.unknown_id).sum()) for found in ids]
            return list(map(self._in_words, texts, unknown))
        characters = set("".join(run for text in texts for run in _NOT_ASCII.findall(text))) | _ASCII
        if new := characters - self._tried:
            self._try(new)
        if self._pattern is None:
            return [0] * len(texts)
        return [len("".join(self._pattern.findall(text)).encode()) for text in texts]

    def _try(self, characters: set[str]) -> None:
        self._tried |= characters
        if self._skips_space:
            characters = {c for c in characters if not c.isspace()}
        if self._normalizes:  # accents that follow their letter may be stripped, as those in one character are
            characters = {c for c in characters if not unicodedata.combining(c)}
        ordered = sorted(characters)
        # As first, middle and last character; and white space between letters, where no normalizer strips it.
        tests = [f"a{c}a" if c.isspace() else 3 * c for c in ordered]
        *encoded, letters = self._encode([*tests, "aa"])
        without = self._covered("aa", letters).sum()
        for c, test, encoding in zip(ordered, tests, encoded, strict=True):
            covered = self._covered(test, encoding).sum()
            if not c.isspace():
                missing = covered < len(test)
            else:  # offsets of byte-level tokens may leave out the space before a word
                missing = covered <= without and self._token_bytes is None
            if self._token_bytes is not None and not self._normalizes:  # a part of the bytes of a character
                missing |= self._token_bytes[encoding.ids].sum() < len(test.encode())
            if missing:
                self._lost.add(c)
        if self._lost:
            self._pattern = re.compile(f"[{''.join(map(re.escape, sorted(self._lost)))}]+")

    def _in_words(self, text: str, unknown: int) -> int:
        if not unknown:
            return 0
        if len(self._words) > _WORDS_KEPT:
            self._words.clear()
        words = collections.Counter(text.split())
        new = [word for word in words if word not in self._words]
        for word, encoding in zip(new, self._encode(new), strict=True):
            count = encoding.ids.count(self.unknown_id)
            self._words[word] = count, self._uncovered_bytes(word, encoding) if count else 0
        if sum(n * self._words[word][0] for word, n in words.items()) != unknown:  # words are something else here
            return self._uncovered_bytes(text, self._encode([text])[0])
        return sum(n * self._words[word][1] for word, n in words.items())

    def _uncovered_bytes(self, text: str, encoding: tokenizers.Encoding) -> int:
        missing = np.flatnonzero(~self._covered(text, encoding))
        return sum(len(text[i].encode()) for i in missing if not text[i].isspace())

    def _covered(self, text: str, encoding: tokenizers.Encoding) -> np.ndarray:
        covered = np.zeros(len(text), bool)
        for token, (start, stop) in zip(encoding.ids, encoding.offsets, strict=True):
            if token != self.unknown_id:
                covered[start:stop] = True
        return covered

    def _encode(self, texts: list[str]) -> list[tokenizers.Encoding]:
        size = sum(map(len, texts))
        return library.bounded(lambda: self._tokenizer.encode_batch(texts, add_special_tokens=False), size)


def _unknown_id(tokenizer: tokenizers.Tokenizer, model: dict[str, Any]) -> int | None:
    if isinstance(tokenizer.model, tokenizers.models.Unigram):
        return model.get("unk_id")
    token = getattr(tokenizer.model, "unk_token", None)
    return tokenizer.token_to_id(token) if token is not None else None


def _kinds(component: dict[str, Any] | None) -> Iterator[str]:
    """The types of a component of a tokenizer.json, those in a Sequence among them."""
    if component is not None:
        yield component["type"]
        for part in component.get("pretokenizers", []):
            yield from _kinds(part)
