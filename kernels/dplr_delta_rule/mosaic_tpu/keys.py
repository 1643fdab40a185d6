"""What reads and what writes in a chunk of C tokens of a slot of heads, and the scores between them.

A token reads twice, with q_i exp(g_i) and a_i, and writes twice, by b_j and k_j. At a level (decays.py) only the second
halves of blocks read and only the first halves write, so that in half of the rows and columns of a matmul there is
nothing. There the other two lie, and one matmul a level gives all four scores:

                 first half   second half of a block
    first half    a b          a k               rows: a of the tokens half a block later, columns: k of those before
    second half   q b          q k

Scores are four arrays [C, (h, C)]: of q with b and k, of a with b and k.
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu

from kernels.array_typing import Array
from kernels.delta_rule.mosaic_tpu.solve import parts
from kernels.delta_rule.specs import TILE
from kernels.dplr_delta_rule.mosaic_tpu.decays import decays
from kernels.linear_attention.mosaic_tpu import lanes
from kernels.linear_attention.mosaic_tpu.dots import Dots, grid_index
from kernels.linear_attention.mosaic_tpu.per_key import COMPACT, SUBLANES, first, head_products, interleave, second


class Keys:
    """Of q, scaled, k, a, b and g, [C, (h, K)], float32."""

    def __init__(self, dots: Dots, q: Array, k: Array, a: Array, b: Array, g: Array):
        self.dots, self.size, self.decays = dots, q.shape[0], decays(dots, g)
        self.q, self.k, self.a, self.b = q, k, a, b
        self.decayed = q * self.decays.own
        self.spread_b, self.spread_k = (lanes.spread(self.decays.times * x, dots.pack) for x in (b, k))

    def reads(self) -> Array:
        """What reads the state at the start: q and a, [2 C, (h, K)]."""
        return jnp.concatenate([self.decayed * self.decays.read, self.a * self.decays.read])

    def writes(self) -> Array:
        """What writes into the state at the end, but for its `tail`: b and k, [2 C, (h, K)]."""
        return jnp.concatenate([self.b * self.decays.write, self.k * self.decays.write])

    def at_level(self, level: int) -> tuple[Array, Array]:
        """What reads, [C, (h, K)], and what writes, [(h, C), (h, K)], with their decays."""
        e, b, k = self.decays.levels[level], self.spread_b, self.spread_k
        e_write, e_read = jnp.concatenate([e[0]] * self.dots.pack), e[-1]
        if level < COMPACT:
            readers = jnp.where(later(self.a, level), self.decayed * e_read, move(self.a * e_read, -level))
            return readers, jnp.where(later(b, level), move(k * e_write, level), b * e_write)
        readers = interleave(second(self.a, level) * e_read, second(self.decayed, level) * e_read, level)
        return readers, interleave(first(b, level) * e_write, first(k, level) * e_write, level)

    def scores(self) -> list[Array]:
        """Those of q with a token's own, of a below the diagonal."""
        i, j = grid_index(self.size, self.dots.pack)
        bits = jnp.where(i > j, i ^ j, 0)
        result = [jnp.zeros(bits.shape, jnp.float32)] * 4
        for level in self.decays.levels:
            here, with_b = bits >= level, self.dots.nt(*self.at_level(level))
            with_k = pltpu.roll(with_b, TILE - level, axis=1)
            if level < COMPACT:
                found = [with_b, with_k, move(with_b, level), move(with_k, level)]
                result = [jnp.where(here, x, y) for x, y in zip(found, result, strict=True)]
            else:
                found = [half(x, level) for half in (second, first) for x in (with_b, with_k)]
                found = [
                    jnp.where(second(here, level), x, second(y, level)) for x, y in zip(found, result, strict=True)
                ]
                result = [interleave(first(y, level), x, level) for x, y in zip(found, result, strict=True)]
        own = [jnp.where(i == j, head_products(self.dots, self.q, x), 0.0) for x in (self.b, self.k)]
        return [result[0] + own[0], result[1] + own[1], *result[2:]]

    def gradients(self, d_scores: list[Array]) -> list[Array]:
        """Through the scores of different tokens, [C, (h, K)]: of `decayed`, a, b and k."""
        dots = self.dots
        i, j = grid_index(self.size, dots.pack)
        q_b, q_k, a_b, a_k = d_scores
        dq = da = db = dk = jnp.zeros_like(self.q)
        for level, e in self.decays.levels.items():
            if level < COMPACT:
                with_b, with_k = (jnp.where(later(x, level), x, move(y, -level)) for x, y in ((q_b, a_b), (q_k, a_k)))
            else:
                with_b, with_k = (
                    interleave(second(y, level), second(x, level), level) for x, y in ((q_b, a_b), (q_k, a_k))
                )
            d_found = jnp.where((j & level) != 0, pltpu.roll(with_k, level, axis=1), with_b)
            if 2 * level < self.size:
                d_found = d_found * jnp.where((i ^ j) < 2 * level, 1.0, 0.0)
            readers, writers = self.at_level(level)
            d_readers, d_writers = dots.nn(d_found, writers), outer(dots, d_found, readers)
            if level < COMPACT:
                e_read, e_write = (jnp.where(later(e[0], level), *x) for x in ((e[0], 0.0), (0.0, e[0])))
                dq, da = dq + e_read * d_readers, da + e_read * move(d_readers, level)
                db, dk = db + e_write * d_writers, dk + e_write * move(d_writers, -level)
            else:
                dq, da = (
                    interleave(first(x, level), second(x, level) + e[1] * half(d_readers, level), level)
                    for x, half in ((dq, second), (da, first))
                )
                db, dk = (
                    interleave(first(x, level) + e[0] * half(d_writers, level), second(x, level), level)
                    for x, half in ((db, first), (dk, second))
                )
        return [dq, da, self.decays.times * db, self.decays.times * dk]


def later(x: Array, level: int) -> Array:
    """Which rows of x lie in the second halves of blocks of 2 * level."""
    return (lax.broadcasted_iota(jnp.int32, x.shape, 0) & level) != 0


def move(x: Array, rows: int) -> Array:
    """x moved down by so many rows, within the rows of a register."""
    tiles = x.reshape(-1, SUBLANES, x.shape[1])
    return pltpu.roll(tiles, rows % SUBLANES, axis=1).reshape(x.shape)


def outer(dots: Dots, x: Array, y: Array) -> Array:
    """x^T y of each head: x [R, (h, X)], y [R, (h, Y)] -> [X, (h, Y)]."""
    return lanes.blocks(dots.tn(x, y), dots.pack)


def precise_outer(dots: Dots, x: Array, y: Array) -> Array:
    """`outer` in three bfloat16 passes, as `solve.product`."""
    if dots.exact:
        return outer(dots, x, y)
    (x, x_low), (y, y_low) = parts(x), parts(y)
    return outer(dots, jnp.concatenate([x, x_low, x]), jnp.concatenate([y, y, y_low]))
