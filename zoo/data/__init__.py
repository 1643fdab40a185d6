"""Text to batches, and rows for other heads. `tokenizer` holds the tokenizers."""

from zoo.data import baselines, labelled, series, tokenizer
from zoo.data.pipeline import (
    TrainingDataset,
    ValidationBatches,
    check,
    corpus_info,
    labels,
    settle,
    table_figures,
    tokenize,
    training_dataset,
    validation_batches,
    vocabulary,
)
from zoo.data.yardstick import conclusion

__all__ = [
    "TrainingDataset",
    "ValidationBatches",
    "baselines",
    "check",
    "conclusion",
    "corpus_info",
    "labelled",
    "labels",
    "series",
    "settle",
    "table_figures",
    "tokenize",
    "tokenizer",
    "training_dataset",
    "validation_batches",
    "vocabulary",
]
