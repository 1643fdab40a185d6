"""The table that a model is held against, by its definition, counted again without numpy."""

import collections
import math

import numpy as np
import pytest

from zoo.data import yardstick
from zoo.data.streams import Stream
from zoo.data.tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer()
SEPARATOR = TOKENIZER.separator_id


def stream(*documents: bytes) -> Stream:
    tokens = np.concatenate([[SEPARATOR, *document] for document in documents] + [[SEPARATOR]]).astype(np.uint16)
    size = sum(map(len, documents))
    return Stream(tokens, None, None, text_bytes=size, lost_bytes=0, max_id=SEPARATOR, fingerprint="")


def by_definition(rows, tokens, order):
    """p_n(x | c) = (N(c x) + U(c) p_{n-1}(x | c')) / (N(c) + U(c)), p_{-1} = 1 / 257."""
    following = collections.defaultdict(collections.Counter)
    for row in rows:
        for n in range(order + 1):
            for i in range(n, len(row)):
                following[tuple(row[i - n : i])][row[i]] += 1

    def probability(context, x, n):
        if n < 0:
            return 1 / 257
        lower = probability(context[1:], x, n - 1) if n else 1 / 257
        seen = following.get(context)
        return (seen[x] + len(seen) * lower) / (seen.total() + len(seen)) if seen else lower

    nats = 0.0
    for i in range(1, len(tokens)):
        n = min(order, i)
        nats -= math.log(probability(tuple(tokens[i - n : i]), tokens[i], n))
    return nats / math.log(2) / sum(t < 256 for t in tokens[1:])


@pytest.mark.parametrize("order", [0, 1, 3])
def test_the_table_is_its_definition(order):
    rng = np.random.default_rng(0)
    rows = [rng.choice([*b"abcab ", SEPARATOR], 40).tolist() for _ in range(5)] + [[*b"ab"]]
    validation = stream(b"abc abcd", b"", bytes(rng.choice([*b"abc x"], 50).tolist()))
    bits, counted = yardstick.table_bits_per_byte(map(np.array, rows), [validation], TOKENIZER, order)
    assert bits == pytest.approx(by_definition(rows, validation.tokens.tolist(), order), rel=1e-12)
    assert counted == sum(t < 256 for row in rows for t in row)


def test_a_table_without_text_knows_nothing_and_one_of_the_text_itself_knows_it():
    text = stream(b"to be or not to be " * 20)
    nothing, counted = yardstick.table_bits_per_byte([], [text], TOKENIZER)
    assert counted == 0 and nothing == pytest.approx(math.log2(257) * (1 + 1 / 380), rel=1e-12)  # a byte, and the end
    bits, _ = yardstick.table_bits_per_byte([text.tokens], [text], TOKENIZER)
    assert bits < 1


def test_no_more_is_read_than_is_counted(monkeypatch):
    monkeypatch.setattr(yardstick, "TABLE_BYTES", 100)
    read = []

    def rows():
        for i in range(50):
            read.append(i)
            yield np.array([*b"0123456789"] * 4)

    bits, counted = yardstick.table_bits_per_byte(rows(), [stream(b"0123456789" * 50)], TOKENIZER)
    assert counted == 100 and len(read) == 3 and bits < 8


FIGURES = {
    "eval_tokens": 1000, "table_order": 3, "table_bits_per_byte": 2.5, "table_bytes": 5000, "gzip_bits_per_byte": 2.0,
}  # fmt: skip


def test_the_conclusion_says_which_figure_is_fair():
    better, worse = yardstick.conclusion(2.4, FIGURES), yardstick.conclusion(2.6, FIGURES)
    assert "the model beats it" in better[-1] and "ahead of the model" in worse[-1]
    assert [line.split()[0] for line in better[1:4]] == ["2.4000", "2.5000", "2.0000"]
    most = FIGURES | {"table_bytes": yardstick.TABLE_BYTES, "eval_tokens": 10**9}
    assert not any("ahead" in line or "beats" in line for line in yardstick.conclusion(2.6, most))  # it saw less
    assert max(map(len, [*better, *worse, *yardstick.conclusion(2.6, most)])) <= 80
    assert yardstick.conclusion(None, FIGURES) == yardstick.conclusion(math.nan, FIGURES) == []
    nothing = dict.fromkeys(FIGURES) | {"gzip_bits_per_byte": 0.0}  # of a synthetic task
    assert yardstick.conclusion(1.0, nothing) == []
