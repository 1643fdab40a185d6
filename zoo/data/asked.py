"""What a config asks of its data: the sizes that are left to it, its text as streams, and what cannot be had."""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import numpy as np

from zoo import lists, processes
from zoo.data import baselines, cache, corpora, masking, packing, row_batches, synthetic
from zoo.data import tokenizer as tokenizers
from zoo.data.rows import Batch
from zoo.data.streams import Stream
from zoo.data.tokenizer import Tokenizer
from zoo.errors import UsageError, warn

if TYPE_CHECKING:
    from zoo.config import Config

VOCAB_MULTIPLE = 64


def check(config: "Config") -> None:
    """Check the settings of `data` that need files, without tokenizing: sources, weights, tokenizer, vocabulary.

    Raises:
      UsageError: the first problem found.
    """
    if source := row_batches.find(config):
        baselines.check(source, config.data.season)
        row_batches.check(source, config)
        return
    if task := task_of(config):
        _weights(config.data.weights, 1)
        if config.data.validation_source:
            raise UsageError(f"data.validation_source: {task.name} has validation rows of its own; leave it empty")
        return
    sources = text(config)[0]
    if config.data.validation_source:
        validation = corpora.find(config.data.validation_source, config.data.text_field, "data.validation_source")
        if any(validation.overlaps(source) for source in sources) and validation.spec != corpora.STDLIB:
            warn("data.validation_source: training reads it too, so its loss says nothing of new text")


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
    task = task_of(config)
    return max(tokenizer.vocab_size + masking.is_objective(config), task.vocab_size if task else 0)


def labels(config: "Config", *, training: bool, context_length: int | None = None) -> int | None:
    """Targets of a row that count, at most, in training or in an evaluation; None: all do."""
    if config.model.head != "tokens":
        return None
    if masking.is_objective(config):
        return masking.labels(config, context_length or config.train.context_length)
    return synthetic.labels(config, training=training)


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
        sources, _, tokenizer = text(config)
        for source in sources:
            streams(config, source, tokenizer)
        if config.data.validation_source:
            validation_streams(config, None, tokenizer)
    processes.barrier()


def batch_maker(config: "Config", tokenizer: Tokenizer) -> Callable[[np.ndarray, list[tuple[int, ...]]], Batch]:
    """What makes a batch of rows of `packing.Packs`, and of a seed each."""
    if not masking.is_objective(config):
        return lambda rows, seeds: packing.to_batch(rows, tokenizer.separator_id)
    separator, mask_id, mask = tokenizer.separator_id, tokenizer.vocab_size, config.train.mask
    return lambda rows, seeds: masking.to_batch(rows, separator, mask_id, mask, seeds)


def task_of(config: "Config", source: str | None = None, context_length: int | None = None) -> synthetic.Task | None:
    """`synthetic.find`; UsageError for a task where tokens are masked."""
    task = synthetic.find(config, source, context_length)
    if task and masking.is_objective(config):
        raise UsageError(
            f"data.source: {task.name} asks for the next token, which a bidirectional model reads; masked_tokens needs "
            "text, or train the task with model.direction=causal and train.objective=next_token"
        )
    return task


def text(config: "Config") -> tuple[list[corpora.Source], list[float], Tokenizer]:
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


def streams(config: "Config", source: corpora.Source, tokenizer: Tokenizer, whole: bool = False) -> dict[str, Stream]:
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
    lost, represented = text_bytes(streams.values())
    if lost > config.data.max_lost_text * (lost + represented):
        raise UsageError(
            f"data.tokenizer: it has no tokens for {lost / (lost + represented):.1%} of the text of {source.spec!r} "
            f"({lost:,} bytes), more than data.max_lost_text = {config.data.max_lost_text:g}; use another tokenizer, "
            "or allow a larger share"
        )
    return streams


def validation_streams(config: "Config", source: str | None, tokenizer: Tokenizer) -> list[Stream]:
    data, setting = config.data, "source"
    if source is None and data.validation_source:
        source, setting = data.validation_source, "data.validation_source"
    if source is None:
        found = [streams(config, s, tokenizer) for s in corpora.find_all(data.source, data.text_field)]
    else:
        found = [streams(config, corpora.find(source, data.text_field, setting), tokenizer, whole=True)]
    return [streams.get("validation", streams["train"]) for streams in found]


def text_bytes(streams: Iterable[Stream]) -> tuple[int, int]:
    """Those lost, and those that tokens stand for."""
    return sum(stream.lost_bytes for stream in streams), sum(stream.text_bytes for stream in streams)
