"""Labelled rows in memory: checked once, numbers standardised, padded on the right to the length of the run."""

import hashlib
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from zoo.data.corpora import in_validation
from zoo.data.stored import StoredRows, standardised
from zoo.data.streams import content_hash
from zoo.errors import UsageError
from zoo.settings import nearest, shown


class Part(NamedTuple):
    """Rows of one part, each field as long.

    Attributes:
      inputs: of each row ids int [t], or numbers [t, C].
      labels: of each row a class, as its file has it.
      names: of each row where it stands, "reviews.jsonl:17", for messages.
    """

    inputs: Sequence[np.ndarray]
    labels: Sequence[str]
    names: Sequence[str]

    def pick(self, chosen: Iterable[int]) -> "Part":
        """Some of the rows."""
        chosen = list(chosen)
        return Part(*([field[i] for i in chosen] for field in self))


def split(part: Part, fraction: float) -> tuple[Part, Part]:
    """A training and a validation part: about `fraction` of the rows, chosen by a hash of their inputs alone, so that
    equal inputs are in one part whatever their labels are."""
    held = [in_validation(np.ascontiguousarray(x).tobytes(), fraction) for x in part.inputs]
    return part.pick(np.flatnonzero(~np.array(held, bool))), part.pick(np.flatnonzero(held))


class LabelledRows(StoredRows):
    """Rows of a training and a validation part.

    Numbers are standardised by channel, by the mean and the deviation of the training part.

    Args:
      name: of the source, for messages.
      length: steps that rows are padded to, train.context_length.
      vocab_size: of ids; 0: inputs are numbers.
      cut: rows that are longer lose their end; else they are refused.
      classes: the labels that there are; None: those of the training part.

    Raises:
      UsageError: a part without rows, a row that is empty or too long, a number that is not finite, rows that differ in
        channels, a label that no training row has, fewer than two classes, or nearly as many classes as rows.
    """

    head = "classes"

    def __init__(
        self,
        name: str,
        length: int,
        train: Part,
        validation: Part,
        *,
        vocab_size: int = 0,
        cut: bool = False,
        classes: Sequence[str] | None = None,
    ):
        self.name, self.length, self.vocab_size = name, length, vocab_size
        self.train_rows, self.validation_rows = len(train.inputs), len(validation.inputs)
        for which, part in (("training", train), ("validation", validation)):
            if not len(part.inputs):
                raise UsageError(
                    f"data.source: {name} has no {which} rows; use more rows, or another data.validation_fraction"
                )
            _check_lengths(name, part, length, cut)
        self.channels = 0 if vocab_size else train.inputs[0].shape[1]
        self._inputs = {
            "train": [x[:length] for x in train.inputs], "validation": [x[:length] for x in validation.inputs]
        }  # fmt: skip
        if self.channels:
            for part in (train, validation):
                _check_numbers(part, self.channels, train.names[0])
            self._mean, self._deviation = _moments(self._inputs["train"])
        self.classes = _classes(name, train) if classes is None else list(classes)
        self.num_classes = len(self.classes)
        self._labels = {"train": self._numbers(train), "validation": self._numbers(validation)}
        digest = hashlib.sha256()
        for part in ("train", "validation"):
            for x in self._inputs[part]:
                digest.update(f"{x.dtype} {x.shape}\0".encode() + np.ascontiguousarray(x).tobytes())
            digest.update(self._labels[part].tobytes())
        self.fingerprint = content_hash(name, digest.hexdigest(), self.classes)

    def _numbers(self, part: Part) -> np.ndarray:
        """Of each row its class."""
        number = {label: i for i, label in enumerate(self.classes)}
        for label, where in zip(part.labels, part.names, strict=True):
            if label not in number:
                near = nearest(label, self.classes, 5)
                raise UsageError(
                    f"{where}: label {shown(label)} is no class of the training rows; they have, nearest first: {near}"
                )
        return np.array([number[label] for label in part.labels], np.int32)

    def take(self, part, indices):
        indices = list(indices)
        inputs = [self._inputs[part][i] for i in indices]
        lengths = np.array([len(x) for x in inputs], np.int32)
        if self.channels:
            padded = np.zeros((len(inputs), self.length, self.channels), np.float32)
            for row, x in enumerate(inputs):
                padded[row, : len(x)] = standardised(x, self._mean, self._deviation)
        else:
            padded = np.zeros((len(inputs), self.length), np.int32)
            for row, x in enumerate(inputs):
                padded[row, : len(x)] = x
        kind = "values" if self.channels else "tokens"
        return {kind: padded, "lengths": lengths, "label": self._labels[part][indices]}


def _classes(name: str, train: Part) -> list[str]:
    """Those of the training rows, whole numbers in their order."""
    found = set(train.labels)
    if len(found) < 2:
        raise UsageError(
            f"data.source: all training rows of {name} have the label {shown(train.labels[0])}; expected at least two "
            "classes"
        )
    if 2 * len(found) > len(train.labels):
        raise UsageError(
            f"data.source: {name} has {len(found):,} labels in {len(train.labels):,} training rows, expected at least "
            "two rows of a class on average; is the label a class, not a number or an id?"
        )
    whole = all(label.lstrip("-").isdecimal() for label in found)
    return sorted(found, key=int if whole else str)


def _check_lengths(name: str, part: Part, length: int, cut: bool) -> None:
    lengths = [len(x) for x in part.inputs]
    if 0 in lengths:
        raise UsageError(f"{part.names[lengths.index(0)]}: an empty row; expected at least one step, or leave it out")
    longest = int(np.argmax(lengths))
    if lengths[longest] > length and not cut:
        raise UsageError(
            f"{part.names[longest]}: {lengths[longest]:,} steps, more than train.context_length = {length}; use at "
            f"least {lengths[longest]}, or cut rows by the option cut=true, if {name} has it"
        )


def _check_numbers(part: Part, channels: int, first: str) -> None:
    for x, where in zip(part.inputs, part.names, strict=True):
        if x.ndim != 2 or x.shape[1] != channels:
            has = x.shape[1] if x.ndim == 2 else f"{x.ndim} axes and no"
            raise UsageError(f"{where}: has {has} channels, and {first} has {channels}; expected the same in all rows")
        if not np.isfinite(x).all():
            step, channel = np.argwhere(~np.isfinite(x))[0]
            raise UsageError(
                f"{where}: step {step + 1} of channel {channel + 1} is {x[step, channel]}, expected a finite number; "
                "fill it in, or leave the row out"
            )


def _moments(inputs: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation of each channel over all steps, float64 [C]; of a constant channel the deviation is 1."""
    count = sum(len(x) for x in inputs)
    mean = sum(x.sum(0, dtype=np.float64) for x in inputs) / count
    square = sum(((x - mean) ** 2).sum(0) for x in inputs) / count
    return mean, np.where(square > 0, np.sqrt(square), 1.0)
