"""What the mixers of another family take over from softmax attention."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from zoo import checkpoints
from zoo import config as zoo_config
from zoo.errors import UsageError
from zoo.linearize import Transfer, settled_width
from zoo.mixers import CAUSAL_MIXERS, MIXERS, Sizes
from zoo.mixers.from_softmax import Softmax
from zoo.model import LanguageModel

D, SPAN = 16, 64
REACH = 8.0  # the root of it


def model_config(mixer, **settings):
    config = zoo_config.preset("tiny").model
    config.mixer, config.d_model, config.num_layers, config.vocab_size, config.d_ff = mixer, D, 6, 64, 24
    config.gla.num_heads, config.mamba2.head_dim = 2, 8
    for name, value in settings.items():
        *path, field = name.split(".")
        setattr(getattr(config, path[0]) if path else config, field, value)
    return config


def transfer(source, target):
    models = (nnx.eval_shape(lambda c=c: LanguageModel(c, rngs=nnx.Rngs(0))) for c in (source, target))
    return Transfer("--init_from=runs/a", source, target, tuple(models), SPAN)


def softmax_of(heads=4, width=4, seed=0, rank=None):
    rng = np.random.default_rng(seed)
    q, k, v = rng.normal(size=(3, D + 1, heads, width)).astype(np.float32)
    if rank:
        q[..., rank:] = 0
    out = rng.normal(size=(heads, width, D)).astype(np.float32)
    return Softmax(*map(jnp.asarray, (q, k, v, out)), None, ("q", "k", "v"), False, SPAN)


def products(softmax, heads):
    """[heads, D + 1, D + 1]: of each head, or added over those that come to share one."""
    found = np.einsum("mhk,nhk->hmn", softmax.q, softmax.k)
    return found.reshape(heads, -1, *found.shape[1:]).sum(1)


@pytest.mark.parametrize(("heads", "width"), [(4, 4), (2, 8), (4, 2), (1, 8), (4, 6)])
def test_keys_make_the_same_products(heads, width):
    softmax = softmax_of(rank=2)
    fresh = jnp.ones((D, heads * width))
    q, k, _ = softmax.keys(fresh, fresh, heads)
    q, k = (np.asarray(x).reshape(D + 1, heads, width) for x in (q, k))
    found = np.einsum("mhk,nhk->hmn", q, k) * (4 / width) ** 0.5
    np.testing.assert_allclose(found, products(softmax, heads), atol=2e-5)


def test_more_heads_than_softmax_had_repeat_its_keys_and_share_its_read_out():
    softmax = softmax_of(heads=2)
    fresh = jnp.ones((D, 16))
    q, _, _ = softmax.keys(fresh, fresh, 4)
    np.testing.assert_array_equal(q.reshape(D + 1, 4, 4)[:, 1], softmax.q[:, 0])
    read = np.einsum("mhk,hkd->md", softmax.v, softmax.out)
    for heads, width in ((4, 4), (4, 2), (2, 4), (1, 8)):
        channels = heads * width
        v, out, _ = softmax.values(jnp.ones((D, channels)), jnp.ones((channels, D)), heads)
        np.testing.assert_allclose(v @ out, read, atol=2e-5)


def test_a_head_that_is_too_narrow_keeps_the_best_of_its_rank():
    softmax = softmax_of()
    fresh = jnp.ones((D, 8))
    q, k, _ = softmax.keys(fresh, fresh, 4)
    q, k = (np.asarray(x).reshape(D + 1, 4, 2) for x in (q, k))
    left = np.linalg.norm(products(softmax, 4) - np.einsum("mhk,nhk->hmn", q, k) * 2**0.5, axis=(1, 2))
    singular = np.linalg.svd(products(softmax, 4), compute_uv=False)
    np.testing.assert_allclose(left, np.linalg.norm(singular[:, 2:], axis=1), rtol=1e-4)


def test_rotary_heads_lie_so_that_pairs_stay_pairs_of_nearly_their_frequency():
    softmax = softmax_of(heads=2, width=4)._replace(turned=True)
    fresh = jnp.ones((D, 8))
    q, _, _ = softmax.keys(fresh, fresh, 1, turned=True)
    pair = lambda x, i: np.asarray(x)[:, [i, i + x.shape[1] // 2]]  # noqa: E731
    for head in range(2):
        for i in range(2):
            np.testing.assert_allclose(pair(q, 2 * i + head), pair(softmax.q[:, head], i) * 2**0.5)
    assert softmax.keys(jnp.ones((D, 4)), jnp.ones((D, 4)), 2, turned=True) is None


def test_small_products_are_read_alike_by_the_taylor_map():
    """exp(s) is 1 + s + s^2/2 where s is small, so that the two families compute the same."""
    make = lambda name, config: MIXERS[name](config, Sizes(D, rope=False), layer_index=0, rngs=nnx.Rngs(0))  # noqa: E731
    softmax = make("attention", MIXERS["attention"].config_class(num_heads=4, num_kv_heads=2, positions="none"))
    softmax.q.kernel[...] *= 0.05
    linear = make("linear_attention", MIXERS["linear_attention"].config_class(num_heads=4, feature_map="taylor2"))
    for name, taken in linear.from_softmax(softmax.as_softmax(SPAN)).items():
        getattr(linear, name.split(".")[0]).kernel[...] = taken.value
    x = jax.random.normal(jax.random.key(1), (1, 12, D))
    wanted = softmax(x)[0]
    assert float(jnp.abs(linear(x)[0] - wanted).max()) < 0.003 * float(jnp.abs(wanted).max())


def made(name, softmax, **settings):
    """A mixer that took over from softmax attention, and the words by parameter."""
    mixer = MIXERS[name](MIXERS[name].config_class(**settings), Sizes(D), layer_index=0, rngs=nnx.Rngs(0))
    taken = mixer.from_softmax(softmax)
    for path, (value, _) in taken.items():
        owner = mixer
        for part in path.split(".") if value is not None else ():
            owner = getattr(owner, part)
        if value is not None:
            owner[...] = value
    return mixer, {path: of for path, (_, of) in taken.items()}


def test_decays_forget_over_the_reach_and_convolutions_hand_on_the_token():
    softmax = softmax_of()._replace(biases=())
    x = jax.random.normal(jax.random.key(0), (1, 3, D))
    gla = made("gla", softmax, biases="output_gate")[0]
    np.testing.assert_allclose(gla._log_decay(x), -1 / REACH, rtol=1e-4)
    np.testing.assert_allclose(jax.nn.silu(gla.output_gate(x)), 1, rtol=1e-5)
    delta = made("gated_delta_net", softmax)[0]
    steps = jax.nn.softplus(delta.decay(x) + delta.decay_bias[...])
    np.testing.assert_allclose(-jnp.exp(delta.A_log[...]) * steps, -1 / REACH, rtol=1e-4)
    y, _ = delta.qkv.v_conv(delta.qkv.v(x))
    np.testing.assert_allclose(y, jax.nn.silu(delta.qkv.v(x)), rtol=1e-5)
    mamba = made("mamba2", softmax, head_dim=8, state_dim=8, dt_limit_max=0.5)[0]
    dt = jnp.clip(jax.nn.softplus(mamba.in_dt(x) + mamba.dt_bias[...]), *mamba.dt_limit)
    np.testing.assert_allclose(-jnp.exp(mamba.A_log[...]) * dt, -1 / REACH, rtol=1e-4)


@pytest.mark.slow
def test_steps_with_one_key_are_one_step():
    """Gated DeltaProduct with b = 1 at each of three steps is Gated DeltaNet with b = 1."""
    softmax, x = softmax_of()._replace(biases=()), jax.random.normal(jax.random.key(1), (1, 5, D))
    sizes = {"num_heads": 4, "expand_k": 1.0, "expand_v": 1.0, "beta_max": 2.0}
    product, words = made("gated_delta_product", softmax, num_householder=3, **sizes)
    delta, _ = made("gated_delta_net", softmax, **sizes)
    assert words["qkv.k.kernel"] == "k, 4 heads of 4, at each of 3 steps"
    for mixer in (product, delta):
        mixer.beta.kernel[...] *= 0
    product.output_gate.kernel[...] = delta.output_gate.kernel[...]
    np.testing.assert_allclose(product(x)[0], delta(x)[0], atol=1e-5)


def test_families_without_q_and_k_take_over_what_softmax_does_where_all_weigh_alike():
    softmax = softmax_of()._replace(biases=())
    read = np.einsum("mhv,hvd->md", softmax.v, softmax.out)[:-1]
    for init in ("lin", "inv", "real"):
        s4d, _ = made("s4d", softmax, init=init, state_dim=8, n_ssm=2)
        log_a, b, c = s4d.ssm.discrete()
        t = np.arange(3 * SPAN)
        kernel = 2 * np.real(np.einsum("dn,dnt->dt", c * b, np.exp(np.asarray(log_a)[..., None] * t)))
        np.testing.assert_allclose(kernel, -np.expm1(-1 / REACH) * np.exp(-t / REACH)[None].repeat(D, 0), rtol=0.01)
        np.testing.assert_allclose(s4d.out.kernel[...], 2 * read, atol=2e-5)
    mamba, words = made("mamba", softmax, expand=2.0)
    step = jax.nn.softplus(mamba.dt_bias[...])
    np.testing.assert_allclose(step, 1 / REACH, rtol=1e-4)
    np.testing.assert_allclose(-jnp.exp(mamba.A_log[...]), -1.0)
    np.testing.assert_allclose(mamba.in_x.kernel[...] @ mamba.out.kernel[...], read, atol=2e-5)
    assert "select.kernel" not in words
    with pytest.raises(UsageError, match="bias on v, and this mixer none; set its biases=out"):
        made("s4d", softmax._replace(biases=("q", "v")))


def test_projections_of_relu_come_near_those_of_the_token():
    softmax = softmax_of()._replace(biases=())
    x = np.random.default_rng(2).normal(size=(4000, D)).astype(np.float32)
    mixer, _ = made("conv_linear", softmax, num_heads=4)
    v = np.asarray(softmax.v[:-1]).reshape(D, -1)
    u, wanted = np.maximum(x, 0), x @ v
    left = u @ mixer.attention.v.kernel[...] - wanted
    left -= left.mean(0)
    # Of the mean over channels nothing comes through; of the rest there is left 1 - (1 / 4) / (1 / 2 - 1 / (2 pi)).
    of_mean = D * np.square(v.mean(0)).sum() / np.square(v).sum()
    expected = of_mean + (1 - of_mean) * (1 - 0.25 / (0.5 - 0.5 / np.pi))
    assert np.square(left).sum() / np.square(wanted).sum() == pytest.approx(expected, rel=0.03)


def test_grouped_heads_go_into_grouped_heads():
    """4 heads of q with 2 of k, into 2 of q and k with 4 of v: those of one k are added up, exactly."""
    rng = np.random.default_rng(3)
    k = jnp.repeat(jnp.asarray(rng.normal(size=(D + 1, 2, 4)), jnp.float32), 2, axis=1)
    softmax = softmax_of()._replace(biases=(), k=k)
    mixer, words = made("gated_delta_net", softmax, num_heads=2, num_v_heads=4, expand_k=0.5, expand_v=1.0)
    q, k = (np.asarray(layer.kernel[...]).reshape(D, 2, 4) for layer in (mixer.qkv.q, mixer.qkv.k))
    np.testing.assert_allclose(np.einsum("mhk,nhk->hmn", q, k), products(softmax, 2)[:, :-1, :-1], atol=2e-5)
    assert words["qkv.q.kernel"] == "q, 4 heads of 4 as 2 of 4" and words["qkv.v.kernel"] == "v, 4 heads of 4"


@pytest.mark.parametrize("mixer", ["gla,gla,attention", "gated_delta_net", "mamba2,attention", "performer", "retnet"])
def test_every_parameter_has_an_origin(mixer):
    found = {row.name: row.of for row in transfer(model_config("attention"), model_config(mixer)).table}
    assert found["embed.embedding"] == found["units.blocks.0.mlp.up.kernel"] == "kept"
    taken = "in_xBC" if "mamba2" in mixer else "qkv.v" if "delta" in mixer else "v"
    assert "4 heads of 4" in found[f"units.blocks.0.mixer.{taken}.kernel"]
    last = len(mixer.split(",")) - 1
    if mixer.endswith("attention"):
        assert found[f"units.blocks.{last}.mixer.q.kernel"] == "kept"


@pytest.mark.slow
@pytest.mark.parametrize("mixer", list(CAUSAL_MIXERS))
def test_every_family_takes_over_only_parameters_that_it_has(mixer):
    transfer(model_config("attention"), model_config(mixer, d_ff=24))


def test_layers_of_patterns_of_other_lengths_are_those_of_the_same_depth():
    source, target = model_config("attention,attention"), model_config("linear_attention,linear_attention,attention")
    found = transfer(source, target)
    models = [nnx.eval_shape(lambda c=c: LanguageModel(c, rngs=nnx.Rngs(0))) for c in (source, target)]
    states = [nnx.state(model, nnx.Param) for model in models]

    def numbered(tree, length):
        """Every entry of a layer is its number."""
        named = {}
        for name, x in checkpoints.named_leaves(tree).items():
            place = int(name.split(".")[2]) if name.startswith("units.") else 0
            rows = jnp.arange(x.shape[0]) * length + place if name.startswith("units.") else jnp.zeros(x.shape[0])
            named[name] = jnp.broadcast_to(rows.reshape(-1, *[1] * (len(x.shape) - 1)), x.shape).astype(x.dtype)
        return checkpoints.with_leaves(tree, named)

    fresh = jax.tree.map(lambda x: jnp.full(x.shape, -1.0, x.dtype), states[1])
    made = checkpoints.named_leaves(found(numbered(states[0], 2), fresh))
    for place in range(3):
        for name in ("mixer.q.kernel", "mixer.out.kernel", "mlp.up.kernel", "mixer_norm.scale"):
            x = made[f"units.blocks.{place}.{name}"]
            np.testing.assert_array_equal(x.reshape(2, -1)[:, 0], [place, place + 3])


@pytest.mark.parametrize(
    ("there", "here", "message"),
    [
        ({}, {"num_layers": 3}, "model.num_layers: 6 there, 3 here"),
        ({}, {"d_model": 32}, "model.d_model: 16 there, 32 here"),
        ({}, {"vocab_size": 128}, "model.vocab_size: 64 there, 128 here"),
        ({"positions": "learned", "max_positions": 64}, {}, "model.positions: learned there, rope here"),
        ({}, {"d_ff": 32}, r"mlp.down.kernel: \[24, 16\] there, \[32, 16\] here; .*model.d_ff sets"),
        ({"attention.biases": "q,k"}, {}, "attention -> gla: .* bias on q, k, .* set its biases=q,k"),
        ({"mixer": "retnet"}, {}, "retnet -> gla.*retnet has nothing that another family takes over"),
        ({"direction": "bidirectional"}, {}, "model.direction: bidirectional there, causal here"),
    ],
)
def test_pairs_that_do_not_fit_are_refused_before_anything_is_computed(there, here, message):
    source, target = model_config("attention"), model_config("gla")
    for config, settings in ((source, there), (target, here)):
        for name, value in settings.items():
            *path, field = name.split(".")
            setattr(getattr(config, path[0]) if path else config, field, value)
    with pytest.raises(UsageError, match=f"--init_from=runs/a.*{message}"):
        transfer(source, target)


def test_the_width_of_mlps_is_the_source_s_where_none_is_asked_for():
    source, target = model_config("attention", d_ff=0), model_config("gated_delta_net", d_ff=0)
    width = zoo_config.mlp_width(source, zoo_config.places(source)[0])
    assert settled_width(source, target) == width != zoo_config.mlp_width(target, zoo_config.places(target)[0])
    assert settled_width(source, copy.deepcopy(source)) == 0
    target.d_ff = 40
    assert settled_width(source, target) == 40
