"""Text to batches. `tokenizer` holds the tokenizers."""

from zoo.data import baselines, tokenizer
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
    "labels",
    "settle",
    "table_figures",
    "tokenize",
    "tokenizer",
    "training_dataset",
    "validation_batches",
    "vocabulary",
]
