"""The inverse of a unit lower-triangular matrix: what solves a chunk of a delta rule."""

import jax.numpy as jnp

from kernels.array_typing import Array
from kernels.precision import dot

BLOCK = 8  # rows that are inverted number by number


def unit_lower_inverse(a: Array) -> Array:
    """(I + A)^-1 of A [..., C, C], which is zero on and above its diagonal; C a power of two.

    By halves, from single rows on: of neighbouring blocks P and Q with C below P, [[P, 0], [C, Q]]^-1 has -Q^-1 C P^-1
    in C's place. Sums stay as small as the inverse itself, which for a delta rule is a product of contractions; the
    series I - A + A^2 - ... passes through 1e17 for repeated keys, and is 15 % off from blocks of 16 rows. Where
    all keys are equal the roundings are, too, and add up: a step of Newton's method before the last halves are joined
    takes them back, for a quarter of what it costs after.
    """
    size = a.shape[-1]
    block = min(size, BLOCK)
    inverse = small_inverses(a, block)
    while block < size:
        if 2 * block == size:
            inverse = newton_step(diagonal_blocks(a, block), inverse)
        cross = jnp.stack([a[..., i + block : i + 2 * block, i : i + block] for i in range(0, size, 2 * block)], -3)
        p, q = inverse[..., 0::2, :, :], inverse[..., 1::2, :, :]
        cross = -product(q, product(cross, p))
        top = jnp.concatenate([p, jnp.zeros_like(p)], axis=-1)
        inverse = jnp.concatenate([top, jnp.concatenate([cross, q], axis=-1)], axis=-2)
        block *= 2
    return inverse[..., 0, :, :]


def newton_step(a: Array, inverse: Array) -> Array:
    """Towards (I + A)^-1: what is off afterwards is the square of what was."""
    error = jnp.eye(a.shape[-1], dtype=a.dtype) - inverse - product(a, inverse)
    return inverse + product(inverse, error)


def product(a: Array, b: Array) -> Array:
    return dot("...ij,...jk->...ik", a, b, like=a)


def diagonal_blocks(a: Array, size: int) -> Array:
    """[..., C / size, size, size]."""
    return jnp.stack([a[..., i : i + size, i : i + size] for i in range(0, a.shape[-1], size)], axis=-3)


def small_inverses(a: Array, size: int) -> Array:
    """Of the diagonal blocks. Meanwhile they lie along the last axis: vectors of many multiply, where each alone
    is too small for a matmul."""
    blocks = diagonal_blocks(a, size)
    inverse = inverse_by_halves(blocks.reshape(-1, size, size).transpose(1, 2, 0))
    return inverse.transpose(2, 0, 1).reshape(blocks.shape)


def inverse_by_halves(a: Array) -> Array:
    """Of A [size, size, M]."""
    size, _, count = a.shape
    if size == 1:
        return jnp.ones_like(a)
    half = size // 2
    both = inverse_by_halves(jnp.concatenate([a[:half, :half], a[half:, half:]], axis=-1))
    p, q = both[..., :count], both[..., count:]
    cross = -multiply(q, multiply(a[half:, :half], p))
    top = jnp.concatenate([p, jnp.zeros_like(p)], axis=1)
    return jnp.concatenate([top, jnp.concatenate([cross, q], axis=1)], axis=0)


def multiply(a: Array, b: Array) -> Array:
    """[I, J, M] times [J, K, M]."""
    return sum(a[:, j, None] * b[None, j] for j in range(b.shape[0]))
