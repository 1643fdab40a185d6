"""What reads and what writes in a chunk of C tokens of a slot of heads, and the scores between them.

A token reads twice, with q_i exp(g_i) and a_i, and writes twice, by b_j and k_j: one matmul a level (decays.py) of what
reads, one below the other, and what writes gives four matrices of scores, [C, (h, C)]: of q with b and k, of a with b
and k.
"""

from collections.abc import Generator

import jax.numpy as jnp

from kernels.array_typing import Array
from kernels.delta_rule.mosaic_tpu.solve import parts
from kernels.delta_rule.specs import TILE
from kernels.dplr_delta_rule.mosaic_tpu.decays import decays
from kernels.linear_attention.mosaic_tpu import lanes
from kernels.linear_attention.mosaic_tpu.dots import Dots, grid_index
from kernels.linear_attention.mosaic_tpu.per_key import COMPACT, first, head_products, interleave, second


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
        """What reads (q and a) and what writes (b and k), with their decays; from COMPACT on the rows that read, and
        zeros for those of them that would write."""
        e, writers = self.decays.levels[level], (self.spread_b, self.spread_k)
        e_write = jnp.concatenate([e[0]] * self.dots.pack)
        if level < COMPACT:
            readers = [x * e[0] for x in (self.decayed, self.a)]
            writers = [x * e_write for x in writers]
        else:
            readers = [second(x, level) * e[1] for x in (self.decayed, self.a)]
            writers = [first(x, level) * e_write for x in writers]
            writers = [interleave(x, jnp.zeros_like(x), level) for x in writers]
        return jnp.concatenate(readers), jnp.concatenate(writers)

    def scores(self) -> Generator[None, None, list[Array]]:
        """Those of q with a token's own, of a below the diagonal. For `rounds`, as `gradients`."""
        i, j = grid_index(self.size, self.dots.pack)
        bits = jnp.where(i > j, i ^ j, 0)
        result = [jnp.zeros(bits.shape, jnp.float32)] * 4
        for level in self.decays.levels:
            here, found = bits >= level, quarters(self.dots.nt(*self.at_level(level)))
            yield
            if level < COMPACT:
                result = [jnp.where(here, x, y) for x, y in zip(found, result, strict=True)]
            else:
                here = second(here, level)
                found = [jnp.where(here, x, second(y, level)) for x, y in zip(found, result, strict=True)]
                result = [interleave(first(y, level), x, level) for x, y in zip(found, result, strict=True)]
        own = [jnp.where(i == j, head_products(self.dots, self.q, x), 0.0) for x in (self.b, self.k)]
        return [result[0] + own[0], result[1] + own[1], *result[2:]]

    def gradients(self, d_scores: list[Array]) -> Generator[None, None, list[Array]]:
        """Through the scores of different tokens, [C, (h, K)]: of `decayed`, a, b and k."""
        dots, size = self.dots, self.size
        i, j = grid_index(size, dots.pack)
        bits = jnp.where(i > j, i ^ j, 0)
        dq = da = db = dk = jnp.zeros_like(self.q)
        for level, e in self.decays.levels.items():
            here = jnp.where((bits >= level) & (bits < 2 * level), 1.0, 0.0)
            q_b, q_k, a_b, a_k = d_scores
            if level >= COMPACT:
                q_b, q_k, a_b, a_k = (second(x, level) for x in d_scores)
                here = second(here, level)
            if level < COMPACT or 2 * level < size:  # else the pairs are all that zeros and `first` leave
                q_b, q_k, a_b, a_k = (x * here for x in (q_b, q_k, a_b, a_k))
            d_found = jnp.concatenate([jnp.concatenate([q_b, q_k], axis=1), jnp.concatenate([a_b, a_k], axis=1)])
            readers, writers = self.at_level(level)
            d_readers, d_writers = dots.nn(d_found, writers), dots.tn(d_found, readers)
            yield
            half = d_readers.shape[0] // 2
            d_readers = d_readers[:half], d_readers[half:]
            d_writers = [lanes.blocks(x, dots.pack) for x in (d_writers[:TILE], d_writers[TILE:])]
            if level < COMPACT:
                dq, da = (x + e[0] * y for x, y in zip((dq, da), d_readers, strict=True))
                db, dk = (x + e[0] * y for x, y in zip((db, dk), d_writers, strict=True))
            else:
                dq, da = (
                    interleave(first(x, level), second(x, level) + e[1] * y, level)
                    for x, y in zip((dq, da), d_readers, strict=True)
                )
                db, dk = (
                    interleave(first(x, level) + e[0] * first(y, level), second(x, level), level)
                    for x, y in zip((db, dk), d_writers, strict=True)
                )
        return [dq, da, self.decays.times * db, self.decays.times * dk]


def quarters(x: Array) -> list[Array]:
    """Of [2 R, 2 TILE] the four [R, TILE], row by row."""
    size = x.shape[0] // 2
    return [x[start : start + size, lane : lane + TILE] for start in (0, size) for lane in (0, TILE)]


def precise(dots: Dots, x: Array, y: Array) -> Array:
    """x y in three bfloat16 passes, an element off by 2^-15 of itself at most; float32 inputs take six anyway."""
    if dots.exact:
        return dots.nn(x, y)
    (x, x_low), (y, y_low) = parts(x), parts(y)
    both = dots.nn(jnp.concatenate([x, x_low]), y)
    return both[: x.shape[0]] + both[x.shape[0] :] + dots.nn(x, y_low)


def precise_outer(dots: Dots, x: Array, y: Array) -> Array:
    """`Dots.outer` of the same passes."""
    if dots.exact:
        return dots.outer(x, y)
    (x, x_low), (y, y_low) = parts(x), parts(y)
    return dots.outer(jnp.concatenate([x, x_low, x]), jnp.concatenate([y, y, y_low]))
