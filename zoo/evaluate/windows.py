"""Long pieces of single documents, for what is measured at long contexts."""

import numpy as np

from zoo import data
from zoo.errors import UsageError
from zoo.evaluate.task import Request

_FEWEST = 4  # documents


def longest_windows(request: Request, task: str) -> np.ndarray:
    """The beginnings of documents of the validation text, int32 [n, L + 1]: n documents of at least 16 training
    lengths, spread evenly over those there are; of 8, 4, 2 or 1 where fewer than four are as long. n is what
    `request.reader` reads at once, but at least 4.

    Raises:
      UsageError: fewer than four documents have a training length.
    """
    batches = data.validation_batches(request.config, request.training_length)
    spans = [
        (stream, start, stop - start)
        for stream in batches.streams
        for start, stop in zip(stream.starts.tolist(), [*stream.starts[1:].tolist(), stream.num_targets], strict=True)
    ]
    for length in reversed(request.multiples()):
        long = [(stream, start) for stream, start, size in spans if size >= length]
        if len(long) >= _FEWEST:
            count = min(len(long), max(_FEWEST, request.reader.rows))
            chosen = [long[i * len(long) // count] for i in range(count)]
            return np.stack([np.asarray(s.tokens[start : start + length + 1], np.int32) for s, start in chosen])
    raise UsageError(
        f"--tasks: {task}: the validation text has fewer than {_FEWEST} documents of {request.training_length} tokens "
        "or more (a training context); give a --source with longer ones, or other tasks"
    )
