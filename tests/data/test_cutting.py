"""A document encoded in pieces has the tokens of the whole, whatever the tokenizer does at the start and at borders."""

import itertools

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, models, normalizers, pre_tokenizers, processors, trainers

from zoo.data import cache, corpora, corpus_info, readers
from zoo.data.tokenizer import FileTokenizer, cutting
from zoo.errors import UsageError

SIZES = cutting.Sizes(piece=96, context=24, longest=100_000)
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
TRAINED_ON = ["def f(a):\n    return a + 12345\n\n\nthe zoo  grows, the zoo.\n\tnaïve 你好。世界 aaaa bbbb\r\n"] * 4


def _tokenizer(model, trainer, pre_tokenizer=None, normalizer=None, **options):
    tokenizer = tokenizers.Tokenizer(model)
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.train_from_iterator(TRAINED_ON, trainer(vocab_size=300, show_progress=False, **options))
    return tokenizer


def _bpe(pre_tokenizer=None, normalizer=None, **options):
    alphabet = pre_tokenizers.ByteLevel.alphabet() if options.pop("bytes", False) else []
    model = models.BPE() if alphabet else models.BPE(unk_token="<unk>")
    options["special_tokens"] = [] if alphabet else ["<unk>"]
    return _tokenizer(
        model, trainers.BpeTrainer, pre_tokenizer, normalizer, initial_alphabet=sorted(alphabet), **options
    )


def _trimmed(tokenizer):
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return tokenizer


def _with_added_tokens(tokenizer):
    tokenizer.add_tokens([tokenizers.AddedToken("zoo\n", lstrip=True), tokenizers.AddedToken("grows", rstrip=True)])
    return tokenizer


Sequence = pre_tokenizers.Sequence
TOKENIZERS = {  # what people use, by the model best known for it
    "GPT-2": lambda: _bpe(pre_tokenizers.ByteLevel(add_prefix_space=False), bytes=True),
    "RoBERTa": lambda: _trimmed(_bpe(pre_tokenizers.ByteLevel(add_prefix_space=True), bytes=True)),
    "Llama 3": lambda: _bpe(
        Sequence(
            [
                pre_tokenizers.Split(Regex(LLAMA3), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        ),
        bytes=True,
    ),
    "Llama 2": lambda: _bpe(None, normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])),
    "Mistral": lambda: _bpe(pre_tokenizers.Metaspace(prepend_scheme="first", split=False)),
    "BPE at line ends too": lambda: _bpe(pre_tokenizers.Split("\n", "merged_with_next")),
    "T5": lambda: _tokenizer(
        models.Unigram(),
        trainers.UnigramTrainer,
        pre_tokenizers.Metaspace(),
        normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " "), normalizers.Strip()]),
        special_tokens=["<unk>"],
        unk_token="<unk>",
    ),  # fmt: skip
    "BERT": lambda: _tokenizer(
        models.WordPiece(unk_token="[UNK]", max_input_chars_per_word=100),
        trainers.WordPieceTrainer,
        pre_tokenizers.BertPreTokenizer(),
        normalizers.BertNormalizer(),
        special_tokens=["[UNK]"],
    ),  # fmt: skip
    "words": lambda: _tokenizer(
        models.WordLevel(unk_token="[UNK]"),
        trainers.WordLevelTrainer,
        Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.Digits(True)]),
        special_tokens=["[UNK]"],
    ),  # fmt: skip
    "added tokens": lambda: _with_added_tokens(_bpe(pre_tokenizers.ByteLevel(add_prefix_space=True), bytes=True)),
}

WORDS = st.sampled_from(
    [
        "the",
        "zoo",
        "grows",
        "a",
        "aa",
        "12345",
        "7",
        ".",
        ",",
        "return",
        "naïve",
        "e\u0301",
        "世界",
        "。",
        "🦓",
        "'s",
        "x+y",
    ]
)
GAPS = st.sampled_from([" ", " ", " ", "  ", "\n", "\n\n", "\n\n\n    ", "\r\n", "\t", " \n ", ""])
DOCUMENTS = st.lists(st.tuples(WORDS, GAPS), min_size=40, max_size=120).map(
    lambda pairs: "".join(itertools.chain(*pairs))
)


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    TOKENIZERS[request.param]().save(str(path))
    return FileTokenizer(str(path))


def in_pieces(tokenizer, text, sizes, block=40):
    def encode(texts):
        return tokenizer.encode_batch([text.encode() for text in texts])

    blocks = (text[i : i + block] for i in range(0, len(text), block))
    pieces = list(cutting.pieces(blocks, encode, "it", sizes))
    assert "".join(piece.text for piece in pieces) == text
    ids = []
    for piece in pieces:
        known, found = tokenizer.encode(piece.context), tokenizer.encode(piece.context + piece.text)
        np.testing.assert_array_equal(found[: len(known)], known)
        ids += found[len(known) :].tolist()
    return ids, len(pieces)


@settings(deadline=None, max_examples=15)
@given(text=DOCUMENTS)
def test_pieces_have_the_tokens_of_the_whole(tokenizer, text):
    assert in_pieces(tokenizer, text, SIZES)[0] == tokenizer.encode(text).tolist()


def test_ordinary_text_is_cut_by_every_tokenizer(tokenizer):
    text = "def f(a):\n    return a + 12345\n\n\nthe zoo  grows, the zoo.\n" * 20
    ids, count = in_pieces(tokenizer, text, SIZES)
    assert ids == tokenizer.encode(text).tolist()
    assert count > 5


def test_a_run_whose_borders_follow_from_its_start_is_not_cut(tmp_path):
    """Pairs, counted from the first letter: wherever it is cut, one of two contexts disagrees."""
    tokenizer = tokenizers.Tokenizer(models.BPE({"a": 0, "aa": 1, "b": 2}, [("a", "a")]))
    tokenizer.save(str(tmp_path / "t.json"))
    tokenizer = FileTokenizer(str(tmp_path / "t.json"))
    ids, count = in_pieces(tokenizer, "b" + "a" * 1000, SIZES)
    assert ids == [2] + [1] * 500
    assert count == 1
    with pytest.raises(UsageError, match="it: 1,040 characters without a place"):
        in_pieces(tokenizer, "b" + "a" * 2000, SIZES._replace(longest=1000))


def test_a_long_document_in_the_cache_has_the_tokens_of_the_whole(config, tmp_path, monkeypatch):
    """Through the reader and the cache, with a tokenizer that puts a space before what it is given."""
    monkeypatch.setattr(readers, "PIECE_BYTES", 300)
    monkeypatch.setattr(cutting, "SIZES", SIZES)
    TOKENIZERS["RoBERTa"]().save(str(tmp_path / "t.json"))
    tokenizer, text = FileTokenizer(str(tmp_path / "t.json")), "word word\n\nnaïve\n  words\n" * 200
    (tmp_path / "long.txt").write_text(text)
    encoded, encode = [], tokenizer.encode_batch
    monkeypatch.setattr(tokenizer, "encode_batch", lambda texts: encoded.extend(texts) or encode(texts))
    stream = cache.open_streams(corpora.find(str(tmp_path / "long.txt"), "text"), tokenizer, 0.0, str(tmp_path / "c"))
    np.testing.assert_array_equal(stream["train"].tokens[1:-1], tokenizer.encode(text))
    assert max(map(len, encoded)) < len(text.encode()) / 10


def test_the_split_does_not_depend_on_the_tokenizer(config, write_documents, bpe_path):
    config.data.source, _ = write_documents(300)
    sizes = corpus_info(config)
    config.data.tokenizer = bpe_path
    assert corpus_info(config)["validation_bytes"] == sizes["validation_bytes"]
