"""Text to batches. `tokenizer` holds the tokenizers."""

from zoo.data import tokenizer
from zoo.data.pipeline import (
    TrainingDataset,
    ValidationBatches,
    check,
    corpus_info,
    training_dataset,
    validation_batches,
)

__all__ = [
    "TrainingDataset",
    "ValidationBatches",
    "check",
    "corpus_info",
    "tokenizer",
    "training_dataset",
    "validation_batches",
]
