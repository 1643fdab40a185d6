"""Text and its class: a .jsonl file, `{"text": "...", "label": "..."}` a line, read as tokens of data.tokenizer.

    labelled_text?path=reviews.jsonl
    labelled_text?path=train/*.jsonl.gz&validation=test.jsonl&label=stars&cut=true

The text stands in the field data.text_field. A label is a string, a whole number, true or false.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

from zoo.data import corpora, readers
from zoo.data import tokenizer as tokenizers
from zoo.data.labelled.stored import LabelledRows, Part, split
from zoo.data.stored import source
from zoo.errors import UsageError
from zoo.settings import setting
from zoo.terminal import one_line


@dataclasses.dataclass
class Options:
    path: str = setting("", "the path or glob of .jsonl (.gz, .zst)")
    validation: str = setting("", "of other rows, that validate; empty: a data.validation_fraction of these")
    label: str = setting("label", "the field of the class")
    cut: bool = setting(False, "rows that are longer than train.context_length lose their end")


@source("labelled_text", Options)
def labelled_text(config, options):
    if not options.path:
        raise UsageError("data.source: labelled_text needs a file, as in labelled_text?path=reviews.jsonl")
    tokenizer = tokenizers.load(config.data.tokenizer)
    parts = []
    for path in filter(None, (options.path, options.validation)):
        rows = list(_rows(path, config.data.text_field, options.label))
        texts, labels, names = zip(*rows, strict=True) if rows else ((), (), ())
        parts.append(Part(tokenizer.encode_batch(texts), labels, names))
    train, validation = parts if options.validation else split(parts[0], config.data.validation_fraction)
    length, size = config.train.context_length, tokenizer.vocab_size
    return LabelledRows("labelled_text", length, train, validation, vocab_size=size, cut=options.cut)


def _rows(spec: str, text_field: str, label_field: str) -> Iterator[tuple[bytes, str, str]]:
    """Text, label and name of each row."""
    for path in corpora.regular_files(spec, "data.source", "the path or glob of .jsonl files").values():
        if readers.file_format(path) != "jsonl":
            raise UsageError(f"{one_line(path)}: labelled_text reads .jsonl alone (.gz, .zst); convert it")
        for name, record in readers.records(path):
            text = readers.field_of(name, record, text_field, "data.text_field")
            yield text, _label(name, record, label_field), name


def _label(name: str, record: dict[str, Any], field: str) -> str:
    if field not in record:
        raise UsageError(f"{name}: no label, the field {field!r}; add it, or name another by the option label=")
    label = record[field]
    if isinstance(label, bool):
        return str(label).lower()
    if isinstance(label, str | int):
        return str(label)
    kind = "null" if label is None else type(label).__name__
    raise UsageError(f"{name}: label {field!r} is {kind}; expected a string or a whole number")
