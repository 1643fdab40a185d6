"""What a run's summary says of its data."""

from typing import TYPE_CHECKING, Any

from zoo.data import asked, baselines, row_batches, synthetic, yardstick
from zoo.data.streams import content_hash
from zoo.data.training import TrainingDataset
from zoo.data.validation import ValidationBatches

if TYPE_CHECKING:
    from zoo.config import Config


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
    sources, weights, tokenizer = asked.text(config)
    train = [asked.streams(config, source, tokenizer)["train"] for source in sources]
    validation = asked.validation_streams(config, None, tokenizer)
    lost, represented = asked.text_bytes([*train, *validation])
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
