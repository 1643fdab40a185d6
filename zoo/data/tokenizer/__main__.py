"""Train a byte-level BPE tokenizer on a corpus.

    python -m zoo.data.tokenizer --source=stdlib --vocab_size=4096 --output=tokenizer.json

Byte-level BPE as in GPT-2 (Radford et al. 2019): any text can be encoded, and comes back as it was. Of a source that is
split by document only the training documents are read. Exit code 2 for bad flags or text.
"""

import argparse
import itertools
import os
import pathlib
from collections.abc import Iterator

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from zoo import files
from zoo.data import corpora
from zoo.data.tokenizer import LARGEST_VOCABULARY, SEPARATORS, library
from zoo.errors import UsageError, exit_with_message
from zoo.settings import Parser, argument
from zoo.terminal import one_line

_SMALLEST = 257  # 256 bytes and the separator


def train(sources: list[corpora.Source], vocab_size: int, validation_fraction: float = 0.05) -> tokenizers.Tokenizer:
    """A byte-level BPE tokenizer whose separator is `<|endoftext|>`.

    Raises:
      UsageError: a vocabulary smaller than 257 or absurdly large, no text, or text that is not UTF-8.
    """
    if not _SMALLEST <= vocab_size <= LARGEST_VOCABULARY:
        raise UsageError(
            f"--vocab_size: got {vocab_size}, expected at least {_SMALLEST} (256 bytes and the separator), and at most "
            f"{LARGEST_VOCABULARY}"
        )
    if not 0 <= validation_fraction < 1:
        raise UsageError(f"--validation_fraction: got {validation_fraction}, expected a share in [0, 1); 0 reads all")
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[SEPARATORS[0]],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    pieces = _training_text(sources, validation_fraction)
    first = next(pieces, None)
    if first is None:
        raise UsageError(f"--source: {', '.join(source.spec for source in sources)}: no text to train on")
    with library.errors("the text cannot be trained on"):
        tokenizer.train_from_iterator(itertools.chain([first], pieces), trainer)
    return tokenizer


def _training_text(sources: list[corpora.Source], fraction: float) -> Iterator[str]:
    for source in sources:
        by_document = fraction > 0 and (source.spec == corpora.STDLIB or not source.has_few_documents(fraction))
        for _, key, pieces in source.texts(utf8=True):
            if not (by_document and corpora.in_validation(key, fraction)):
                yield from map(bytes.decode, pieces)


def _save(tokenizer: tokenizers.Tokenizer, path: pathlib.Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with files.replacing(path) as partial:
            partial.write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--output: cannot write {str(path)!r}: {error.strerror}; choose another path") from error


def _arguments(argv: list[str] | None, program: str) -> argparse.Namespace:
    parser = Parser(program, __doc__)
    add = parser.add_argument
    add("--source", default=corpora.STDLIB, help="`stdlib`, or paths and globs, comma-separated (as data.source)")
    add("--text_field", default="text", help="the field of jsonl, the column of parquet")
    add(
        "--vocab_size", type=argument(int, at_least=_SMALLEST, at_most=LARGEST_VOCABULARY), required=True,
        help="number of ids, the separator among them; such as 4096",
    )  # fmt: skip
    add("--output", type=files.expand, required=True, help="the tokenizer.json to write")
    add(
        "--validation_fraction", type=argument(float, at_least=0, below=1), default=0.05,
        help="of the documents, left out (as in data.*); 0 reads all",
    )  # fmt: skip
    return parser.parse_args(argv)


def main(argv: list[str] | None = None, program: str = "python -m zoo.data.tokenizer") -> None:
    arguments = _arguments(argv, program)
    with exit_with_message():
        path = pathlib.Path(arguments.output)
        if not path.name or os.path.isdir(path):  # before the minutes that training takes
            raise UsageError(f"--output: got {arguments.output!r}, expected the path of a file")
        sources = corpora.find_all(arguments.source, arguments.text_field, "--source")
        tokenizer = train(sources, arguments.vocab_size, arguments.validation_fraction)
        _save(tokenizer, path)
        print(one_line(f"{path}: {tokenizer.get_vocab_size()} tokens; use it with --config.data.tokenizer={path}"))


if __name__ == "__main__":
    main()
