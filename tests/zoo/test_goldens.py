"""Two-layer models against the reference models' own numbers: tests/goldens/make.py made them, and says from what."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.zoo.cases import error_ratio
from zoo.checkpoints import named_leaves
from zoo.config import Config
from zoo.model import LanguageModel

FILES = {path.stem: path for path in (pathlib.Path(__file__).parents[1] / "goldens").glob("*.npz")}
# A family's other settings, beside its own file, are with the slow tests.
VARIANTS = {name for name in FILES if any(name.startswith(f"{family}_") for family in FILES)}
PREFILL = 20


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=[pytest.mark.slow] * (name in VARIANTS)) for name in sorted(FILES)]
)
def golden(request):
    with np.load(FILES[request.param]) as arrays:
        arrays = dict(arrays)
    groups = {group: {} for group in ("parameter", "gradient", "state")}
    for key in [key for key in arrays if ":" in key]:
        group, _, name = key.partition(":")
        groups[group][name] = arrays[key]
    config = Config().model
    for name, value in json.loads(str(arrays["config"])).items():
        if isinstance(value, dict):
            for field, setting in value.items():
                setattr(getattr(config, name), field, setting)
        else:
            setattr(config, name, value)
    graphdef, parameters = nnx.split(nnx.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0))))
    names = list(named_leaves(parameters))
    assert set(names) == set(groups["parameter"])
    values = [jnp.asarray(groups["parameter"][name]) for name in names]
    assert [value.shape for value in values] == [leaf.shape for leaf in jax.tree.leaves(parameters)]
    parameters = jax.tree.unflatten(jax.tree.structure(parameters), values)
    return arrays, groups, graphdef, parameters


def test_logits_and_every_gradient(golden):
    arrays, groups, graphdef, parameters = golden

    @jax.jit
    def results(parameters):
        logits, pull = jax.vjp(lambda p: nnx.merge(graphdef, p)(arrays["tokens"])[0], parameters)
        return logits, pull(jnp.asarray(arrays["cotangent"]))[0]

    logits, gradients = results(parameters)
    assert error_ratio(logits, arrays["logits"]) < 1e-5
    gradients = named_leaves(gradients)
    for name, expected in groups["gradient"].items():
        assert error_ratio(gradients[name], expected) < 1e-4, name


def test_decoding_and_the_final_states(golden):
    arrays, groups, graphdef, parameters = golden
    tokens, time = jnp.asarray(arrays["tokens"]), arrays["tokens"].shape[1]
    call = jax.jit(lambda parameters, tokens, state: nnx.merge(graphdef, parameters)(tokens, state=state))
    state = nnx.merge(graphdef, parameters).init_state(len(tokens), time)
    logits, state = call(parameters, tokens[:, :PREFILL], state)
    pieces = [logits]
    for t in range(PREFILL, time):
        logits, state = call(parameters, tokens[:, t : t + 1], state)
        pieces.append(logits)
    assert error_ratio(jnp.concatenate(pieces, 1), arrays["logits"]) < 1e-5
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(blocks[0] for blocks in state["layers"]))
    states = {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf
        for path, leaf in jax.tree.leaves_with_path(stacked)
    }
    if "mixer.index" in states:  # a cache: heads first here, tokens first there
        states |= {name: states[name].swapaxes(2, 3) for name in groups["state"] if states[name].ndim == 5}
    for name, expected in groups["state"].items():
        assert error_ratio(states[name].reshape(expected.shape), expected) < 1e-5, name
