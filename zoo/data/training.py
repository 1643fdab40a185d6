"""Batches of training, in shuffled order.

The state of the training data is the global step alone. The packs of all sources are shuffled as a whole (Grain's index
shuffle: another order each epoch, nothing held in memory), repeated for ever, and cut into batches that run over the
ends of epochs. Batch `step` is computed from its number, so a run continues at any step without reading what came
before; each of several processes takes the rows of the same global batch that its devices hold.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import grain
import numpy as np

from zoo.data import asked, masking, packing, row_batches, synthetic
from zoo.data.rows import Batch, RowSource
from zoo.data.streams import content_hash
from zoo.errors import UsageError

if TYPE_CHECKING:
    from zoo.config import Config

_STEPS = 2**31 - 1  # of a dataset without end


@dataclasses.dataclass(frozen=True)
class TrainingDataset:
    """Batches of a run, by step."""

    tokens_per_epoch: int  # each is predicted once in an epoch; of a weighted mixture: all tokens of its sources
    tokens_per_step: int  # of the whole batch
    fingerprint: str  # of text, tokenizer and mixture
    _batches: grain.MapDataset  # random access by step
    _read_threads: int
    _rows: grain.MapDataset | None = None  # of text: the rows of the whole batches, one by one
    _rows_per_step: int = 0

    def iterator(self, start_step: int = 0) -> Iterator[Batch]:
        """The batches from `start_step` on, without end; `close()` stops the threads that read ahead.

        Each is a dict of tokens, targets, segment_ids int32 [b, T] and weights float32 [b, T], of the b rows that were
        asked for. `zoo.data.packing` defines them.
        """
        threads = self._read_threads
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
        batches = iter(self._batches.to_iter_dataset(options))
        batches.set_state({"next_index": start_step})
        try:
            yield from batches
        finally:
            batches.close()

    def rows(self, steps: int) -> Iterator[np.ndarray]:
        """Inputs and last target [at most T + 1] of each row of the first `steps` batches of text, an epoch at most.
        They are read one by one, for a batch may be larger than the memory."""
        steps = min(steps, -(-self.tokens_per_epoch // self.tokens_per_step))
        for i in range(steps * self._rows_per_step):
            yield self._rows[i]


def training_dataset(config: "Config", rows: Sequence[int] | None = None) -> TrainingDataset:
    """The training split of data.source, tokenized on first use, or a synthetic task's endless fresh rows.

    Args:
      rows: of each batch, to read no others; None: all.

    Raises:
      UsageError: a setting of `data` that cannot be used, text that cannot be read, too little of it.
    """
    length, batch_size = config.train.context_length, config.train.batch_size
    rows = range(batch_size) if rows is None else rows
    if source := row_batches.find(config):
        return _dataset_of_rows(config, source, rows)
    if task := asked.task_of(config):
        return _synthetic_dataset(config, task, rows)
    sources, weights, tokenizer = asked.text(config)
    streams = [asked.streams(config, source, tokenizer)["train"] for source in sources]
    for source, stream in zip(sources, streams, strict=True):
        if stream.num_targets < length:
            raise UsageError(
                f"data.source: the training text of {source.spec!r} has {stream.num_targets} tokens, fewer than one "
                f"context of {length}; use more text, or a train.context_length of at most {stream.num_targets}"
            )
    packs = packing.Packs(streams, length)
    orders = [
        grain.MapDataset.range(part.start, part.stop).seed(config.train.seed).shuffle().repeat()
        for part in (packs.ranges() if weights else [range(len(packs))])
    ]  # Grain orders the numbers of packs: it costs less for a number than for an array
    order = grain.MapDataset.mix(orders, weights) if weights else orders[0]
    make = asked.batch_maker(config, tokenizer)

    def batch(step):
        indices = [order[int(step) * batch_size + row] for row in rows]
        return make(packs.read(indices, len(rows)), [masking.training_seed(config, step, row) for row in rows])

    return TrainingDataset(
        tokens_per_epoch=sum(stream.num_targets for stream in streams),
        tokens_per_step=batch_size * length,
        fingerprint=content_hash([stream.fingerprint for stream in streams], tokenizer.fingerprint, weights),
        _batches=grain.MapDataset.range(_STEPS).map(batch),
        _read_threads=config.data.read_threads,
        _rows=order.map(packs.row),
        _rows_per_step=batch_size,
    )


def _dataset_of_rows(config: "Config", source: RowSource, rows: Sequence[int]) -> TrainingDataset:
    batch_size = config.train.batch_size
    return TrainingDataset(
        tokens_per_epoch=(source.train_rows or config.train.steps * batch_size) * source.length,
        tokens_per_step=batch_size * source.length,
        fingerprint=content_hash(source.fingerprint),
        _batches=grain.MapDataset.range(_STEPS).map(
            lambda step: row_batches.training_batch(source, config, step, rows)
        ),
        _read_threads=config.data.read_threads,
    )


def _synthetic_dataset(config: "Config", task: synthetic.Task, rows: Sequence[int]):
    def batch(step):
        return {name: array[list(rows)] for name, array in synthetic.training_batch(task, config, step).items()}

    return TrainingDataset(
        tokens_per_epoch=config.train.steps * config.train.batch_size * config.train.context_length,
        tokens_per_step=config.train.batch_size * config.train.context_length,
        fingerprint=content_hash(str(task), config.train.seed),
        _batches=grain.MapDataset.range(_STEPS).map(batch),
        _read_threads=config.data.read_threads,
    )
