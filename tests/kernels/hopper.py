"""Hopper GPUs that are not there: their chunk math on plain arrays, and ahead-of-time compilation.

wgmma cannot be interpreted on a CPU. `KERNELS` have the arguments and results of their namesakes in
kernels/linear_attention/mosaic_gpu/launch.py and run the same chunk math, with the same roundings, tile by tile.
"""

import pathlib
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.experimental import topologies

from kernels.linear_attention.mosaic_gpu import chunk
from kernels.linear_attention.mosaic_gpu.chunk import CHUNK

TARGET = pathlib.Path(__file__).with_name("h200.txtpb")  # what the compiler asks a GPU for


def h200() -> jax.Device:
    """An H200 to compile for; skips the test where jax's CUDA plugin is not installed."""
    pytest.importorskip("jax_cuda13_plugin", reason="needs jax's CUDA plugin and ptxas: make test-gpu-compile")
    options = {"target_config": TARGET.read_text(), "topology": "1x1x1"}
    return topologies.get_topology_desc(platform="cuda", topology_name="h200", **options).devices[0]


class Arrays:
    """The machine of chunk.py on arrays."""

    def index(self, axis):
        return lax.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), axis)

    def load(self, shared):
        assert shared.dtype == jnp.bfloat16
        return shared.astype(jnp.float32)

    def rows(self, vector, width):
        return jnp.broadcast_to(vector[:, None], (CHUNK, width))

    def columns(self, vector):
        return jnp.broadcast_to(vector[None], (CHUNK, CHUNK))

    def half(self, x):  # XLA may leave out a rounding that is only a conversion there and back
        return lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7).astype(jnp.bfloat16)

    stage = half

    def stage_all(self, *values):
        return [self.half(x) for x in values]

    def transposed(self, shared):
        return shared.T

    def ones(self, which):
        i, t = self.index(0), self.index(1)
        return self.half({"upto": t <= i, "from": t >= i, "before": t < i, "after": t > i}[which].astype(jnp.float32))

    def dots(self, start, *pairs):
        assert all(x.dtype == jnp.bfloat16 and x.shape[0] % CHUNK == 0 for pair in pairs for x in pair)
        products = [jnp.dot(a, b, preferred_element_type=jnp.float32) for a, b in pairs]
        return sum(products, 0.0 if start is None else start)


M = Arrays()


def by_chunk(plan, x):
    """[B, T, heads, X] -> [B H, N, 64, X]"""
    x = jnp.repeat(x, plan.heads // x.shape[2], axis=2).transpose(0, 2, 1, 3)
    return x.reshape(plan.sequences, plan.chunks, CHUNK, -1)


def by_token(plan, x):
    """The inverse, for H heads."""
    return x.reshape(plan.batch, plan.heads, plan.time, -1).transpose(0, 2, 1, 3)


def tiles(x, axis=-1):
    return jnp.split(x, x.shape[axis] // CHUNK, axis=axis)


def decays_by_chunk(plan, decay):
    if plan.per_key:
        return SimpleNamespace(high=by_chunk(plan, decay[0]), low=by_chunk(plan, decay[1]))
    return SimpleNamespace(vectors=decay.reshape(3, plan.sequences, plan.chunks, CHUNK))


def chunk_decays(plan, arrays, gate):
    """One a key tile; `gate` is 1 for reads and 2 for writes."""
    if plan.per_key:
        return [chunk.PerKey(*pair) for pair in zip(tiles(arrays["high"]), tiles(arrays["low"]), strict=True)]
    return [chunk.Scalar(arrays["vectors"][0], arrays["vectors"][gate])] * plan.key_tiles


def over_chunks(plan, function, decay, *arrays):
    """`function(decays, *arrays)` for each sequence and chunk."""
    named = vars(decays_by_chunk(plan, decay))
    axes = {name: 1 if name == "vectors" else 0 for name in named}
    function = jax.vmap(jax.vmap(function, (axes, *(0 for _ in arrays))), (axes, *(0 for _ in arrays)))
    return function(named, *arrays)


def sweep(plan, reverse, x, y, decay, totals, starts, keep):
    x, y = by_chunk(plan, x), by_chunk(plan, y)
    named = vars(decays_by_chunk(plan, decay))
    totals = totals.reshape(plan.sequences, plan.chunks, plan.key_dim)

    def step(state, n):
        def one(named, x, y, total, state):
            decays = chunk_decays(plan, named, 1 if reverse else 2)
            parts = zip(decays, tiles(x), tiles(total), tiles(state, 0), strict=True)
            return jnp.concatenate(
                [chunk.update(M, d, reverse, plan.scale, xt, y, total, s) for d, xt, total, s in parts]
            )

        axes = {name: 1 if name == "vectors" else 0 for name in named}
        here = {name: value[:, :, n] if name == "vectors" else value[:, n] for name, value in named.items()}
        return jax.vmap(one, (axes, 0, 0, 0, 0))(here, x[:, n], y[:, n], totals[:, n], state), M.half(state)

    starts = starts.reshape(plan.sequences, plan.parts, plan.key_dim, plan.value_dim)
    states, ends = [], []
    for part in range(plan.parts):
        first = part * plan.part_chunks
        numbers = jnp.arange(first, min(first + plan.part_chunks, plan.chunks))
        assert numbers.size
        end, before = lax.scan(step, starts[:, part], numbers, reverse=reverse)
        states.append(jnp.moveaxis(before, 0, 1))
        ends.append(end)
    states = jnp.concatenate(states, axis=1).reshape(plan.states_shape)
    return states if keep else None, jnp.stack(ends, 1).reshape(-1, plan.key_dim, plan.value_dim)


def scores(plan, q, k, decay):
    def one(named, q, k):
        values = None
        for tile_decay, *tile in zip(chunk_decays(plan, named, 1), tiles(q), tiles(k), strict=True):
            values = chunk.scores(M, tile_decay, *tile, values)
        return M.half(plan.scale * values)

    return over_chunks(plan, one, decay, by_chunk(plan, q), by_chunk(plan, k)).reshape(plan.sequences, -1, CHUNK)


def read(plan, reverse, x, y, w, decay, states):
    def one(named, x, y, w, state):
        decays, state = chunk_decays(plan, named, 2 if reverse else 1), tiles(state, 0)
        if plan.per_key:
            return M.half(chunk.read_per_key(M, decays, reverse, plan.scale, tiles(x), y, w, state))
        return M.half(chunk.read(M, decays[0], reverse, plan.scale, tiles(x), tiles(y), w, state))

    states = states.reshape(plan.sequences, plan.chunks, plan.key_dim, plan.value_dim)
    y = y.reshape(plan.sequences, plan.chunks, CHUNK, CHUNK) if plan.per_key else by_chunk(plan, y)
    return by_token(plan, over_chunks(plan, one, decay, by_chunk(plan, x), y, by_chunk(plan, w), states))


def sum_products(plan, v, d_out, state, d_state):
    """One of chunk.Products for each tile of keys."""
    for state_tile, d_state_tile in zip(tiles(state, 0), tiles(d_state, 0), strict=True):
        sums = None
        for columns in zip(*map(tiles, (v, d_out, state_tile, d_state_tile)), strict=True):
            sums = chunk.add_products(M, sums, *columns)
        yield sums


def keys_last(plan, x):  # [B H, N, K / 64, 64, 64] -> [B, T, H, K]
    return by_token(plan, x.transpose(0, 1, 3, 2, 4).reshape(plan.sequences, plan.chunks, CHUNK, -1))


def gradients(plan, q, k, v, d_out, decay, states, d_states):
    def one(named, q, k, v, d_out, state, d_state):
        decays, results = (chunk_decays(plan, named, gate) for gate in (1, 2)), []
        sums = sum_products(plan, v, d_out, state, d_state)
        for reads, writes, *tile, products in zip(*decays, tiles(q), tiles(k), sums, strict=True):
            dq, dk, *terms = chunk.key_gradients(M, reads, writes, plan.scale, *tile, products)
            results.append((M.half(dq), M.half(dk), *terms, products.states))
        return tuple(jnp.stack(x) for x in zip(*results, strict=True))  # [K / 64, 64, ...]

    shape = (plan.sequences, plan.chunks, plan.key_dim, plan.value_dim)
    operands = *(by_chunk(plan, a) for a in (q, k, v, d_out)), states.reshape(shape), d_states.reshape(shape)
    dq, dk, *terms, products = over_chunks(plan, one, decay, *operands)
    terms = (x.transpose(2, 0, 1, 3).reshape(plan.key_tiles, plan.sequences, -1) for x in terms)
    return keys_last(plan, dq), keys_last(plan, dk), *terms, products.reshape(plan.sequences, -1)


def products(plan, v, d_out, states, d_states):
    def one(v, d_out, state, d_state):
        results = [
            (M.half(plan.scale * sums.pairs), M.half(plan.scale * sums.dq), M.half(sums.dk), sums.states)
            for sums in sum_products(plan, v, d_out, state, d_state)
        ]
        return tuple(jnp.stack(x) for x in zip(*results, strict=True))

    shape = (plan.sequences, plan.chunks, plan.key_dim, plan.value_dim)
    operands = by_chunk(plan, v), by_chunk(plan, d_out), states.reshape(shape), d_states.reshape(shape)
    pairs, dq, dk, sums = jax.vmap(jax.vmap(one))(*operands)
    pairs = pairs[:, :, 0].reshape(plan.sequences, -1, CHUNK)
    return pairs, keys_last(plan, dq), keys_last(plan, dk), sums.reshape(plan.sequences, -1)


def key_gradients(plan, q, k, pairs, dq, dk, decay, later):
    def one(named, pairs, later, *arrays):
        decays = chunk_decays(plan, named, 1)
        results = []
        for d, later_tile, q, k, dq, dk in zip(decays, tiles(later), *map(tiles, arrays), strict=True):
            dq, dk, changes = chunk.key_gradients_per_key(M, d, q, k, pairs, dq, dk, later_tile)
            results.append((M.half(dq), M.half(dk), changes))
        return tuple(jnp.stack(x) for x in zip(*results, strict=True))

    by_chunks = (
        x.reshape(plan.sequences, plan.chunks, *shape) for x, shape in ((pairs, (CHUNK, CHUNK)), (later, (-1,)))
    )
    results = over_chunks(plan, one, decay, *by_chunks, *(by_chunk(plan, a) for a in (q, k, dq, dk)))
    return tuple(keys_last(plan, x) for x in results)


KERNELS = (sweep, scores, read, gradients, products, key_gradients)
