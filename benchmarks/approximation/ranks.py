"""Singular values of outputs and states, of linear attention with and without what RALA adds to it."""

import numpy as np

from benchmarks.approximation.forms import mixed, softmax
from benchmarks.approximation.inputs import Inputs
from zoo.mixers import BIDIRECTIONAL

SMALL = 0.01  # of the largest: what lies below adds to no rank


def phi(x: np.ndarray) -> np.ndarray:
    """elu + 1."""
    return np.where(x > 0, x + 1.0, np.exp(np.minimum(x, 0.0)))


def token_weights(of: Inputs) -> np.ndarray:
    """RALA's a, [T, H]: with a sum of T."""
    logits = np.einsum("hk,shk->sh", phi(of.q).mean(0), phi(of.k)) / of.k.shape[-1] ** 0.5
    scores = np.exp(logits - logits.max(0))
    return len(of.k) * scores / scores.sum(0)


def matrices(of: Inputs, seed: int) -> dict[str, np.ndarray]:
    """By name, of each head: outputs [H, T, V] and states [H, K, V]."""
    linear = mixed("linear_attention", of, BIDIRECTIONAL)
    weighted = mixed("rala", of, BIDIRECTIONAL)
    whole = mixed("rala", of, BIDIRECTIONAL, seed, bare=False)
    drawn = np.random.default_rng(seed).standard_normal((of.x.shape[-1], of.v[0].size)) / of.x.shape[-1] ** 0.5
    gate = (of.x @ drawn).reshape(of.v.shape)
    outputs = {
        "softmax": softmax(of, BIDIRECTIONAL),
        "linear_attention": linear,
        "with the weights": weighted,
        "with the product": linear * gate,
        "with both": weighted * gate,
        "rala, convolution too": whole,
    }
    keys, a = phi(of.k), token_weights(of)[..., None]
    states = {"linear_attention": keys, "with the weights": a * keys}
    found = {f"output, {name}": o.swapaxes(0, 1) for name, o in outputs.items()}
    return found | {f"state, {name}": np.einsum("shk,shv->hkv", k, of.v) for name, k in states.items()}


def effective(values: np.ndarray) -> np.ndarray:
    """exp of the entropy of singular values [..., n] over their sum."""
    shares = values / values.sum(-1, keepdims=True)
    return np.exp(-np.sum(shares * np.log(np.maximum(shares, 1e-300)), axis=-1))


def measured(sequences: list[Inputs]) -> list[dict]:
    """Of each matrix: its two ranks and the singular values over the largest, means over heads and sequences."""
    found: dict[str, list[np.ndarray]] = {}
    for seed, of in enumerate(sequences):
        for name, matrix in matrices(of, seed).items():
            found.setdefault(name, []).append(np.linalg.svd(matrix, compute_uv=False))
    rows = []
    for name, values in found.items():
        values = np.concatenate(values)
        relative = values / values[:, :1]
        rows.append(
            {
                "of": name,
                "effective": float(effective(values).mean()),
                "numerical": float((relative > SMALL).sum(-1).mean()),
                "largest": values.shape[-1],
                "spectrum": relative.mean(0).tolist(),
            }
        )
    return rows
