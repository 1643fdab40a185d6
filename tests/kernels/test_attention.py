"""What attention alone promises: positions, caches, rows that see nothing, blocks, and the vendors' kernels."""

import functools
import sys

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache
from jax.experimental.pallas.ops.tpu import splash_attention

from kernels import attention, attention_step, dispatch
from kernels.attention import splash as splash_module
from kernels.attention import sums
from kernels.attention.api import IMPLEMENTATIONS
from kernels.attention.splash import splash
from tests.kernels.conformance import error_ratio, normal

A100 = dispatch.Device("gpu", "NVIDIA A100-SXM4-80GB")


def qkv(T, L, *, heads=4, kv_heads=2, width=8, batch=2, seed=0):
    rng = np.random.default_rng(seed)
    return (
        normal(rng, batch, T, heads, width),
        normal(rng, batch, L, kv_heads, width),
        normal(rng, batch, L, kv_heads, width),
    )


def results(call, arrays, seed=1):
    """Output and gradients of q, k, v against one random cotangent."""

    @jax.jit
    def run(*arrays):
        out, pull = jax.vjp(call, *arrays)
        return (out, *pull(normal(np.random.default_rng(seed), *out.shape).astype(out.dtype)))

    return run(*arrays)


BLOCKS = {  # rows of several blocks, and tails that fill none
    "causal": (300, 300, {}),
    "window": (300, 300, {"window": 70}),
    "not_causal": (130, 200, {"causal": False}),
    "window_both_ways": (300, 300, {"causal": False, "window": 70}),
    "more_queries": (300, 150, {"window": 40}),  # the last queries see nothing
    "more_keys": (20, 1100, {}),
}


@pytest.mark.parametrize("case", BLOCKS)
def test_many_blocks_are_the_reference(case):
    T, L, options = BLOCKS[case]
    arrays = qkv(T, L)
    rng = np.random.default_rng(2)
    ids = tuple(jnp.asarray(np.cumsum(rng.random((2, length)) < 0.02, axis=1)) for length in (T, L))
    for more in ({}, {"segment_ids": ids}):
        call = functools.partial(attention, **options, **more)
        expected = results(functools.partial(call, implementation="reference"), arrays)
        for actual, wanted in zip(results(call, arrays), expected, strict=True):
            assert np.isfinite(actual).all()
            assert error_ratio(actual, wanted) < 2e-6


def test_a_query_that_sees_nothing_gives_zero_and_no_gradient():
    arrays = qkv(6, 6)
    ids = (jnp.array([[7, 1, 1, 2, 2, 7]] * 2), jnp.array([[1, 1, 1, 2, 2, 2]] * 2))
    out, dq, dk, dv = results(functools.partial(attention, segment_ids=ids), arrays)
    blind = np.array([0, 5])
    assert not np.any(out[:, blind]) and not np.any(dq[:, blind])
    assert all(np.isfinite(x).all() for x in (out, dq, dk, dv))


@pytest.mark.parametrize("options", [{}, {"window": 6}, {"softcap": 1.0}], ids=["causal", "window", "softcap"])
def test_decoding_from_a_cache_is_the_full_form(options):
    T, room = 12, 20
    q, k, v = qkv(T, T)
    expected = attention(q, k, v, **options)
    garbage = jnp.full((2, room - T, *k.shape[2:]), 1e4)  # a cache's empty rows are never read
    k, v = (jnp.concatenate([x, garbage], 1) for x in (k, v))

    @jax.jit
    def prefill_then_decode():
        first = attention(q[:, :7], k, v, q_positions=jnp.broadcast_to(jnp.arange(7), (2, 7)), **options)
        steps = [attention(q[:, t : t + 1], k, v, q_positions=jnp.full((2, 1), t), **options) for t in range(7, T)]
        return jnp.concatenate([first, *steps], 1)

    assert error_ratio(prefill_then_decode(), expected) < 1e-6


def test_rows_may_stand_at_different_positions():
    q, k, v = qkv(1, 16)
    positions = jnp.array([[3], [11]])
    out = attention(q, k, v, q_positions=positions)
    for row, length in enumerate((4, 12)):
        here = slice(row, row + 1)
        alone = attention(q[here], k[here, :length], v[here, :length], causal=False)
        assert error_ratio(out[here], alone) < 1e-6


def test_keys_may_stand_anywhere():
    q, k, v = qkv(10, 10)
    order = np.random.default_rng(3).permutation(10)
    positions = jnp.broadcast_to(jnp.asarray(order, jnp.int32), (2, 10))
    out = attention(q, k[:, order], v[:, order], kv_positions=positions, window=4)
    assert error_ratio(out, attention(q, k, v, window=4)) < 1e-6


@pytest.mark.parametrize(
    "options",
    [{}, {"window": 5}, {"causal": False}, {"causal": False, "window": 5}],
    ids=["causal", "window", "both ways", "window both ways"],
)
@pytest.mark.parametrize("implementation", ["reference", "chunked"])
def test_a_part_of_the_queries_at_its_place_among_the_keys(options, implementation):
    q, k, v = qkv(12, 12)
    options = options | {"segment_ids": jnp.array([[0] * 5 + [1] * 7, [0] * 2 + [1] * 7 + [0] * 3])}
    whole = attention(q, k, v, **options)

    @jax.jit
    def part(start):  # not known while the program is made
        here = jax.lax.dynamic_slice_in_dim(q, start, 4, axis=1)
        return attention(here, k, v, q_start=start, implementation=implementation, **options)

    for start in (0, 4, 8):
        assert error_ratio(part(start), whole[:, start : start + 4]) < 1e-6
    for here in (slice(5, None), slice(3, 8)):
        assert error_ratio(attention(q[:, here], k, v, q_start=here.start, **options), whole[:, here]) < 1e-6


@pytest.mark.parametrize(
    "given, message",
    [
        ({"q_start": 8}, "q_start is 8, expected 5 queries within the 12 keys"),
        ({"q_start": 7, "q_positions": jnp.zeros((2, 5), jnp.int32)}, "give no positions"),
        ({"q_start": 7, "segment_ids": (jnp.zeros((2, 5), jnp.int32), jnp.zeros((2, 12), jnp.int32))}, "as one array"),
    ],
)
def test_a_part_that_is_none_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        attention(*qkv(5, 12), **given)


def test_a_traced_part_must_be_one_of_equal_parts():
    with pytest.raises(ValueError, match="12 keys are no multiple of the 5 queries, and q_start is traced"):
        jax.eval_shape(lambda start: attention(*qkv(5, 12), q_start=start), jnp.int32(0))


def decays(T, *, heads=4, batch=2):
    """Memories of 2 to 200 tokens."""
    return jnp.log1p(-jnp.exp(-1 - 4 * jax.random.uniform(jax.random.key(7), (batch, T, heads))))


def test_decays_over_many_blocks_are_the_reference():
    arrays = *qkv(300, 300), decays(300)
    call = lambda q, k, v, g, **given: attention(q, k, v, log_decay=g, window=170, **given)  # noqa: E731
    expected = results(functools.partial(call, implementation="reference"), arrays)
    for actual, wanted in zip(results(call, arrays), expected, strict=True):
        assert error_ratio(actual, wanted) < 2e-6
    q, k, v, g = (np.asarray(x, np.float64) for x in arrays)
    total = np.cumsum(g, axis=1)
    logits = np.einsum("bthk,bshk->bths", q, np.repeat(k, 2, 2)) / np.sqrt(8) + (total[..., None] - total.transpose(
        0, 2, 1)[:, None])  # fmt: skip
    distance = np.arange(300)[:, None] - np.arange(300)
    weights = np.exp(np.where(((distance >= 0) & (distance < 170))[:, None], logits, -np.inf))
    weights /= weights.sum(-1, keepdims=True)
    assert error_ratio(expected[0], np.einsum("bths,bshv->bthv", weights, np.repeat(v, 2, 2))) < 2e-6


def test_sums_of_decays_keep_their_digits():
    g = decays(20_000, heads=1, batch=1) * 10
    found = np.asarray(jax.jit(sums)(g), np.float64).sum(-1)
    exact = np.cumsum(np.asarray(g, np.float64), axis=1)
    assert exact[0, -1, 0] < -3e3 and np.abs(found - exact).max() < 1e-7  # as one float32 it is off by 1e-4


def test_a_cache_of_sums_is_the_full_form():
    @jax.jit
    def last_three(q, k, v, g):
        of_keys = sums(g)
        pair, here = (of_keys[:, 6:], of_keys), jnp.array([[6, 7, 8]] * 2)
        part = attention(q[:, 6:], k, v, log_decay=g, q_start=6)
        return part, attention(q[:, 6:], k, v, log_decay=pair, q_positions=here), attention(q, k, v, log_decay=g)[:, 6:]

    *found, expected = last_three(*qkv(9, 9), decays(9))
    assert all(error_ratio(x, expected) < 1e-6 for x in found)


@pytest.mark.parametrize(
    "given, message",
    [
        ({"causal": False}, "expected causal=True"),
        ({"log_decay": jnp.ones((2, 5, 4))}, "log_decay is up to 1, expected at most 0"),
        ({"q_positions": jnp.zeros((2, 5), jnp.int32)}, "log_decay is one array, expected a pair of sums"),
    ],
)
def test_decays_that_are_none_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        attention(*qkv(5, 5), **{"log_decay": jnp.zeros((2, 5, 4))} | given)


@pytest.mark.parametrize("with_decays", [False, True], ids=["plain", "decays"])
def test_memory_is_linear_in_time(with_decays):
    def temporary_bytes(T):
        shapes = [jax.ShapeDtypeStruct((1, T, 2, 8), jnp.float32)] * 3
        shapes += [jax.ShapeDtypeStruct((1, T, 2), jnp.float32)] * with_decays

        def call(q, k, v, g=None):
            return attention(q, k, v, log_decay=g).sum()

        gradient = jax.jit(jax.grad(call, tuple(range(len(shapes)))))
        return gradient.lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    assert temporary_bytes(8192) < 4.5 * temporary_bytes(2048)


# The kernels of TPU and GPU


SPLASH = {
    "causal": {},
    "window": {"window": 50},
    "window_both_ways": {"causal": False, "window": 50},
    "softcap": {"causal": False, "softcap": 2.0},
    "packed": {"segment_ids": jnp.repeat(jnp.array([[3, 1]]), 64, axis=1)},
}


@pytest.mark.parametrize("case", SPLASH)
def test_splash_interpreted_is_the_reference(case):
    arrays = qkv(128, 128, width=64, batch=1)
    given = {"causal": True, "window": None, "segment_ids": None, "softcap": None} | SPLASH[case]
    if given["segment_ids"] is not None:
        given["segment_ids"] = (given["segment_ids"],) * 2
    call = functools.partial(
        splash, q_start=None, q_positions=None, kv_positions=None, scale=0.1, interpret=True, **given
    )
    expected = results(functools.partial(attention, scale=0.1, implementation="reference", **SPLASH[case]), arrays)
    for actual, wanted in zip(results(call, arrays), expected, strict=True):
        assert error_ratio(actual, wanted) < 2e-6


@pytest.mark.parametrize("case", ["packed", *(pytest.param(c, marks=pytest.mark.slow) for c in ("causal", "window"))])
def test_splash_of_a_part_of_the_queries_is_the_reference(case, monkeypatch):
    """At a place that the kernel is made for, and at one that is only known when it runs."""
    monkeypatch.setitem(IMPLEMENTATIONS, "splash", functools.partial(splash, interpret=True))
    arrays = qkv(256, 256, width=64, batch=1)
    options = SPLASH[case] if case != "packed" else {"segment_ids": jnp.repeat(jnp.array([[3, 1, 1, 2]]), 64, axis=1)}

    def part(start, implementation):
        def call(q, k, v):
            here = jax.lax.dynamic_slice_in_dim(q, start, 128, axis=1)
            return attention(here, k, v, q_start=start, implementation=implementation, **options)

        return results(call, arrays)

    for start in (0, 128):
        expected = part(start, "reference")
        for found in (part(start, "splash"), jax.jit(functools.partial(part, implementation="splash"))(start)):
            for actual, wanted in zip(found, expected, strict=True):
                assert error_ratio(actual, wanted) < 2e-6


@pytest.fixture
def no_compilation_cache():
    """A kept executable of a device that is not here cannot be read back."""
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()


def test_splash_compiles_for_tpu_forward_and_backward(monkeypatch, no_compilation_cache):
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    pytest.importorskip("libtpu")
    v5e = topologies.get_topology_desc("v5e:2x2", "tpu").devices[0]
    here = jax.sharding.SingleDeviceSharding(v5e)
    shape = lambda *dims, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(dims, dtype, sharding=here)  # noqa: E731

    @jax.jit
    def values_and_gradients(q, k, v, segment_ids):
        out, pull = jax.vjp(lambda *arrays: attention(*arrays, window=100, segment_ids=segment_ids), q, k, v)
        return pull(out)

    heads = shape(2, 256, 4, 64), shape(2, 256, 2, 64), shape(2, 256, 2, 64)
    with dispatch.use_device(v5e):
        lowered = values_and_gradients.trace(*heads, shape(2, 256, dtype=jnp.int32)).lower()
    text = lowered.as_text()
    assert text.count("tpu_custom_call") == 3  # forward, dq, dk and dv
    assert lowered.compile().memory_analysis().temp_size_in_bytes < 2**24


REFUSED_BY_SPLASH = {
    "positions": (128, 128, {"q_positions": jnp.zeros((2, 128), jnp.int32)}),
    "same tokens": (128, 256, {}),
    "multiple of 128": (100, 100, {}),
    "segment has no key": (128, 128, {"segment_ids": (jnp.zeros((2, 128), jnp.int32), jnp.ones((2, 128), jnp.int32))}),
    "no decays": (128, 128, {"log_decay": (jnp.zeros((2, 128, 4, 2)),) * 2}),
}


@pytest.mark.parametrize("shape, offset", [((512, 512), 0), ((256, 1024), 384), ((512, 256), 0), ((256, 512), 100)])
@pytest.mark.parametrize("window", [None, (0, 0), (127, 0), (128, 0), (129, 0), (300, 0), (127, 127), (200, 64)])
def test_masks_by_blocks_make_the_kernel_of_masks_by_elements(shape, offset, window):
    def made(causal, local):
        mask = causal(shape, offset) if window is None else local(shape, window, offset=offset)
        heads, sizes = splash_attention.MultiHeadMask([mask] * 2), splash_attention.BlockSizes(*[128] * 8)
        return mask, splash_attention.make_splash_mha(heads, block_sizes=sizes, head_shards=1, q_seq_shards=1)

    theirs, wanted = made(splash_attention.CausalMask, splash_attention.LocalMask)
    ours, found = made(splash_module._Causal, splash_module._Local)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(one, other)
    for i, j in np.ndindex(shape[0] // 128, shape[1] // 128):
        block = slice(128 * i, 128 * (i + 1)), slice(128 * j, 128 * (j + 1))
        assert (ours[block].size == 1) == (len(np.unique(theirs[block])) == 1)


@pytest.mark.parametrize("reason", REFUSED_BY_SPLASH)
def test_splash_says_what_it_cannot_do(reason):
    T, L, options = REFUSED_BY_SPLASH[reason]
    with pytest.raises(NotImplementedError, match=reason):
        attention(*qkv(T, L), implementation="splash", **options)


@pytest.mark.skipif(dispatch.device().platform != "gpu", reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("window", [None, 40])
def test_cudnn_in_packed_rows(window):
    arrays = [x.astype(jnp.bfloat16) for x in qkv(192, 192)]
    segment_ids = jnp.asarray(np.cumsum(np.random.default_rng(0).random((2, 192)) < 0.05, axis=1), jnp.int32)

    def results(implementation, *arrays):
        call = functools.partial(attention, segment_ids=segment_ids, window=window, implementation=implementation)
        out, pull = jax.vjp(call, *arrays)
        return out, *pull(jnp.cos(out))

    wanted = results("reference", *(x.astype(jnp.float32) for x in arrays))
    for actual, expected in zip(results("cudnn", *arrays), wanted, strict=True):
        assert error_ratio(actual, expected) < 1e-2


def test_cudnn_masks_segments_up_to_a_limit(monkeypatch):
    monkeypatch.setattr(sys.modules["kernels.attention.cudnn"], "MASK_BYTES", 2 * 2 * 16 * 16 - 1)
    with pytest.raises(NotImplementedError, match="a mask of 1024 bytes"):
        attention(*(x.astype(jnp.bfloat16) for x in qkv(16, 16)), segment_ids=ids, implementation="cudnn")


def test_cudnn_is_called_forward_and_backward(monkeypatch):
    from jax._src.cudnn import fused_attention_stablehlo

    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)  # as if it were here
    arrays = [jax.ShapeDtypeStruct(x.shape, jnp.bfloat16) for x in qkv(64, 64)]
    for options, name in (
        ({"window": 5}, "Softmax"),
        ({"segment_ids": jnp.zeros((2, 64), jnp.int32)}, "ScaleBiasSoftmax"),
    ):
        call = functools.partial(attention, **options)
        gradients = jax.jit(lambda *arrays, call=call: jax.vjp(call, *arrays)[1](arrays[0]))
        with dispatch.use_device(A100):
            text = gradients.trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
        assert f"__cudnn$fmha{name}(" in text and f"__cudnn$fmha{name}Backward(" in text


ids = jnp.zeros((2, 16), jnp.int32)
REFUSED_BY_CUDNN = {
    "same segments": {"segment_ids": (ids, ids + 0)},
    "softcap": {"softcap": 2.0},
    "positions": {"q_positions": ids},
    "bfloat16 or all float16": {"dtype": jnp.float32},
    "window is causal": {"causal": False, "window": 3},
    "no decays": {"log_decay": (jnp.zeros((2, 16, 4, 2)),) * 2},
}


@pytest.mark.parametrize("reason", REFUSED_BY_CUDNN)
def test_cudnn_says_what_it_cannot_do(reason):
    options = dict(REFUSED_BY_CUDNN[reason])
    dtype = options.pop("dtype", jnp.bfloat16)
    arrays = [x.astype(dtype) for x in qkv(16, 16)]
    with pytest.raises(NotImplementedError, match=reason):
        attention(*arrays, implementation="cudnn", **options)
    with dispatch.use_device(A100):  # and the next in order takes the call
        out = attention(*arrays, **options)
    assert error_ratio(out, attention(*arrays, implementation="reference", **options)) < 5e-3


@pytest.mark.parametrize("stop", [300, 1100])  # blocks up to there; all of the cache
def test_a_step_is_the_reference_of_a_cache_turned_round(stop):
    q, k, v = qkv(3, 1100)
    decays = sums(-jnp.exp(normal(np.random.default_rng(3), 2, 1100, 4)))
    decays = decays[:, stop - 3 : stop], decays
    ids = (jnp.array([[0, 0, 0], [0, 0, 9]]), jnp.zeros((2, 1100), jnp.int32))  # the last query sees nothing
    positions = stop - 3 + jnp.arange(3) * jnp.ones((2, 1), int)
    visible = (ids[0][:, :, None] == ids[1][:, None]) & (positions[:, :, None] >= jnp.arange(1100))

    def step(q, k, v):
        pair = decays[0], decays[1].swapaxes(1, 2)
        return attention_step(q, k.swapaxes(1, 2), v.swapaxes(1, 2), visible, stop=stop, sums=pair)

    whole = functools.partial(attention, segment_ids=ids, q_positions=positions, log_decay=decays)
    whole = functools.partial(whole, implementation="reference")
    for actual, wanted in zip(results(step, (q, k, v)), results(whole, (q, k, v)), strict=True):
        assert error_ratio(actual, wanted) < 1e-6
    assert not step(q, k, v)[1, 2].any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": (2, 3, 7, 8), "v": (2, 3, 7, 8)}, "k has 3 heads"),
        ({"v": (2, 2, 6, 8)}, r"v has shape \(2, 2, 6, 8\), expected \(2, 2, 7, 8\)"),
        ({"visible": (2, 7)}, r"visible has shape \(2, 7\), expected \(2, 1, 7\)"),
    ],
)
def test_bad_arguments_of_a_step_are_named(change, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as users run: annotations are not checked
    shapes = {"q": (2, 1, 4, 8), "k": (2, 2, 7, 8), "v": (2, 2, 7, 8), "visible": (2, 1, 7)} | change
    with pytest.raises(ValueError, match=message):
        attention_step(**{name: jnp.ones(shape) for name, shape in shapes.items()})
