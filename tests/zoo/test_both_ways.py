"""What `tests/zoo/test_mixers.py` holds of causal mixers, of bidirectional ones: the future matters, other documents
do not, and reversed time with the two ways' parameters exchanged is the reversed output."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from kernels import dispatch
from tests.zoo.cases import CASES, D_MODEL, applied, build, config_of, error_ratio
from tests.zoo.count_flops import dot_flops
from zoo.config import ModelConfig, places
from zoo.errors import UsageError
from zoo.mixers import BIDIRECTIONAL, MIXERS, Sizes, passes

BATCH, TIME = 2, 14
# Three documents; the last one is one token, and padding beside it would look the same.
IDS = np.broadcast_to(np.repeat([1, 2, 3], [5, 8, 1]), (BATCH, TIME))
POSITIONS = np.broadcast_to(np.concatenate([np.arange(5), np.arange(8), np.arange(1)]), (BATCH, TIME))
# Each way to see both ways, with a short convolution too; the other families with the slow tests.
QUICK = ("attention-window=5", "linear_attention", "mamba2")
BOTH = [case for case, (name, _) in CASES.items() if BIDIRECTIONAL in MIXERS[name].directions]
by_case = pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[pytest.mark.slow] * (case not in QUICK)) for case in BOTH], scope="module"
)


@pytest.fixture(scope="module")
def inputs():
    return jax.random.normal(jax.random.key(1), (BATCH, TIME, D_MODEL))


@by_case
def test_sees_all_of_its_document_and_nothing_of_others(case, inputs):
    _, parameters, call = applied(case, direction=BIDIRECTIONAL)
    gradient = jax.grad(lambda x: jnp.sum(call(parameters, x, IDS, POSITIONS)[0][:, 8] ** 2))(inputs)
    influence = np.abs(gradient).sum((0, 2))
    assert influence[[7, 8, 9]].min() > 0
    assert influence[IDS[0] != 2].max() < 1e-6 * influence[8]  # a decay's gradient is a difference of sums over the row


@by_case
def test_a_packed_row_equals_its_documents_alone(case, inputs):
    """Each document alone is the beginning of a row that another document fills up, as padding would."""
    _, parameters, call = applied(case, direction=BIDIRECTIONAL)
    packed, _ = call(parameters, inputs, IDS, POSITIONS)
    for document in (1, 2, 3):
        here = IDS[0] == document
        turned = jnp.roll(inputs, -int(here.argmax()), axis=1)
        ids = np.broadcast_to(np.arange(TIME) < here.sum(), (BATCH, TIME)).astype(np.int32)
        positions = np.broadcast_to(np.arange(TIME), (BATCH, TIME))
        alone, _ = call(parameters, turned, ids, positions)
        assert error_ratio(packed[:, here], alone[:, : here.sum()]) < 2e-6


@by_case
@pytest.mark.parametrize("shared", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["own", "shared"])
def test_reversed_time_with_the_two_ways_exchanged_is_the_reversed_output(case, shared, inputs):
    if CASES[case][0] == "transnormer":
        pytest.skip("its blocks begin with the document, whichever way it is read")
    _, parameters, call = applied(case, direction=BIDIRECTIONAL, direction_shared=shared)
    y, _ = call(parameters, inputs, IDS, POSITIONS)
    exchanged = parameters
    if "backward" in parameters:
        exchanged = nnx.State({"forward": parameters["backward"], "backward": parameters["forward"]})
    elif CASES[case][0] == "rala":  # its convolution has taps each way
        exchanged = jax.tree.map(lambda x: x, parameters)
        exchanged["conv"] = jax.tree.map(lambda taps: taps[:, ::-1], parameters["conv"])
    if exchanged is not parameters:
        assert error_ratio(call(exchanged, inputs, IDS, POSITIONS)[0], y) > 0.1
        parameters = exchanged
    z, _ = call(parameters, *(np.flip(x, 1) for x in (inputs, IDS, POSITIONS)))
    assert error_ratio(np.flip(z, 1), y) < 2e-6


@pytest.mark.slow
@pytest.mark.parametrize("case", BOTH)
def test_learns_what_comes_next_and_every_parameter_gets_a_finite_gradient(case):
    """Each token is to name the one after it. Kernels of a few slow states learn that slowly."""
    mixer = build(case, direction=BIDIRECTIONAL)
    graphdef, parameters = nnx.split(mixer)
    table = jax.random.normal(jax.random.key(2), (8, D_MODEL))
    optimizer = optax.adam(1e-2)

    def loss(parameters, tokens):
        y, _ = nnx.merge(graphdef, parameters)(table[tokens])
        logits = (y[:, 1:-1] @ table.T) / D_MODEL**0.5
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 2:]).mean()

    @jax.jit
    def step(parameters, optimizer_state, key):
        tokens = jax.random.randint(key, (16, 6), 0, 8)
        value, gradient = jax.value_and_grad(loss)(parameters, tokens)
        updates, optimizer_state = optimizer.update(gradient, optimizer_state, parameters)
        return optax.apply_updates(parameters, updates), optimizer_state, value, gradient

    optimizer_state, losses = optimizer.init(parameters), []
    for i in range(60):
        parameters, optimizer_state, value, gradient = step(parameters, optimizer_state, jax.random.key(i))
        losses.append(float(value))
        if i == 0 or (i == 20 and "dt_limit" not in case):  # beyond its limits a step size has no gradient
            for path, leaf in jax.tree.leaves_with_path(gradient):
                assert np.isfinite(leaf).all(), f"gradient of {jax.tree_util.keystr(path)} at step {i}"
                assert np.abs(leaf).max() > 0, f"no gradient reaches {jax.tree_util.keystr(path)} at step {i}"
    assert np.mean(losses[-5:]) < 0.8 * losses[0]


@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
@pytest.mark.parametrize("family", [name for name, mixer in MIXERS.items() if BIDIRECTIONAL in mixer.directions])
def test_parameters_equal_their_formula(family, shared):
    model = ModelConfig(mixer=family, direction=BIDIRECTIONAL, direction_shared=shared)
    mixer = nnx.eval_shape(lambda: build(family, direction=BIDIRECTIONAL, direction_shared=shared))
    counted = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(mixer, nnx.Param)))
    assert counted == places(model)[0].num_parameters(D_MODEL)


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in BOTH if MIXERS[CASES[case][0]].runs_twice])
def test_flops_of_what_runs_twice_equal_the_dot_products_of_the_definition(case):
    family, time = MIXERS[CASES[case][0]], 32
    mixer = build(case, d_model=64, direction=BIDIRECTIONAL)
    with dispatch.use_implementation("reference"):
        counted = dot_flops(lambda x: mixer(x)[0], jnp.zeros((1, time, 64))) / time
    stated = passes(family, BIDIRECTIONAL) * family.flops_per_token(config_of(case), 64, time)
    assert stated == pytest.approx(counted, rel=0.02)


def test_the_documentation_says_which_way_each_goes():
    page = (pathlib.Path(__file__).parents[2] / "docs/zoo.md").read_text()
    cell = lambda row: re.findall(r"`(\w+)`", re.search(rf"\| {row} \| (.*) \|", page)[1])  # noqa: E731
    only = [name for name, mixer in MIXERS.items() if mixer.directions == (BIDIRECTIONAL,)]
    itself = [name for name, mixer in MIXERS.items() if not mixer.runs_twice and name not in only]
    assert (cell("itself"), cell("and no other way")) == (itself, only)
    assert all(BIDIRECTIONAL in mixer.directions for mixer in MIXERS.values())  # "all others"


@pytest.mark.parametrize("family", ["attention", "gla"])
def test_what_sees_both_ways_has_no_state(family):
    mixer = nnx.eval_shape(lambda: build(family, direction=BIDIRECTIONAL))
    with pytest.raises(UsageError, match="there is no state to go on from and nothing to generate"):
        mixer.init_state(1, 8, jnp.float32)


def test_a_mixer_that_runs_one_way_is_not_made_for_both():
    gla = MIXERS["gla"]
    sizes = Sizes(D_MODEL, direction=BIDIRECTIONAL)
    with pytest.raises(UsageError, match="GLA alone runs one way; make it by zoo.mixers.make_mixer"):
        gla(gla.config_class(), sizes, layer_index=0, rngs=nnx.Rngs(0))
