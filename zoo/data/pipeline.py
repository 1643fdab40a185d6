"""From a config to batches: training in shuffled order, validation in fixed order.

The state of the training data is the global step alone. The packs of all sources are shuffled as a whole (Grain's index
shuffle: another order each epoch, nothing held in memory), repeated for ever, and cut into batches that run over the
ends of epochs. Batch `step` is computed from its number, so a run continues at any step without reading what came
before; each of several processes takes the rows of the same global batch that its devices hold.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import grain
import numpy as np

from zoo import lists, processes
from zoo.data import baselines, cache, corpora, masking, packing, row_batches, synthetic, yardstick
from zoo.data import tokenizer as tokenizers
from zoo.data.rows import RowSource
from zoo.data.streams import Stream, content_hash
from zoo.data.tokenizer import Tokenizer
from zoo.errors import UsageError, warn

if TYPE_CHECKING:
    from zoo.config import Config

Batch = dict[str, np.ndarray]

VOCAB_MULTIPLE = 64
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


def tokenize(config: "Config") -> None:
    """What several processes do before they open their text: fill the token cache, each text once.

    Of those that share data.cache_dir one tokenizes while the others wait: process 0, or, where it is a folder of their
    own machine, the first there.

    Raises:
      UsageError: as `training_dataset`.
    """
    if processes.count() == 1 or row_batches.find(config) or synthetic.find(config):
        return
    root = cache.root_of(config.data.cache_dir)
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cache.unwritable(root, error) from error
    if not processes.shares_with_first(root) or processes.is_first():
        sources, _, tokenizer = _settings(config)
        for source in sources:
            _streams(config, source, tokenizer)
        if config.data.validation_source:
            _validation_streams(config, None, tokenizer)
    processes.barrier()


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
    if task := _task(config):
        return _synthetic_dataset(config, task, rows)
    sources, weights, tokenizer = _settings(config)
    streams = [_streams(config, source, tokenizer)["train"] for source in sources]
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
    make = _objective(config, tokenizer)

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
    if task := _task(config, source or config.data.validation_source or None, context_length):
        return synthetic.validation_rows(task, config, max_batches)
    tokenizer = _settings(config)[2]
    length = config.train.context_length if context_length is None else context_length
    if length < 1:
        raise UsageError(f"context length: got {length}, expected at least 1 token")
    streams = _validation_streams(config, source, tokenizer)
    return ValidationBatches(
        labels=labels(config, training=False, context_length=length),
        num_tokens=sum(stream.num_targets for stream in streams),
        text_bytes=sum(stream.text_bytes for stream in streams),
        fingerprint=content_hash([stream.fingerprint for stream in streams], tokenizer.fingerprint),
        streams=streams,
        tokenizer=tokenizer,
        _packs=packing.Packs(streams, length),
        _context_length=length,
        _make=_objective(config, tokenizer),
        batch_size=config.eval.batch_size or config.train.batch_size,
        _max_batches=max_batches,
        _rows=range(config.eval.batch_size or config.train.batch_size),
    )


def corpus_info(config: "Config") -> dict[str, Any]:
    """What a run reads: source, fingerprint, train_tokens, validation_tokens, train_bytes, validation_bytes (those that
    tokens stand for), lost_text (the share of all bytes that the tokenizer has no tokens for), and gzip_bits_per_byte,
    what gzip -9 needs for the validation text (its first 64 MiB, documents joined); None without bytes. Of rows also
    train_rows and validation_rows, and of series what `zoo.data.baselines` finds.

    Raises:
      UsageError: as `training_dataset`.
    """
    if of_rows := row_batches.find(config):
        found = row_batches.info(of_rows, config)
        return found | ({"baselines": baselines.measure(of_rows, config.data.season)} if of_rows.horizon else {})
    if task := synthetic.find(config):
        rows = synthetic.validation_rows(task, config, 0)
        tokens = config.train.steps * config.train.batch_size * config.train.context_length
        return {
            "source": config.data.source,
            "fingerprint": content_hash(rows.fingerprint)[:16],
            "train_tokens": tokens,
            "validation_tokens": rows.num_tokens,
            "train_bytes": 0,
            "validation_bytes": 0,
            "lost_text": 0.0,
            "gzip_bits_per_byte": None,
        }
    sources, weights, tokenizer = _settings(config)
    train = [_streams(config, source, tokenizer)["train"] for source in sources]
    validation = _validation_streams(config, None, tokenizer)
    lost, represented = _text_bytes([*train, *validation])
    return {
        "source": config.data.source,
        "fingerprint": content_hash([[s.fingerprint for s in streams] for streams in (train, validation)])[:16],
        "train_tokens": sum(stream.num_targets for stream in train),
        "validation_tokens": sum(stream.num_targets for stream in validation),
        "train_bytes": sum(stream.text_bytes for stream in train),
        "validation_bytes": sum(stream.text_bytes for stream in validation),
        "lost_text": lost / (lost + represented),
        "gzip_bits_per_byte": yardstick.gzip_bits_per_byte(validation, tokenizer),
    }


def table_figures(dataset: TrainingDataset, validation: ValidationBatches, steps: int) -> dict[str, Any]:
    """What a table of the tokens of a run's first `steps` needs for its validation text (`zoo.data.yardstick`).

    Returns:
      table_order, table_bits_per_byte, and table_bytes, of training text, that were counted; None for rows of a
      synthetic task, which stand for no text, and for masked tokens, which have text on both sides.
    """
    if validation.labels is not None:
        return {"table_order": None, "table_bits_per_byte": None, "table_bytes": None}
    rows = dataset.rows(steps)
    bits, counted = yardstick.table_bits_per_byte(rows, validation.streams, validation.tokenizer)
    return {"table_order": yardstick.ORDER, "table_bits_per_byte": bits, "table_bytes": counted}


def check(config: "Config") -> None:
    """Check the settings of `data` that need files, without tokenizing: sources, weights, tokenizer, vocabulary.

    Raises:
      UsageError: the first problem found.
    """
    if source := row_batches.find(config):
        baselines.check(source, config.data.season)
        row_batches.check(source, config)
        return
    if task := _task(config):
        _weights(config.data.weights, 1)
        if config.data.validation_source:
            raise UsageError(f"data.validation_source: {task.name} has validation rows of its own; leave it empty")
        return
    sources = _settings(config)[0]
    if config.data.validation_source:
        validation = corpora.find(config.data.validation_source, config.data.text_field, "data.validation_source")
        if any(validation.overlaps(source) for source in sources) and validation.spec != corpora.STDLIB:
            warn("data.validation_source: training reads it too, so its loss says nothing of new text")


def labels(config: "Config", *, training: bool, context_length: int | None = None) -> int | None:
    """Targets of a row that count, at most, in training or in an evaluation; None: all do."""
    if config.model.head != "tokens":
        return None
    if masking.is_objective(config):
        return masking.labels(config, context_length or config.train.context_length)
    return synthetic.labels(config, training=training)


def settle(config: "Config", load_tokenizer: Callable[[], Tokenizer]) -> None:
    """Give the model the sizes that were left to the data: model.vocab_size (a multiple of 64), classes, channels."""
    model, source = config.model, row_batches.find(config)
    if source:
        model.classes, model.channels = model.classes or source.num_classes, model.channels or source.channels
    if model.vocab_size == 0 and not model.channels:
        needed = source.vocab_size if source else vocabulary(config, load_tokenizer())
        model.vocab_size = -(-needed // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def vocabulary(config: "Config", tokenizer: Tokenizer) -> int:
    """Ids that the model needs: the tokenizer's, the mask token's after them, or a synthetic task's."""
    task = _task(config)
    return max(tokenizer.vocab_size + masking.is_objective(config), task.vocab_size if task else 0)


def _objective(config: "Config", tokenizer: Tokenizer) -> Callable[[np.ndarray, list[tuple[int, ...]]], Batch]:
    """What makes a batch of rows of `packing.Packs`, and of a seed each."""
    if not masking.is_objective(config):
        return lambda rows, seeds: packing.to_batch(rows, tokenizer.separator_id)
    separator, mask_id, mask = tokenizer.separator_id, tokenizer.vocab_size, config.train.mask
    return lambda rows, seeds: masking.to_batch(rows, separator, mask_id, mask, seeds)


def _task(config: "Config", source: str | None = None, context_length: int | None = None) -> synthetic.Task | None:
    """`synthetic.find`; UsageError for a task where tokens are masked."""
    task = synthetic.find(config, source, context_length)
    if task and masking.is_objective(config):
        raise UsageError(
            f"data.source: {task.name} asks for the next token, which a bidirectional model reads; masked_tokens needs "
            "text, or train the task with model.direction=causal and train.objective=next_token"
        )
    return task


def _settings(config: "Config") -> tuple[list[corpora.Source], list[float], Tokenizer]:
    data = config.data
    sources = corpora.find_all(data.source, data.text_field)
    weights = _weights(data.weights, len(sources))
    if data.validation_source:
        corpora.find(data.validation_source, data.text_field, "data.validation_source")
    tokenizer = tokenizers.load(data.tokenizer)
    if 0 < config.model.vocab_size <= tokenizer.vocab_size and masking.is_objective(config):
        raise UsageError(
            f"model.vocab_size: {config.model.vocab_size} has no id for the mask token, which is the first after the "
            f"tokenizer's {tokenizer.vocab_size}; use 0 (chosen by both) or at least {tokenizer.vocab_size + 1}"
        )
    if 0 < config.model.vocab_size < tokenizer.vocab_size:
        raise UsageError(
            f"model.vocab_size: {config.model.vocab_size} is smaller than the tokenizer's largest id, "
            f"{tokenizer.vocab_size - 1}; use 0 (chosen by the tokenizer) or at least {tokenizer.vocab_size}"
        )
    return sources, weights, tokenizer


def _weights(text: str, num_sources: int) -> list[float]:
    """Empty: none given."""
    try:
        weights = lists.weights(text)
    except ValueError as error:
        raise UsageError(f"data.weights: {error}") from error
    if weights and len(weights) != num_sources:
        raise UsageError(f"data.weights: got {len(weights)} for {num_sources} source(s); expected one for each")
    return weights


def _streams(config: "Config", source: corpora.Source, tokenizer: Tokenizer, whole: bool = False) -> dict[str, Stream]:
    """`whole`: the source is for validation, all of it."""
    keeps_split = source.spec == corpora.STDLIB or not (whole or config.data.validation_source)
    fraction = config.data.validation_fraction if keeps_split else 0.0
    streams = cache.open_streams(source, tokenizer, fraction, config.data.cache_dir)
    size, largest = config.model.vocab_size or tokenizer.vocab_size, max(s.max_id for s in streams.values())
    if largest >= size:
        folder = cache.root_of(config.data.cache_dir)
        raise UsageError(
            f"data.source: the token cache of {source.spec!r} holds token {largest}, beyond a vocabulary of {size}; "
            f"delete {folder}, and check data.tokenizer and model.vocab_size"
        )
    lost, represented = _text_bytes(streams.values())
    if lost > config.data.max_lost_text * (lost + represented):
        raise UsageError(
            f"data.tokenizer: it has no tokens for {lost / (lost + represented):.1%} of the text of {source.spec!r} "
            f"({lost:,} bytes), more than data.max_lost_text = {config.data.max_lost_text:g}; use another tokenizer, "
            "or allow a larger share"
        )
    return streams


def _validation_streams(config: "Config", source: str | None, tokenizer: Tokenizer) -> list[Stream]:
    data, setting = config.data, "source"
    if source is None and data.validation_source:
        source, setting = data.validation_source, "data.validation_source"
    if source is None:
        found = [_streams(config, s, tokenizer) for s in corpora.find_all(data.source, data.text_field)]
    else:
        found = [_streams(config, corpora.find(source, data.text_field, setting), tokenizer, whole=True)]
    return [streams.get("validation", streams["train"]) for streams in found]


def _text_bytes(streams: Iterable[Stream]) -> tuple[int, int]:
    """Those lost, and those that tokens stand for."""
    return sum(stream.lost_bytes for stream in streams), sum(stream.text_bytes for stream in streams)
