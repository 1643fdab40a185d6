"""Streams of tokens cut into rows of equal length.

Pack i of a stream takes tokens[i T : i T + T] as inputs and tokens[i T + 1 : i T + T + 1] as targets, so that each
token is predicted exactly once an epoch, however long the documents are. The last pack is filled up with weight 0.
"""

import bisect
import itertools
from collections.abc import Sequence

import numpy as np

from zoo.data.streams import Stream

NOTHING = -1  # in a row: behind the stream's end


class Packs:
    """The packs of several streams, one stream after the other."""

    def __init__(self, streams: Sequence[Stream], context_length: int):
        self._streams, self._context_length = streams, context_length
        counts = (-(-stream.num_targets // context_length) for stream in streams)
        self._ends = list(itertools.accumulate(counts))

    def __len__(self) -> int:
        return self._ends[-1]

    def ranges(self) -> list[range]:
        """The packs of each stream."""
        return [range(start, stop) for start, stop in itertools.pairwise([0, *self._ends])]

    def row(self, index: int) -> np.ndarray:
        """Inputs and last target of a pack, [at most T + 1]."""
        stream, start = self.position(index)
        return np.asarray(stream.tokens[start : start + self._context_length + 1], np.int32)

    def read(self, indices: Sequence[int], num_rows: int) -> np.ndarray:
        """Rows of inputs and last target, int32 [num_rows, T + 1]; those without a pack have nothing to predict."""
        rows = np.full((num_rows, self._context_length + 1), NOTHING, np.int32)
        for row, index in zip(rows, indices, strict=False):
            tokens = self.row(index)
            row[: len(tokens)] = tokens
        return rows

    def position(self, index: int) -> tuple[Stream, int]:
        """The stream of a pack, and the position of its first input there."""
        i = bisect.bisect_right(self._ends, index)
        first = self._ends[i - 1] if i else 0
        return self._streams[i], (index - first) * self._context_length


def to_batch(rows: np.ndarray, separator_id: int) -> dict[str, np.ndarray]:
    """What the model takes, from rows of `Packs`.

    Args:
      rows: int32 [b, T + 1].

    Returns:
      tokens, targets, segment_ids: int32 [b, T]; weights: float32 [b, T]. Segments are numbered 1, 2, ... within a row;
      a separator starts a new one. Where there is nothing to predict, weight and segment are 0.
    """
    tokens, targets = rows[:, :-1], rows[:, 1:]
    batch = {"tokens": tokens, "targets": targets, "segment_ids": segment_ids(tokens, separator_id)}
    weights = (targets != NOTHING).astype(np.float32)
    if not weights.all():
        batch = {name: np.where(weights > 0, array, 0) for name, array in batch.items()}
    return {name: np.ascontiguousarray(array, np.int32) for name, array in batch.items()} | {"weights": weights}


def segment_ids(tokens: np.ndarray, separator_id: int) -> np.ndarray:
    """1, 2, ... in each row [b, T]; a separator starts a segment."""
    is_separator = tokens == separator_id
    return np.cumsum(is_separator, axis=1, dtype=np.int32) + 1 - is_separator[:, :1]
