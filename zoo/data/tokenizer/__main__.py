"""Train a byte-level BPE tokenizer on a corpus.

    python -m zoo.data.tokenizer --source=stdlib --vocab_size=4096 --output=tokenizer.json

Byte-level BPE as in GPT-2 (Radford et al. 2019): any text can be encoded, and comes back as it was. Of a source that is
split by document only the training documents are read. Exit code 2 for bad flags or text.
"""

import itertools
import pathlib
import sys
from collections.abc import Iterator

import tokenizers
from absl import app, flags
from tokenizers import decoders, models, pre_tokenizers, trainers

from zoo import files
from zoo.data import corpora
from zoo.data.tokenizer import LARGEST_VOCABULARY, SEPARATORS, library
from zoo.errors import UsageError, exit_with_message

_SMALLEST = 257  # 256 bytes and the separator

_SOURCE = flags.DEFINE_string("source", "stdlib", "`stdlib`, or paths and globs, comma-separated (as data.source).")
_TEXT_FIELD = flags.DEFINE_string("text_field", "text", "The field of jsonl, the column of parquet.")
_VOCAB_SIZE = flags.DEFINE_integer("vocab_size", None, "Number of ids, the separator among them.")
_OUTPUT = flags.DEFINE_string("output", None, "The tokenizer.json to write.")
_VALIDATION_FRACTION = flags.DEFINE_float("validation_fraction", 0.05, "Of the documents, left out (as in data.*).")


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


def _save(tokenizer: tokenizers.Tokenizer, path: str) -> None:
    path = pathlib.Path(files.expand(path))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with files.replacing(path) as partial:
            partial.write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--output: cannot write {str(path)!r}: {error.strerror}; choose another path") from error


def main(argv: list[str]) -> None:
    with exit_with_message():
        if len(argv) > 1:
            raise UsageError(f"unexpected argument {argv[1]!r}; flags look like --source=PATH")
        for flag in (_VOCAB_SIZE, _OUTPUT):
            if flag.value is None:
                raise UsageError(f"--{flag.name} is missing; such as --vocab_size=4096 --output=tokenizer.json")
        sources = corpora.find_all(_SOURCE.value, _TEXT_FIELD.value, "--source")
        path, tokenizer = _OUTPUT.value, train(sources, _VOCAB_SIZE.value, _VALIDATION_FRACTION.value)
        _save(tokenizer, path)
        print(f"{path}: {tokenizer.get_vocab_size()} tokens; use it with --config.data.tokenizer={path}")


def _parse(argv: list[str]) -> list[str]:
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        print(f"error: {error}; see --help", file=sys.stderr)
        sys.exit(2)


def run(argv: list[str] | None = None) -> None:
    """The command, `argv[0]` being its name."""
    app.run(main, argv=argv, flags_parser=_parse)


if __name__ == "__main__":
    run()
