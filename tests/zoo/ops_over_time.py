"""Ops on eight devices that each have a part of the time, beside the same ops on one: a program, as devices are made
once a process. It prints, for each case, the largest relative error of outputs, final states and gradients.

    python -m tests.zoo.ops_over_time [PATTERN [PARTS]]

Heads and channels are spread over the devices that the parts of the time leave.
"""

import functools
import json
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np

from kernels import dispatch, segments
from zoo import ops, sharding

T, H, K, V, D, N = 32, 4, 3, 5, 6, 3
# Documents that start within a part of the time (of 4 tokens or 8), at its beginning, and in no part but the first.
IDS = np.array([[0] * 3 + [1] * 9 + [0] * 4 + [1] * 15 + [3], [7] * T], np.int32)


def draw(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def decay(seed, *shape):
    return -jnp.exp(draw(seed, *shape) - 2)


def unit(x):
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def wrap(turns):
    return turns - jnp.round(jax.lax.stop_gradient(turns))


def cases():
    """(name, function of arrays and segment_ids, arrays, implementations)."""
    q, k, v, state = draw(0, 2, T, H, K), draw(1, 2, T, H, K), draw(2, 2, T, H, V), draw(3, 2, H, K, V)

    def linear(q, k, v, g, state, **given):
        return ops.linear_attention(q, k, v, g, initial_state=state, **given)

    kernels = (None, "mosaic_tpu")
    for name, g in {"fixed": decay(4, H), "scalar": decay(4, 2, T, H), "key": decay(4, 2, T, H, K)}.items():
        yield f"linear_attention {name}", linear, (q, k, v, g, state), kernels
    no_decay = lambda q, k, v, **given: linear(q, k, v, None, None, **given)  # noqa: E731
    yield "linear_attention none", no_decay, (q, k, v), (None,)
    yield "linear_attention shared", linear, (q[:, :, :2], k[:, :, :2], v, decay(4, 2, T, H), state), (None,)

    def with_bonus(q, k, v, g, u, **given):
        return ops.linear_attention(q, k, v, g, bonus=u, **given)

    yield "linear_attention bonus", with_bonus, (q, k, v, decay(4, 2, T, H, K), draw(5, H, K)), kernels

    def delta_rule(q, k, v, beta, g, state, **given):
        return ops.delta_rule(q, unit(k), v, 2 * jax.nn.sigmoid(beta), g, initial_state=state, **given)

    beta = draw(5, 2, T, H)
    yield "delta_rule scalar", delta_rule, (q, k, v, beta, decay(4, 2, T, H), state), (None,)
    yield "delta_rule key", delta_rule, (q, k, v, beta, decay(4, 2, T, H, K), state), (None,)
    corrected = lambda q, k, v, beta, **given: delta_rule(q, k, v, beta, None, None, **given)  # noqa: E731
    yield "delta_rule none", corrected, (q[:, :, :2], k[:, :, :2], v, beta), (None,)

    def general(q, k, v, a, rate, g, state, **given):
        b = unit(a) * jax.nn.sigmoid(rate)
        return ops.dplr_delta_rule(q, k, v, -unit(a), b, g, initial_state=state, **given)

    arrays = (q, k, v, draw(6, 2, T, H, K), draw(7, 2, T, H, K), decay(4, 2, T, H, K), state)
    yield "dplr_delta_rule", general, arrays, kernels

    def fast_weights(q, k, v, g, f, state, **given):
        return ops.fast_weights(q, k, v, g, f, initial_state=state, **given)

    arrays = (q, k, v, decay(4, 2, T, H, K), decay(5, 2, T, H, V), state)
    yield "fast_weights", fast_weights, arrays, (None,)

    def linear_scan(x, g, h, **given):
        return ops.linear_scan(x, g, initial_state=h, **given)

    x, h = draw(0, 2, T, D), draw(1, 2, D)
    yield "linear_scan", linear_scan, (x, decay(2, 2, T, D), h), kernels
    yield "linear_scan fixed", linear_scan, (x, decay(2, D), h), (None,)
    yield "linear_scan complex", linear_scan, (x, decay(2, 2, T, D) + 1j * draw(3, 2, T, D), h + 0j), kernels

    def selective_scan(*arrays, **given):
        return ops.selective_scan(*arrays[:-1], initial_state=arrays[-1], **given)

    arrays = (x, -decay(2, 2, T, D), decay(3, D, N), draw(4, 2, T, N), draw(5, 2, T, N), draw(6, D), draw(7, 2, D, N))
    yield "selective_scan", selective_scan, arrays, kernels

    def diagonal_ssm(x, rate, turn, b, c, d, h, **given):
        return ops.diagonal_ssm(x, rate + 1j * turn, b + 1j, c - 1j, d, initial_state=h + 0.1j, **given)

    arrays = (x, decay(2, D, N), draw(3, D, N), draw(4, D, N), draw(5, D, N), draw(6, D), draw(7, 2, D, N))
    yield "diagonal_ssm", diagonal_ssm, arrays, (None,)

    def conv(x, w, b, h=None, **given):
        return ops.short_conv(x, w, b, activation="silu", initial_state=h, **given)

    for taps in (2, 5, 12, 40):  # within a part, all of one, of several, of more than there are
        arrays = (x, draw(2, D, taps), draw(3, D))
        yield f"short_conv {taps}", conv, arrays, (None,)
        if taps <= 5:  # what is given reaches into the first part alone
            yield f"short_conv {taps} state", conv, (*arrays, draw(4, 2, taps - 1, D)), (None,)
    yield "previous", lambda x, h, **given: ops.previous(x, initial_state=h, **given), (x, h), (None,)

    def earlier(x, h=None, distance=None, **given):
        return ops.earlier(x, distance, initial_state=h, **given)

    for distance in (3, 9):  # within a part, of several
        call = functools.partial(earlier, distance=distance)
        yield f"earlier {distance}", call, (x,), (None,)
    yield "earlier 3 state", functools.partial(earlier, distance=3), (x, draw(1, 2, 3, D)), (None,)

    def running_sum(x, first, segment_ids):
        return ops.associative_scan(lambda a, b: wrap(a + b), x, first)

    yield "associative_scan", running_sum, (0.1 * x, 0.1 * h), (None,)

    groups = draw(0, 2, T, H, 4), draw(1, 2, T, 2, 4), draw(2, 2, T, 2, 4)
    for window in (None, 3, 9, 29, 30):  # keys of one neighbour, of several, of all
        attend = lambda q, k, v, window=window, **given: ops.attention(q, k, v, window=window, **given)  # noqa: E731
        yield f"attention {window}", attend, groups, (None,)
    for window in (None, 3):
        attend = lambda q, k, v, g, window=window, **given: ops.attention(  # noqa: E731
            q, k, v, window=window, log_decay=g, **given
        )
        yield f"attention decay {window}", attend, (*groups, decay(3, 2, T, H)), (None,)
    for window in (None, 3, 9, 30):
        options = {"causal": False, "window": window}
        attend = lambda q, k, v, options=options, **given: ops.attention(q, k, v, **options, **given)  # noqa: E731
        yield f"attention both ways {window}", attend, groups, (None,)
    full = lambda q, k, v, **given: ops.full_linear_attention(q, k, v, **given)  # noqa: E731
    yield "full_linear_attention", full, (q, k, v), (None,)

    def odd(q, k, v, segment_ids):  # parts of three tokens, whose halves are not equal
        ids = None if segment_ids is None else segment_ids[:, :24]
        return ops.attention(q[:, :24], k[:, :24], v[:, :24], segment_ids=ids)

    yield "attention odd", odd, groups, (None,)

    def cross_entropy(hidden, head, segment_ids):
        return ops.cross_entropy(hidden, head, jnp.asarray(IDS), jnp.arange(2.0 * T).reshape(2, T))

    yield "cross_entropy", cross_entropy, (x, draw(1, D, 9)), (None,)
    yield "cross_entropy half", cross_entropy, (x.astype(jnp.bfloat16), draw(1, D, 9).astype(jnp.bfloat16)), (None,)


def error(mesh, function, arrays, ids):
    """The largest difference of an output or a gradient, relative to the array's largest entry."""

    def run(arrays):
        out, pull = jax.vjp(lambda *arrays: function(*arrays, segment_ids=ids), *arrays)
        return out, pull(out)

    alone = jax.jit(run)(arrays)
    with sharding.use_mesh(mesh):
        spread = jax.jit(lambda arrays: run(arrays))(arrays)
    parts = jax.tree.leaves(spread[0])[0].sharding.spec
    assert "sequence" in jax.tree.leaves(tuple(parts)), parts
    wide = lambda x: np.asarray(x, np.float32) if x.dtype == jnp.bfloat16 else np.asarray(x)  # noqa: E731
    pairs = zip(*(map(wide, jax.tree.leaves(tree)) for tree in (alone, spread)), strict=True)
    return float(np.max([np.max(np.abs(a - b)) / np.max(np.abs(a)) for a, b in pairs]))  # nan if one is


def main(pattern, parts):
    mesh = sharding.make_mesh(sharding.MeshConfig(data=1, sequence=parts, tensor=8 // parts))
    for name, function, arrays, implementations in cases():
        for implementation in implementations:
            for ids in (None, jnp.asarray(IDS)):
                full = " ".join(filter(None, (name, implementation, "packed" if ids is not None else "")))
                if re.search(pattern, full):
                    with dispatch.use_implementation(*filter(None, (implementation,))):
                        print(json.dumps([full, error(mesh, function, arrays, ids)]), flush=True)
    before = jnp.array([3, 5])
    with sharding.use_mesh(mesh):
        age, starts = jax.jit(lambda ids: (ops.tokens_since_start(ids, before), ops.segment_starts(ids)))(IDS)
    ids = jnp.asarray(IDS)
    same = (age == segments.tokens_since_start(ids, before)).all() & (starts == segments.segment_starts(ids)).all()
    print(json.dumps(["positions and starts", float(not same)]))


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)
    pattern, parts = [*sys.argv[1:], *("", "8")[len(sys.argv) - 1 :]]
    main(pattern, int(parts))
