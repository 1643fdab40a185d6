"""What each layer of softmax attention is worth."""

import jax
import numpy as np
import pytest
from flax import nnx

from tests.linearize.test_transfer import model_config
from zoo.errors import UsageError
from zoo.linearize import importance
from zoo.linearize.importance import Rows, Swapped
from zoo.model import LanguageModel


def test_swapped_layers_have_the_other_model_s_mixers_and_nothing_else_of_it():
    """Of 4 layers in a pattern of 2, any; against the layers one by one, and by one program."""
    source = model_config("attention,attention@positions=none", num_layers=4)
    target = importance.with_mixer(source, "gla@expand_k=1")
    assert target.mixer == "gla@expand_k=1,gla@expand_k=1"
    teacher, model = (LanguageModel(config, rngs=nnx.Rngs(i)) for i, config in enumerate((source, target)))
    rng = np.random.default_rng(0)
    batch = {name: rng.integers(0, 64, (2, 12)).astype(np.int32) for name in ("tokens", "targets")}
    batch["segment_ids"] = np.repeat([[1] * 5 + [2] * 7], 2, axis=0).astype(np.int32)
    batch["weights"] = batch["bytes"] = np.ones((2, 12), np.float32)
    batch = jax.tree.map(jax.numpy.asarray, batch)
    parts = [nnx.split(each, nnx.Param) for each in (teacher, model)]

    @jax.jit
    def one_by_one(theirs, own, is_swapped):
        both = nnx.merge(parts[0][0], theirs), nnx.merge(parts[1][0], own)
        given = {"segment_ids": batch["segment_ids"]}
        x = both[0].embedded(batch["tokens"], None)
        for layer in range(4):
            unit, place = divmod(layer, 2)
            blocks = []
            for each in both:
                graphdef, params = nnx.split(each.units.blocks[place])
                blocks.append(nnx.merge(graphdef, jax.tree.map(lambda leaf, unit=unit: leaf[unit], params)))
            added = [block.mixed(x, **given)[0] for block in blocks]
            x = x + jax.numpy.where(is_swapped[layer], added[1], added[0])
            x = x + blocks[0].transformed(x, **given)[0]
        return both[0].losses(both[0].norm(x), batch["targets"], batch["weights"]).mean()

    swapped = Swapped(teacher, model, (source, target))
    found, wanted = [], []
    for layers in ([], [0, 3], [1], range(4)):
        is_swapped = np.isin(np.arange(4), list(layers))
        wanted.append(one_by_one(parts[0][1], parts[1][1], is_swapped))
        found.append(swapped.figures(layers, Rows([batch], None))["eval_loss"])
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    assert len(set(found)) == 4
    assert swapped._hidden._cache_size() == 1


def test_the_dearest_layers_stay_and_as_many_evenly_spaced_ones_are_measured_beside_them():
    worth = {0: 1.0, 1: 4.0, 2: 0.5, 3: 8.0, 4: 2.0, 5: 0.25}
    asked = []

    def figures(swapped):
        asked.append(swapped)
        return {"loss": 1 + sum(worth[layer] for layer in swapped), "recall": 0.5}

    found = importance.measured(list(worth), figures)
    assert found["order"] == [3, 1, 4, 0, 2, 5]
    assert found["layers"][4] == {"layer": 4, "loss": 3.0, "recall": 0.5, "cost": 2.0}
    two = found["kept"][2]
    assert two["chosen"]["layers"] == [1, 3] and two["spaced"]["layers"] == [2, 5]
    assert two["chosen"]["loss"] == 1 + 3.75 and two["spaced"]["loss"] == 1 + 15
    assert len(asked) == len(set(asked))  # nothing twice
    rows = importance.tables(found, "gla")[0].rows
    assert rows[0][0] == "none" and rows[1] == ["3", "+8.0000", "9.0000", "50.00%"]
    # The same layers as a pattern, no longer than it has to be, with what each place sets.
    source = model_config("attention,attention@window=9")
    target = importance.with_mixer(source, "gla")
    assert importance.pattern_of(source, target, [1, 3]) == "gla,attention@window=9,gla,attention@window=9,gla,gla"
    assert importance.pattern_of(source, target, [2, 5]) == "gla,gla,attention,gla,gla,attention@window=9"
    assert importance.pattern_of(source, target, [0, 2, 4]) == "attention,gla"


@pytest.mark.parametrize(
    ("there", "mixer", "message"),
    [
        ("attention", "gla,retnet", "--mixer: got 'gla,retnet', expected one family"),
        ("attention", "glu", "model.mixer: .*'glu'"),
        ("attention", "gla@heads=2", "gla has no setting 'heads'"),
        ("gla,retnet", "gla", "--workdir: gla,retnet has no layer of softmax attention"),
        ("attention,gla", "attention", "--mixer: attention is what the run has"),
    ],
)
def test_mixers_that_cannot_stand_in_are_refused(there, mixer, message):
    with pytest.raises(UsageError, match=message):
        importance.with_mixer(model_config(there), mixer)
