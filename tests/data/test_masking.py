"""Masked tokens: which are chosen, what stands in their place, and that a row's draws are a function of its place."""

import itertools

import numpy as np
import pytest
from plain_streams import SEPARATOR

from zoo import config as zoo_config
from zoo.config import MaskConfig
from zoo.data import check, labels, masking, training_dataset, validation_batches, vocabulary
from zoo.data.tokenizer import ByteTokenizer
from zoo.errors import UsageError

MASK = ByteTokenizer.vocab_size
T = 400


def rows_of_text(count=6):
    """Documents of 60 bytes; the last row ends early."""
    rows = np.random.default_rng(0).integers(0, 256, (count, T + 1), dtype=np.int32)
    rows[:, ::61] = SEPARATOR
    rows[-1, 100:] = -1
    return rows


def masked(rows, first_seed=0, **settings):
    seeds = [masking.validation_seed(first_seed + i) for i in range(len(rows))]
    return masking.to_batch(rows, SEPARATOR, MASK, MaskConfig(**settings), seeds)


def test_a_share_of_each_row_is_chosen_and_80_10_10_of_it_is_masked_changed_and_kept():
    rows = rows_of_text(600)
    batch = masked(rows, share=0.15)
    text, chosen, kinds = rows[:, :-1], batch["weights"] > 0, []
    for tokens, of_text, here, there in zip(batch["tokens"], text, chosen, rows[:, 1:] >= 0, strict=True):
        candidates = (of_text != SEPARATOR) & there
        assert here.sum() == round(0.15 * candidates.sum()) and candidates[here].all()
        assert (tokens[~here & there] == of_text[~here & there]).all()
        kinds += np.where(tokens == MASK, 0, np.where(tokens == of_text, 2, 1))[here].tolist()
    behind = rows[:, 1:] < 0
    assert (batch["targets"] == np.where(behind, 0, text)).all() and (batch["tokens"][behind] == 0).all()
    assert not (chosen & behind).any() and (batch["segment_ids"][behind] == 0).all()
    assert batch["tokens"].max() == MASK and not (batch["tokens"][chosen] == SEPARATOR).any()
    expected = np.array([0.8, 0.1 * 255 / 256, 0.1 + 0.1 / 256])  # another token may be the same
    assert np.abs(np.bincount(kinds) / len(kinds) - expected).max() < 4 * (0.16 / len(kinds)) ** 0.5
    assert np.abs(chosen.mean(0)[1:60] - 0.15).max() < 0.08  # anywhere in a row


def test_spans_are_chosen_and_replaced_together_and_end_with_their_document():
    batch = masked(rows_of_text(200), share=0.2, span_length=5, masked=0.5, random=0.0)
    chosen, replaced = batch["weights"] > 0, batch["tokens"] == MASK
    lengths, mixed = [], 0
    for here, there in zip(chosen, replaced, strict=True):
        runs = [list(run) for is_chosen, run in itertools.groupby(range(T), here.__getitem__) if is_chosen]
        lengths += map(len, runs)
        mixed += sum(len(run) == 5 and there[run].sum() not in (0, 5) for run in runs)
    assert np.mean(np.array(lengths) >= 5) > 0.8 and mixed < 0.15 * len(lengths)  # neighbours overlap, ends are cut
    assert (chosen[:-1].sum(1) == round(0.2 * (T - 7))).all()


def test_a_row_is_masked_by_its_own_seed_alone():
    rows = rows_of_text()
    whole, part = masked(rows), masked(rows[2:4], first_seed=2)
    for name, array in part.items():
        np.testing.assert_array_equal(array, whole[name][2:4])
    assert (masked(rows, first_seed=1)["weights"] != whole["weights"]).any()
    configs, places = [zoo_config.Config() for _ in range(2)], list(itertools.product(range(3), range(3)))
    configs[1].train.seed = 1
    seeds = [masking.training_seed(config, *place) for config in configs for place in places]
    assert len({*seeds, *map(masking.validation_seed, range(3))}) == 2 * 9 + 3


@pytest.fixture
def text(config, write_documents):
    config.data.source, _ = write_documents(30)
    config.model.direction, config.train.objective = "bidirectional", "masked_tokens"
    config.train.mask.share = 0.4
    return config


def test_batches_of_a_run_are_a_function_of_seed_step_and_row(text):
    def take(start, count, rows=None):
        return list(itertools.islice(training_dataset(text, rows).iterator(start), count))

    unbroken, resumed, others = take(0, 6), take(4, 2), take(4, 2, rows=[1, 3])
    for whole, again, part in zip(unbroken[4:], resumed, others, strict=True):
        for name, array in whole.items():
            np.testing.assert_array_equal(array, again[name])
            np.testing.assert_array_equal(array[[1, 3]], part[name])
    bound = labels(text, training=True)
    assert bound == 3 and max(batch["weights"].sum(1).max() for batch in unbroken) == bound
    text.train.seed += 1
    assert (take(4, 1)[0]["tokens"] != resumed[0]["tokens"]).any()


def test_an_evaluation_has_the_same_masks_whatever_the_seed(text):
    first = list(validation_batches(text))
    text.train.seed = 5
    for batch, again in zip(first, validation_batches(text), strict=True):
        for name, array in batch.items():
            np.testing.assert_array_equal(array, again[name])
    assert not any(batch["bytes"].any() for batch in first)
    assert validation_batches(text, 20).labels == 8


def test_the_mask_has_an_id_of_its_own(text):
    assert vocabulary(text, ByteTokenizer()) == MASK + 1
    text.model.vocab_size = MASK
    with pytest.raises(UsageError, match="257 has no id for the mask token.*use 0.*or at least 258"):
        check(text)


def test_what_is_no_text_has_no_tokens_to_mask(text):
    text.data.source = "mqar"
    text.train.context_length = 128
    for call in (check, training_dataset, validation_batches):
        with pytest.raises(UsageError, match="mqar asks for the next token, which a bidirectional model reads"):
            call(text)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"direction": "bidirectional"}, "a bidirectional model reads the next token"),
        ({"objective": "masked_tokens"}, "a causal model predicts a masked token from its left alone"),
        ({"direction": "bidirectional", "objective": "masked_tokens", "masked": 0.95}, "0.1 and .* 0.95 are more"),
    ],
)
def test_objectives_that_do_not_fit_are_refused(settings, message):
    config = zoo_config.Config()
    for name, value in settings.items():
        section = {"direction": config.model, "objective": config.train, "masked": config.train.mask}[name]
        setattr(section, name, value)
    with pytest.raises(UsageError, match=message):
        zoo_config.validate(config)
