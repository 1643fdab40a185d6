"""The stream of tokens that a corpus is, and its rows, by plain code."""

import numpy as np

SEPARATOR = 256  # of the byte tokenizer


def stream_of(documents):
    return np.concatenate([[SEPARATOR, *document] for document in documents] + [[SEPARATOR]])


def rows_of(batch):
    """(inputs, targets) of every row, what is filled up left out."""
    rows = zip(batch["tokens"], batch["targets"], batch["weights"] > 0, strict=True)
    return [(tuple(tokens[kept].tolist()), tuple(targets[kept].tolist())) for tokens, targets, kept in rows]
