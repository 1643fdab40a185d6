"""Text to batches, and rows for other heads. `tokenizer` holds the tokenizers."""

from zoo.data import baselines, labelled, series, tokenizer
from zoo.data.asked import check, labels, settle, tokenize, vocabulary
from zoo.data.corpus_info import corpus_info, table_figures
from zoo.data.training import TrainingDataset, training_dataset
from zoo.data.validation import ValidationBatches, validation_batches
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
