"""Masked tokens to predict, for models that see both ways (Devlin et al. 2018, arXiv:1810.04805; spans: 1907.10529).

Of a row's tokens a share is chosen, the same number of each row as long: round(share * tokens), at least one. The model
predicts the chosen ones where they stand. It reads the mask token for most of them, another token for some, and the
rest as they are. Separators are never chosen: segments tell them anyway.

The mask token's id is the first one after the tokenizer's, so that no text can hold it, whatever the tokenizer is.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from zoo.data import packing

if TYPE_CHECKING:
    from zoo.config import Config, MaskConfig

_TRAINING, _VALIDATION = 0, 1  # parts of the seed


def is_objective(config: "Config") -> bool:
    return config.train.objective == "masked_tokens"


def labels(config: "Config", context_length: int) -> int:
    """Tokens of a row that are predicted, at most."""
    return int(_count(config.train.mask.share, np.int64(context_length)))


def training_seed(config: "Config", step: int, row: int) -> tuple[int, ...]:
    return (_TRAINING, config.train.seed, int(step), int(row))


def validation_seed(index: int) -> tuple[int, ...]:
    """Of the row `index` of the validation text: the same masks in every evaluation, and for every train.seed."""
    return (_VALIDATION, int(index), 0, 0)


def to_batch(
    rows: np.ndarray, separator_id: int, mask_id: int, mask: "MaskConfig", seeds: Sequence[tuple[int, ...]]
) -> dict[str, np.ndarray]:
    """What the model takes, from rows of `zoo.data.packing.Packs`, whose last token is the next row's.

    Args:
      rows: int32 [b, T + 1].
      mask_id: of the mask token; the ids of text lie below it.
      seeds: of each row's draws. Rows beyond them are padding.

    Returns:
      tokens, targets, segment_ids: int32 [b, T]; weights: float32 [b, T]. targets are the text; weights are 1 at chosen
      tokens, else 0. At the text's last token and behind it all are 0, as where the next token is predicted.
    """
    text = rows[:, :-1]
    is_text = rows[:, 1:] != packing.NOTHING
    can_be_chosen = is_text & (text != separator_id)
    segment_ids = packing.segment_ids(text, separator_id)
    draws = [np.random.default_rng(seed) for seed in seeds]
    shape = (len(seeds), text.shape[1])
    rank, way, other = np.ones(text.shape), np.zeros(text.shape), np.zeros(text.shape, np.int32)
    for i, draw in enumerate(draws):
        rank[i], way[i] = draw.random(shape[1]), draw.random(shape[1])
        other[i] = draw.integers(0, mask_id - 1, shape[1])
    other += other >= separator_id  # any token of text but the separator
    rank, way = _over_spans(rank, way, segment_ids, mask.span_length)

    order = np.argsort(np.where(can_be_chosen, rank, np.inf), axis=1, kind="stable")
    place = np.empty_like(order)
    np.put_along_axis(place, order, np.arange(order.shape[1]), axis=1)
    chosen = (place < _count(mask.share, can_be_chosen.sum(1, keepdims=True))) & can_be_chosen
    replaced = np.where(way < mask.masked, mask_id, np.where(way < mask.masked + mask.random, other, text))
    batch = {"tokens": np.where(chosen, replaced, text), "targets": text, "segment_ids": segment_ids}
    batch = {name: np.ascontiguousarray(np.where(is_text, x, 0), np.int32) for name, x in batch.items()}
    return batch | {"weights": chosen.astype(np.float32)}


def _count(share: float, tokens: np.ndarray) -> np.ndarray:
    return np.maximum(1, np.rint(share * tokens)).astype(np.int64)


def _over_spans(
    rank: np.ndarray, way: np.ndarray, segment_ids: np.ndarray, length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Of each token the least rank of the spans that hold it, of `length` tokens within a document, and the way of that
    span: to choose tokens by rank is then to choose spans, the last of which may be cut."""
    found, found_way = rank.copy(), way.copy()
    for back in range(1, min(length, rank.shape[1])):
        here = (rank[:, :-back] < found[:, back:]) & (segment_ids[:, :-back] == segment_ids[:, back:])
        found[:, back:] = np.where(here, rank[:, :-back], found[:, back:])
        found_way[:, back:] = np.where(here, way[:, :-back], found_way[:, back:])
    return found, found_way
