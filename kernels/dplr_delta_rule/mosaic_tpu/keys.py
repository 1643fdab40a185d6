"""What reads and what writes in a chunk of C tokens of a slot of heads, and the scores between them.

A token reads twice, with q_i exp(g_i) and a_i, and writes twice, by b_j and k_j: two stacks of 2 C rows, whose products
are four matrices of scores at once, [2 C, (2, h, C)].
"""

import jax.numpy as jnp

from kernels.array_typing import Array
from kernels.delta_rule.mosaic_tpu.solve import parts
from kernels.dplr_delta_rule.mosaic_tpu.decays import decays
from kernels.linear_attention.mosaic_tpu import lanes
from kernels.linear_attention.mosaic_tpu.dots import Dots, grid_index
from kernels.linear_attention.mosaic_tpu.per_key import (
    COMPACT,
    first,
    head_products,
    interleave,
    second,
)


class Keys:
    """Of q, scaled, k, a, b and g, [C, (h, K)], float32."""

    def __init__(self, dots: Dots, q: Array, k: Array, a: Array, b: Array, g: Array):
        self.dots, self.size, self.decays = dots, q.shape[0], decays(dots, g)
        self.q, self.k, self.b = q, k, b
        self.readers = jnp.concatenate([q * self.decays.own, a])  # [2 C, (h, K)]
        self.writers = jnp.concatenate([b, k])
        spread = [lanes.spread(self.decays.times * x, dots.pack) for x in (b, k)]
        self.spread_writers = jnp.concatenate(spread)  # [(2, h, C), (h, K)]

    def reads(self) -> Array:
        """What reads the state at the start: q and a, [2 C, (h, K)]."""
        return self.readers * twice(self.decays.read)

    def writes(self) -> Array:
        """What writes into the state at the end, but for its `tail`: b and k, [2 C, (h, K)]."""
        return self.writers * twice(self.decays.write)

    def at_level(self, level: int) -> tuple[Array, Array]:
        """What reads and what writes, with their decays; from COMPACT on the rows that read, and zeros for them."""
        e, copies = self.decays.levels[level], 2 * self.dots.pack
        if level < COMPACT:
            return self.readers * twice(e[0]), self.spread_writers * jnp.concatenate([e[0]] * copies)
        writers = first(self.spread_writers, level) * jnp.concatenate([e[0]] * copies)
        return second(self.readers, level) * twice(e[1]), interleave(writers, jnp.zeros_like(writers), level)

    def pairs(self) -> Array:
        """Of each score i ^ j if j < i, else 0, [2 C, (2, h, C)]."""
        i, j = grid_index(self.size, self.dots.pack)
        bits = twice(jnp.where(i > j, i ^ j, 0))
        return jnp.concatenate([bits, bits], axis=1)

    def scores(self) -> Array:
        """[2 C, (2, h, C)]: of q with b and k, with a token's own, of a with b and k below the diagonal."""
        bits = self.pairs()
        result = jnp.zeros(bits.shape, jnp.float32)
        for level in self.decays.levels:
            found, here = self.dots.nt(*self.at_level(level)), bits >= level
            if level < COMPACT:
                result = jnp.where(here, found, result)
            else:
                later = jnp.where(second(here, level), found, second(result, level))
                result = interleave(first(result, level), later, level)
        i, j = grid_index(self.size, self.dots.pack)
        own = [jnp.where(i == j, head_products(self.dots, self.q, x), 0.0) for x in (self.b, self.k)]
        return jnp.concatenate([result[: self.size] + jnp.concatenate(own, axis=1), result[self.size :]])

    def gradients(self, d_scores: Array) -> tuple[Array, Array]:
        """Through the scores of different tokens: of `readers` and of `writers`, [2 C, (h, K)]."""
        dots, bits = self.dots, self.pairs()
        d_readers = d_writers = jnp.zeros_like(self.readers)
        for level, e in self.decays.levels.items():
            readers, writers = self.at_level(level)
            here = (bits >= level) & (bits < 2 * level)
            if level < COMPACT:
                d_level = d_scores * jnp.where(here, 1.0, 0.0)
                d_readers = d_readers + twice(e[0]) * dots.nn(d_level, writers)
                d_writers = d_writers + twice(e[0]) * of_writers(dots, d_level, readers)
                continue
            d_level = second(d_scores, level)
            if 2 * level < self.size:  # the pairs of the last level are all that `writers` and `first` leave
                d_level = d_level * jnp.where(second(here, level), 1.0, 0.0)
            later = second(d_readers, level) + twice(e[1]) * dots.nn(d_level, writers)
            earlier = first(d_writers, level) + twice(e[0]) * first(of_writers(dots, d_level, readers), level)
            d_readers = interleave(first(d_readers, level), later, level)
            d_writers = interleave(earlier, second(d_writers, level), level)
        return d_readers, self.decays.times * d_writers


def twice(x: Array) -> Array:
    return jnp.concatenate([x, x])


def of_writers(dots: Dots, scores: Array, x: Array) -> Array:
    """scores^T x of each head and of b and k, [2 C, (h, X)]: scores [R, (2, h, C)], x [R, (h, X)]."""
    found = dots.tn(scores, x)
    half = found.shape[0] // 2
    return jnp.concatenate([lanes.blocks(found[:half], dots.pack), lanes.blocks(found[half:], dots.pack)])


def outer(dots: Dots, x: Array, y: Array) -> Array:
    """x^T y of each head: x [R, (h, X)], y [R, (h, Y)] -> [X, (h, Y)]."""
    return lanes.blocks(dots.tn(x, y), dots.pack)


def precise_outer(dots: Dots, x: Array, y: Array) -> Array:
    """`outer` in three bfloat16 passes, as `solve.product`."""
    if dots.exact:
        return outer(dots, x, y)
    (x, x_low), (y, y_low) = parts(x), parts(y)
    return outer(dots, jnp.concatenate([x, x_low, x]), jnp.concatenate([y, y, y_low]))
