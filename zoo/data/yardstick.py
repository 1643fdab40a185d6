"""What simple methods need for the validation text: the figures that a model's bits per byte are held against.

gzip -9 learns from the text that it compresses, and so reads far more than a short run does. The fair neighbour of a
short run is a table of the same training tokens: how often each byte followed each three bytes.
"""

import math
import zlib
from collections.abc import Iterable
from typing import Any

import numpy as np

from zoo.data.streams import Stream
from zoo.data.tokenizer import Tokenizer

ORDER = 3  # bytes of context
GZIP_BYTES = 64 << 20  # of validation text
TABLE_BYTES = 4 << 20  # of training text, and of validation text: what takes seconds

_SEPARATOR, _EDGE = 256, 257  # symbols beside the 256 bytes; an edge stands between rows and is never predicted
_SYMBOLS = 258


def gzip_bits_per_byte(streams: list[Stream], tokenizer: Tokenizer) -> float | None:
    """What gzip -9 needs for the first 64 MiB of the text, documents joined; None without text."""
    compressor, text_bytes, size = zlib.compressobj(level=9, wbits=31), 0, 0  # 31: gzip's header and window
    for stream in streams:
        for start in range(0, len(stream.tokens), 1 << 20):
            text = tokenizer.decode_bytes(stream.tokens[start : start + (1 << 20)])[: GZIP_BYTES - text_bytes]
            text_bytes += len(text)
            size += len(compressor.compress(text))
    return 8 * (size + len(compressor.flush())) / text_bytes if text_bytes else None


def table_bits_per_byte(
    rows: Iterable[np.ndarray], streams: list[Stream], tokenizer: Tokenizer, order: int = ORDER
) -> tuple[float, int]:
    """What a byte model of `order`, counted in the training rows alone, needs for the validation text.

    Interpolated Witten-Bell smoothing (Witten & Bell 1991, method C, as Chen & Goodman 1999 state it):

        p_n(x | c) = (N(c x) + U(c) p_{n-1}(x | c')) / (N(c) + U(c)),     p_{-1} = 1 / 257

    with N the counts after the last n bytes c, U(c) the number of different bytes seen there, and c' without its first
    byte. Ends of documents are symbols, paid for and no bytes, as in a model's own bits per byte.

    Args:
      rows: of token ids, [tokens] each, as a run reads them; no more are taken than `TABLE_BYTES` of text.
      streams: the validation text; its first `TABLE_BYTES` count.

    Returns:
      Bits per byte, and the bytes of training text that were counted.
    """
    training = _take((_symbols(row, tokenizer) for row in rows), TABLE_BYTES)
    chunks = (stream.tokens[i : i + (1 << 20)] for stream in streams for i in range(0, len(stream.tokens), 1 << 20))
    validation = np.concatenate(_take((_symbols(chunk, tokenizer) for chunk in chunks), TABLE_BYTES) or [_EMPTY])
    text = np.concatenate([part for row in training for part in (row, np.array([_EDGE]))] or [_EMPTY])
    probability = np.full(max(len(validation) - 1, 0), 1 / 257)  # of each symbol but the first
    for n in range(order + 1):
        keys = _keys(text, n)[text[n:] != _EDGE]
        pairs, counts = np.unique(keys, return_counts=True)
        contexts, first, distinct = np.unique(pairs // _SYMBOLS, return_index=True, return_counts=True)
        totals = np.add.reduceat(counts, first) if len(first) else counts
        asked = _keys(validation, n)[0 if n else 1 :]  # of the symbols from max(n, 1) on
        seen = _look_up(pairs, counts, asked)
        total, unlike = _look_up(contexts, totals, asked // _SYMBOLS), _look_up(contexts, distinct, asked // _SYMBOLS)
        lower = probability[max(n - 1, 0) :]
        lower[:] = np.where(total > 0, (seen + unlike * lower) / np.maximum(total + unlike, 1), lower)
    text_bytes = int((validation[1:] < _SEPARATOR).sum())
    counted = sum(int((row < _SEPARATOR).sum()) for row in training)
    return float(-np.log2(probability).sum() / max(text_bytes, 1)), counted


def conclusion(bits_per_byte: float | None, figures: dict[str, Any]) -> list[str]:
    """What a reader should think of a model's bits per byte, in lines; none where the text has no bytes.

    Args:
      figures: gzip_bits_per_byte, eval_tokens (None: not known), and table_order, table_bits_per_byte, table_bytes
        (None: not counted).
    """
    table, gzip = figures["table_bits_per_byte"], figures["gzip_bits_per_byte"]
    if not gzip or bits_per_byte is None or not math.isfinite(bits_per_byte):
        return []
    lines, verdict = [f"{bits_per_byte:.4f}  this model"], []
    if table is not None:
        read = f"of {figures['table_bytes']:,} bytes that it read"
        lines.append(f"{table:.4f}  a table {read}: which byte follows which {figures['table_order']}")
        if figures["table_bytes"] < TABLE_BYTES:  # of all that the model was trained on
            better = "The table is the fair yardstick for so short a run, and the model beats it."
            worse = "The table is the fair yardstick for so short a run, and ahead of the model."
            verdict = [better if bits_per_byte < table else worse]
    lines.append(f"{gzip:.4f}  what gzip -9 needs, which reads the validation text itself")
    tokens = figures["eval_tokens"]
    what = f"{tokens:,} tokens of validation text" if tokens else "validation text"
    return [f"bits per byte of {what}:", *(f"  {line}" for line in lines), *verdict]


_EMPTY = np.zeros(0, np.int64)


def _take(parts: Iterable[np.ndarray], size: int) -> list[np.ndarray]:
    """As many parts as hold `size` symbols, the last one cut."""
    taken = []
    for part in parts:
        taken.append(part[:size])
        size -= len(part)
        if size <= 0:
            break
    return taken


def _symbols(tokens: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    """The bytes of the tokens, int64, and a symbol for each separator."""
    documents = np.split(tokens, np.flatnonzero(tokens == tokenizer.separator_id))
    texts = [np.frombuffer(tokenizer.decode_bytes(part), np.uint8).astype(np.int64) for part in documents]
    return np.concatenate([part for text in texts for part in (np.array([_SEPARATOR]), text)][1:])


def _keys(symbols: np.ndarray, order: int) -> np.ndarray:
    """A number for each run of order + 1 symbols, the context's times `_SYMBOLS` plus the last."""
    key = symbols[: max(len(symbols) - order, 0)]
    for i in range(1, order + 1):
        key = key * _SYMBOLS + symbols[i : len(symbols) - order + i]
    return key


def _look_up(keys: np.ndarray, values: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """values[i] where asked is keys[i] (sorted), else 0."""
    if not len(keys):
        return np.zeros(len(asked), np.int64)
    at = np.minimum(np.searchsorted(keys, asked), len(keys) - 1)
    return np.where(keys[at] == asked, values[at], 0)
