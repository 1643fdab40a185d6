"""The language model: one call for training, prefill and decoding; patterns, remat, dropout, compile time."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax._src.cudnn import fused_attention_stablehlo

from kernels import dispatch
from tests.zoo.cases import error_ratio
from zoo import blocks
from zoo import model as model_module
from zoo.config import preset
from zoo.config_files import family_config
from zoo.flops import forward_flops_per_token, num_parameters, state_bytes
from zoo.layers import GELU, embedding
from zoo.mixers import CAUSAL_MIXERS, MIXERS, Sizes
from zoo.mixers.softmax.attention import AttentionConfig
from zoo.model import LanguageModel
from zoo.states import put_rows, take_rows

BATCH, TIME, VOCAB = 2, 12, 64


def tiny(**settings):
    model = preset("tiny").model
    model.num_layers, model.d_model, model.vocab_size = 2, 16, VOCAB
    for name, value in settings.items():
        setattr(model, name, value)
    return model


def build(config, seed=0):
    return LanguageModel(config, rngs=nnx.Rngs(seed))


def jitted(model):
    graphdef, parameters = nnx.split(model)
    call = jax.jit(lambda parameters, tokens, **kwargs: nnx.merge(graphdef, parameters)(tokens, **kwargs))
    return lambda tokens, **kwargs: call(parameters, tokens, **kwargs)


@pytest.fixture(scope="module")
def tokens():
    return jax.random.randint(jax.random.key(0), (BATCH, TIME), 0, VOCAB)


PATTERNS = {
    "hybrid": {"mixer": "gla,attention"},
    "mlp as a layer": {"mixer": "gla,mlp", "mlp": "none"},
    "learned positions": {"mixer": "attention", "positions": "learned", "max_positions": 2 * TIME},
    "an MLP without a gate": {"mixer": "gla", "mlp": "gelu"},
    "channel mixing": {"mixer": "rwkv6", "mlp": "channel_mixing", "d_ff": 32},
    "values of the model's input": {"mixer": "gla,rwkv7", "mlp": "channel_mixing_ungated", "num_layers": 4, "d_ff": 32},
    "hgrn2 over the depth": {"mixer": "hgrn2,lightning", "num_layers": 4},
    "places of their own": {
        "mixer": "attention@window=4,attention@positions=none@biases=q,gla@norm_epsilon=0.01",
        "num_layers": 3,
    },
    "norms on both sides": {"norm": "layer_norm", "norm_position": "both", "embedding_norm": True, "mlp_bias": True},
    "norms after, an embedding's norm": {
        "mixer": "rwkv7",
        "norm_position": "after",
        "d_ff": 32,
        "embedding_norm": True,
        "mlp": "geglu",
    },
    "untied, soft cap": {"tie_embeddings": False, "logit_softcap": 5.0},
}


@pytest.mark.parametrize("settings", PATTERNS.values(), ids=PATTERNS)
def test_prefill_and_decoding_equal_the_full_pass(settings, tokens):
    model = build(tiny(**settings))
    call = jitted(model)
    full, none = call(tokens)
    assert none is None and full.shape == (BATCH, TIME, VOCAB) and full.dtype == jnp.float32
    logits, state = call(tokens[:, :9], state=model.init_state(BATCH, TIME))
    pieces = [logits]
    for t in range(9, TIME):
        logits, state = call(tokens[:, t : t + 1], state=state)
        pieces.append(logits)
    assert error_ratio(jnp.concatenate(pieces, 1), full) < 1e-5
    assert state["position"].tolist() == [TIME] * BATCH


def test_the_mlp_without_a_gate_is_its_equation():
    mlp = GELU(4, 8, init_scale=1.0, dtype=jnp.float32, rngs=nnx.Rngs(0))
    x = np.random.default_rng(0).normal(size=(1, 3, 4)).astype(np.float32)
    inner = x @ np.asarray(mlp.up.kernel[...], np.float64)
    inner = inner / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (inner + 0.044715 * inner**3)))
    y, state = mlp(jnp.asarray(x))
    assert state is None and error_ratio(y, inner @ np.asarray(mlp.down.kernel[...], np.float64)) < 1e-6


ALONE = ("retnet", "linear_attention")  # slow: the suite of mixers has what they add to the others


@pytest.mark.parametrize(
    "mixer", ["gla,attention", "mlstm,rwkv6", *(pytest.param(m, marks=pytest.mark.slow) for m in ALONE)]
)
def test_left_padding_leaves_no_trace(mixer, tokens):
    """A prompt padded on the left (segment 0) prefills to the state of the prompt alone."""
    model = build(tiny(mixer=mixer, mlp="channel_mixing" if "rwkv6" in mixer else "swiglu", d_ff=32))
    call = jitted(model)
    padding = 3
    alone, state_alone = call(tokens[:, padding:], state=model.init_state(BATCH, 2 * TIME))
    segment_ids = jnp.where(jnp.arange(TIME) < padding, 0, 1) * jnp.ones((BATCH, 1), jnp.int32)
    padded, state = call(tokens, segment_ids=segment_ids, state=model.init_state(BATCH, 2 * TIME))
    assert error_ratio(padded[:, padding:], alone) < 1e-5
    assert state["position"].tolist() == [TIME - padding] * BATCH
    next_token = tokens[:, :1]
    assert error_ratio(call(next_token, state=state)[0], call(next_token, state=state_alone)[0]) < 1e-5


def test_right_padding_leaves_no_trace(tokens):
    """Rows of which the state takes in a part go on behind it, whatever the other tokens were."""
    model = build(tiny(mixer="attention@window=4,gla"))
    call = jitted(model)
    segment_ids = jnp.where(jnp.arange(TIME) < 3, 0, 1) * jnp.ones((BATCH, 1), jnp.int32)
    state = model.init_state(BATCH, 2 * TIME)
    padded, after = call(tokens, segment_ids=segment_ids, state=state, lengths=jnp.array([5, TIME]))
    assert after["position"].tolist() == [2, TIME - 3]
    alone, of_first = call(tokens[:, :5], segment_ids=segment_ids[:, :5], state=state)
    assert error_ratio(padded[:, :5], alone) < 1e-5
    assert error_ratio(call(tokens[:, :1], state=after)[0][0], call(tokens[:, :1], state=of_first)[0][0]) < 1e-5
    with pytest.raises(ValueError, match="lengths: given without a state"):
        model(tokens, lengths=jnp.array([5, TIME]))


def test_packed_documents_equal_documents_alone(tokens):
    model = build(tiny(mixer="gla,attention", positions="learned", max_positions=TIME))
    call = jitted(model)
    segment_ids = jnp.broadcast_to(jnp.repeat(jnp.array([1, 2, 1]), jnp.array([5, 2, 5])), (BATCH, TIME))
    packed, _ = call(tokens, segment_ids=segment_ids)
    alone = jnp.concatenate([call(tokens[:, here])[0] for here in (slice(5), slice(5, 7), slice(7, TIME))], 1)
    assert error_ratio(packed, alone) < 1e-5


@pytest.mark.parametrize("window", [0, 7])
def test_more_tokens_than_a_cache_holds_are_refused_or_nan(window):
    sizes = Sizes(d_model=16, num_layers=1)
    mixer = MIXERS["attention"](AttentionConfig(window=window), sizes, layer_index=0, rngs=nnx.Rngs(0))
    graphdef, parameters = nnx.split(mixer)
    call = jax.jit(lambda x, state: nnx.merge(graphdef, parameters)(x, state=state))
    x, state = jnp.ones((1, 2, 16)), mixer.init_state(1, 5, jnp.float32)
    for _ in range(2):
        y, state = call(x, state)
        assert np.isfinite(y).all()
    with pytest.raises(ValueError, match=r"room for 5 tokens, expected 4 \+ 2"):
        mixer(x, state=state)
    for _ in range(2):
        y, state = call(x, state)
        assert np.isnan(y).all()
    with pytest.raises(ValueError, match=r"room for 5 tokens, expected 0 \+ 6"):
        call(jnp.ones((1, 6, 16)), mixer.init_state(1, 5, jnp.float32))
    with pytest.raises(ValueError, match="state has 1 sequences, expected the 3 of x"):
        mixer(jnp.ones((3, 1, 16)), state=mixer.init_state(1, 5, jnp.float32))


def test_rows_of_a_state_are_those_of_a_model_alike():
    model, wider = build(tiny(mixer="attention")), build(tiny(mixer="attention", d_model=32))
    state = model.init_state(3, 8)
    for rows in ([3], np.array([-1])):
        with pytest.raises(ValueError, match="expected numbers from 0 to 2"):
            take_rows(state, rows)
    for other, message in (
        (model.init_state(2, 9), "max_length"),
        (model.init_state(1, 8), "a sequence for each row"),
        (wider.init_state(2, 8), "of the same model"),
        (build(tiny(mixer="gla")).init_state(2, 8), "of the same model"),
    ):
        with pytest.raises(ValueError, match=message):
            put_rows(state, [0, 2], other)


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.uint8, jnp.int32])
def test_an_id_outside_the_table_is_nan(dtype):
    table = embedding(200, 3, ("vocab", "embed"), dtype=jnp.float32, rngs=nnx.Rngs(0))
    ids = [0, 127, -1, -128] if dtype == jnp.int8 else [0, 199, 200, 255]
    rows = table(jnp.asarray([ids], dtype))
    assert np.isnan(rows[0, 2:]).all() and (rows[0, :2] == table.embedding[...][jnp.array(ids[:2])]).all()
    with pytest.raises(ValueError, match="ids are float32, expected integers"):
        table(jnp.zeros((1, 2)))


def hessian_product(model, tokens):
    """A function of (parameters, direction), and the parameters."""
    graphdef, parameters = nnx.split(model)

    def loss(parameters):
        model = nnx.merge(graphdef, parameters)
        return model.token_losses(tokens, jnp.roll(tokens, -1, 1), jnp.ones(tokens.shape)).mean()

    gradient = jax.grad(loss)
    return gradient, lambda parameters, direction: jax.jvp(gradient, (parameters,), (direction,))[1], parameters


@pytest.mark.slow
def test_hessian_products_are_differences_of_gradients(tokens):
    """By the switch that the docs name: `reference` has forward mode."""
    model = build(tiny(mixer="attention", num_layers=1, logit_softcap=5.0))
    gradient, product, parameters = hessian_product(model, tokens[:, :6])
    leaves, tree = jax.tree.flatten(parameters)
    rng = np.random.default_rng(0)
    direction = tree.unflatten([jnp.asarray(0.02 * rng.standard_normal(leaf.shape), jnp.float32) for leaf in leaves])
    with dispatch.use_implementation("reference"):
        actual = jax.jit(product)(parameters, direction)
    step, gradient = 0.005, jax.jit(gradient)  # by the default implementations
    after, before = (gradient(jax.tree.map(lambda p, d, s=s: p + s * d, parameters, direction)) for s in (step, -step))
    expected = jax.tree.map(lambda a, b: (a - b) / (2 * step), after, before)
    flat = lambda tree: jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree)])  # noqa: E731
    assert error_ratio(flat(actual), flat(expected)) < 1e-2


@pytest.mark.parametrize(
    "mixer", [pytest.param(name, marks=[pytest.mark.slow] * (name != "attention")) for name in CAUSAL_MIXERS]
)
def test_every_family_has_hessian_products(mixer, tokens):
    settings = {"mlp": family_config(mixer).model.mlp, "num_layers": 1, "d_model": 64, "d_ff": 64}
    gradient, product, parameters = hessian_product(build(tiny(mixer=mixer, **settings)), tokens)
    twice = jax.grad(lambda p: sum(jnp.sum(g**2) for g in jax.tree.leaves(gradient(p))))
    with dispatch.use_implementation("reference"):
        jax.eval_shape(product, parameters, parameters)
        jax.eval_shape(twice, parameters)


def test_soft_caps_are_those_that_keep_their_digits():
    """tests/kernels/test_softcap.py holds the digits."""
    model = build(tiny(mixer="mlstm", num_layers=1, logit_softcap=5.0))
    for function in (model.hidden, model.logits):
        argument = jax.ShapeDtypeStruct((1, 3), jnp.int32)
        argument = jax.eval_shape(model.hidden, argument)[0] if function == model.logits else argument
        assert "soft_cap" in str(jax.make_jaxpr(function)(argument))


def test_token_losses_are_the_cross_entropy_of_the_logits(tokens):
    model = build(tiny(logit_softcap=5.0))
    targets, weights = jnp.roll(tokens, -1, 1), jnp.linspace(0, 2, TIME) * jnp.ones((BATCH, 1))
    logits, _ = jitted(model)(tokens)
    expected = -weights * jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)[..., 0]
    assert error_ratio(jax.jit(lambda *given: model.token_losses(*given))(tokens, targets, weights), expected) < 1e-5


def test_the_head_reads_labelled_tokens_alone_where_they_are_few(tokens):
    graphdef, parameters = nnx.split(build(tiny(mixer="mlp", num_layers=1, d_ff=32)))
    weights = jnp.zeros((BATCH, TIME)).at[0, jnp.array([3, 9])].set(2.0).at[1, 11].set(1.0)

    def scores(parameters, targets, labels):
        return nnx.merge(graphdef, parameters).token_scores(tokens, targets, weights, labels=labels)

    @jax.jit
    def both(parameters):
        likeliest = nnx.merge(graphdef, parameters)(tokens)[0].argmax(-1)
        targets = likeliest.at[0, 3].set((likeliest[0, 3] + 1) % VOCAB)  # all right but one
        return scores(parameters, targets, None), scores(parameters, targets, 3)

    (expected, right), found = both(parameters)
    np.testing.assert_allclose(found[0], expected, rtol=1e-5)
    np.testing.assert_array_equal(found[1], right)
    np.testing.assert_array_equal(right, weights.at[0, 3].set(0))
    for labels, seen in ((3, False), (None, True)):
        traced = str(jax.make_jaxpr(lambda p, labels=labels: scores(p, tokens, labels))(parameters))
        assert (f"{BATCH},{TIME},{VOCAB}]" in traced) == (f"[{BATCH * TIME},{VOCAB}]" in traced) == seen


@pytest.mark.parametrize("settings", [{}, *PATTERNS.values()])
def test_parameter_formula_and_state_bytes(settings, tokens):
    config = tiny(**settings)
    model = build(config)
    assert num_parameters(config) == sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    state = model.init_state(1, 10)
    assert state_bytes(config, 10) == sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    assert forward_flops_per_token(config, TIME) > 2 * VOCAB * config.d_model


def test_remat_changes_neither_loss_nor_gradient(tokens):
    results = []
    for remat in ("none", "minimal", "full", "family"):
        graphdef, parameters = nnx.split(build(tiny(mixer="gla", remat=remat)))

        def loss(parameters, graphdef=graphdef):
            model = nnx.merge(graphdef, parameters)
            return model.token_losses(tokens, jnp.roll(tokens, -1, 1), jnp.ones(tokens.shape)).mean()

        results.append(jax.jit(jax.value_and_grad(loss))(parameters))
    for value, gradient in results[1:]:
        assert float(abs(value - results[0][0])) < 1e-6
        pairs = zip(jax.tree.leaves(gradient), jax.tree.leaves(results[0][1]), strict=True)
        assert all(error_ratio(a, b) < 1e-5 for a, b in pairs)


def primitives(jaxpr):
    """How often each primitive occurs, in a scan's body once."""
    found = collections.Counter(equation.primitive.name for equation in jaxpr.eqns)
    for equation in jaxpr.eqns:
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda p: hasattr(p, "jaxpr")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                found += primitives(inner)
    return found


@pytest.mark.parametrize("mixer", ["attention", "gla", pytest.param("mamba2", marks=pytest.mark.slow)])
def test_minimal_remat_computes_no_product_again(mixer, tokens, monkeypatch):
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda *_: 91000)  # as if it were here
    found = {}
    for remat in ("none", "minimal", "full"):
        graphdef, parameters = nnx.split(build(tiny(mixer=mixer, remat=remat, dtype="bfloat16", d_model=64)))

        def loss(parameters, graphdef=graphdef):
            return nnx.merge(graphdef, parameters).token_losses(tokens, tokens, jnp.ones(tokens.shape)).mean()

        with dispatch.use_device(dispatch.Device("gpu", "NVIDIA A100")):
            found[remat] = primitives(jax.make_jaxpr(jax.grad(loss))(parameters).jaxpr)
    attentions = {remat: count["dot_product_attention_fwd_wrapper"] for remat, count in found.items()}
    assert attentions == ({"none": 1, "minimal": 1, "full": 2} if mixer == "attention" else dict.fromkeys(found, 0))
    products = {remat: count["dot_general"] for remat, count in found.items()}
    assert products["minimal"] == products["none"] < products["full"]


def test_each_layer_drops_its_own_numbers(tokens, monkeypatch):
    """Five units run as a scan, and in each five layers alike as another. Here dropout adds draws instead: the variance
    of a sum of n is n times one's if they are independent, n^2 times if a layer's keys are another's."""
    for module in (model_module, blocks):
        monkeypatch.setattr(module, "dropout", lambda x, rate, key: jax.random.uniform(key, x.shape))
    graphdef, parameters = nnx.split(build(tiny(mixer="mlp,mlp,mlp,mlp,mlp,gla", num_layers=30, d_model=64)))

    @jax.jit
    def summed(parameters, tokens):
        model = nnx.merge(graphdef, parameters)
        model.norm = lambda x: x
        return model.hidden(tokens, dropout_key=jax.random.key(0))[0]

    drawn = summed(parameters, jnp.tile(tokens, (4, 4)))
    draws = 1 + 30 + 5  # of the embedding, of each layer's MLP, of each mixer
    assert float(jnp.var(drawn)) == pytest.approx(draws / 12, rel=0.1)


def test_dropout_acts_with_a_key_and_is_the_keys_alone(tokens):
    call = jitted(build(tiny(dropout=0.5)))
    first, _ = call(tokens, dropout_key=jax.random.key(0))
    again, _ = call(tokens, dropout_key=jax.random.key(0))
    other, _ = call(tokens, dropout_key=jax.random.key(1))
    assert (first == again).all() and not (first == other).all() and not (first == call(tokens)[0]).all()


def test_layers_start_different_from_one_another():
    model = build(tiny())
    kernel = model.units.blocks[0].mixer.q.kernel[...]
    assert kernel.shape[0] == 2 and not (kernel[0] == kernel[1]).all()


def test_bfloat16_model_is_close_to_float32(tokens):
    full, _ = jitted(build(tiny()))(tokens)
    half, _ = jitted(build(tiny(dtype="bfloat16")))(tokens)
    assert half.dtype == jnp.float32 and error_ratio(half, full) < 3e-2


def test_vocabulary_must_be_resolved():
    with pytest.raises(ValueError, match="vocab_size: got 0"):
        build(tiny(vocab_size=0))


def loss_of(config, tokens, dropout_key=None):
    """Parameters, and the mean loss as a function of them."""
    graphdef, parameters = nnx.split(build(config))

    def loss(parameters):
        model = nnx.merge(graphdef, parameters)
        return model.token_losses(tokens, tokens, jnp.ones(tokens.shape), dropout_key=dropout_key).mean()

    return parameters, loss


def test_program_size_does_not_grow_with_depth(tokens):
    """What the compiler is given is the same for 6 and 24 layers, up to the constants of the loop; few are unrolled.
    And for layers of a unit that are alike."""

    def lines(**settings):
        parameters, loss = loss_of(tiny(**settings), tokens)
        return jax.jit(jax.grad(loss)).lower(parameters).as_text().count("\n")

    assert lines(num_layers=24) == (of_one_unit := lines(num_layers=6))
    units = ("attention" + ",gla" * alike for alike in (2, 6))  # with remat two are scanned
    few, more = (lines(mixer=unit, num_layers=2 * (unit.count(",") + 1), remat="full") for unit in units)
    assert 0 <= more - few < of_one_unit / 2  # the parameters of four layers, and no layer


def test_layers_that_are_alike_are_scanned_without_a_difference(tokens):
    """Dropout's masks too; the last place has settings of its own."""
    mixer = "attention,attention,attention,attention@num_heads=2"
    found = []
    for unrolled in (2, 100):
        config = tiny(mixer=mixer, num_layers=4, dropout=0.2, unrolled=unrolled)
        parameters, loss = loss_of(config, tokens, jax.random.key(0))
        step = jax.value_and_grad(loss)
        found.append((jax.make_jaxpr(step)(parameters), *jax.jit(step)(parameters)))
    (scanned, value, gradient), (unrolled, value_unrolled, gradient_unrolled) = found
    assert primitives(scanned.jaxpr)["dot_general"] < 0.7 * primitives(unrolled.jaxpr)["dot_general"]
    assert float(abs(value - value_unrolled)) < 1e-6
    pairs = zip(jax.tree.leaves(gradient), jax.tree.leaves(gradient_unrolled), strict=True)
    assert all(error_ratio(a, b) < 1e-5 for a, b in pairs)
