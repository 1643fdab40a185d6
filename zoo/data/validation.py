"""Batches of validation, in fixed order."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from zoo.data import asked, masking, packing, row_batches, synthetic
from zoo.data.rows import Batch
from zoo.data.streams import Stream, content_hash
from zoo.data.tokenizer import Tokenizer
from zoo.errors import UsageError

if TYPE_CHECKING:
    from zoo.config import Config


@dataclasses.dataclass(frozen=True)
class ValidationBatches:
    """The validation text once, in fixed order; iterate it as often as wanted."""

    labels: int | None  # targets of a row that count, at most; None: all
    num_tokens: int  # that can be predicted, in all
    text_bytes: int
    fingerprint: str  # of text and tokenizer
    streams: list[Stream]
    tokenizer: Tokenizer
    _packs: packing.Packs
    _context_length: int
    _make: Callable[[np.ndarray, list[tuple[int, ...]]], Batch]
    batch_size: int  # rows of a batch, of which `only` leaves some
    _max_batches: int  # 0: all
    _rows: Sequence[int]

    def only(self, rows: Sequence[int]) -> "ValidationBatches":
        """The same batches, of each these rows alone."""
        return dataclasses.replace(self, _rows=rows)

    def at_most(self, max_batches: int) -> "ValidationBatches":
        """So many batches, spread evenly over the text; 0: all."""
        return dataclasses.replace(self, _max_batches=max_batches)

    def __len__(self) -> int:
        """Number of batches."""
        batches = -(-len(self._packs) // self.batch_size)
        return min(batches, self._max_batches) if self._max_batches else batches

    def __iter__(self) -> Iterator[Batch]:
        for i in range(len(self)):
            yield self._batch(self._indices(i))

    def _indices(self, i: int) -> list[int]:
        """The packs of a batch. Some of the batches are spread over the text."""
        all_batches = -(-len(self._packs) // self.batch_size)
        first = i * all_batches // len(self) * self.batch_size
        return [first + row for row in self._rows if first + row < len(self._packs)]

    @property
    def num_documents(self) -> int:
        return sum(len(stream.starts) for stream in self.streams)

    def documents(self, i: int) -> np.ndarray:
        """Of batch number i: the document, 0, 1, ... of all streams, that each target ends or stands in, int [b, T];
        -1 where there is none."""
        found = np.full((len(self._rows), self._context_length), -1)
        counts = [len(stream.starts) for stream in self.streams]
        before = {id(s): sum(counts[:i]) for i, s in enumerate(self.streams)}
        for row, index in enumerate(self._indices(i)):
            stream, start = self._packs.position(index)
            inputs = np.arange(start, min(start + self._context_length, stream.num_targets), dtype=np.uint64)
            found[row, : len(inputs)] = before[id(stream)] + np.searchsorted(stream.starts, inputs, side="right") - 1
        return found

    def _batch(self, indices: Sequence[int]) -> Batch:
        seeds = [masking.validation_seed(i) for i in indices]
        batch = self._make(self._packs.read(indices, len(self._rows)), seeds)
        batch["bytes"] = np.zeros_like(batch["weights"])
        if self.labels is not None:  # bits per byte would be of other bytes than everybody's
            return batch
        for row, i in enumerate(indices):
            stream, start = self._packs.position(i)
            stop = min(start + self._context_length, stream.num_targets)
            batch["bytes"][row, : stop - start] = stream.bytes_of(start + 1, stop + 1, self.tokenizer.token_bytes)
        return batch


def validation_batches(
    config: "Config", context_length: int | None = None, source: str | None = None, max_batches: int = 0
) -> ValidationBatches | synthetic.ValidationRows | row_batches.ValidationBatches:
    """The validation split, or all text of another source, each token predicted once.

    Args:
      context_length: tokens a row; None: train.context_length.
      source: None: data.validation_source, or the validation split of data.source. `stdlib`: its validation split. Else
        a path or glob, all of it.
      max_batches: 0: all; else that many, spread evenly over the text.

    Returns:
      An iterable with a length. Its batches are those of training, and `bytes`: float32 [b, T], the bytes of text that
      the target stands for (separators 0). The last batch is filled up with rows of weight 0.

    Raises:
      UsageError: as `training_dataset`.
    """
    if source is None and (of_rows := row_batches.find(config)):
        return row_batches.ValidationBatches(of_rows, config.eval.batch_size or config.train.batch_size, max_batches)
    if task := asked.task_of(config, source or config.data.validation_source or None, context_length):
        return synthetic.validation_rows(task, config, max_batches)
    tokenizer = asked.text(config)[2]
    length = config.train.context_length if context_length is None else context_length
    if length < 1:
        raise UsageError(f"context length: got {length}, expected at least 1 token")
    streams = asked.validation_streams(config, source, tokenizer)
    return ValidationBatches(
        labels=asked.labels(config, training=False, context_length=length),
        num_tokens=sum(stream.num_targets for stream in streams),
        text_bytes=sum(stream.text_bytes for stream in streams),
        fingerprint=content_hash([stream.fingerprint for stream in streams], tokenizer.fingerprint),
        streams=streams,
        tokenizer=tokenizer,
        _packs=packing.Packs(streams, length),
        _context_length=length,
        _make=asked.batch_maker(config, tokenizer),
        batch_size=config.eval.batch_size or config.train.batch_size,
        _max_batches=max_batches,
        _rows=range(config.eval.batch_size or config.train.batch_size),
    )
