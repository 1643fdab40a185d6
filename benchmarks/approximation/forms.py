"""What is measured: families' own mixers that read given q, k and v, and the bounds beside them."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.approximation.inputs import Inputs
from zoo.layers import random_features
from zoo.mixers import BIDIRECTIONAL, CAUSAL, MIXERS, Sizes


class Form(NamedTuple):
    """One way to approximate softmax attention."""

    outputs: Callable[[Inputs, str, int, int], np.ndarray]  # of inputs, direction, size and seed: [T, H, V]
    family: str  # whose colour it has; "": none
    size: str = ""  # what the size is
    sizes: tuple[int, ...] = (0,)
    usual: int = 0  # the size at which lengths compare
    rows: Callable[[int], int] = lambda size: size  # kept of the past by a size
    both_ways_only: bool = False

    def sizes_at(self, length: int, width: int) -> list[int]:
        """Those that differ from softmax itself, or from one another, at that length and head width."""
        most = {"k": length - 1, "window": length - 1, "key width": min(width, length)}.get(self.size, max(self.sizes))
        return [size for size in self.sizes if size <= most]


# --- Definitions, in float64 ------------------------------------------------------------------------------------------


def weights(of: Inputs, direction: str) -> np.ndarray:
    """Softmax attention's own, [H, T, T]."""
    logits = np.einsum("thk,shk->hts", of.q.astype(np.float64), of.k) / of.q.shape[-1] ** 0.5
    if direction == CAUSAL:
        logits = np.where(np.tri(len(of.q), dtype=bool), logits, -np.inf)
    scores = np.exp(logits - logits.max(-1, keepdims=True))
    return scores / scores.sum(-1, keepdims=True)


def softmax(of: Inputs, direction: str) -> np.ndarray:
    return np.einsum("hts,shv->thv", weights(of, direction), of.v)


def error(found: np.ndarray, exact: np.ndarray) -> float:
    """|found - exact| / |exact| of a head's outputs [T, H, V], the mean over heads."""
    norm = functools.partial(np.linalg.norm, axis=(0, 2))
    return float(np.mean(norm(found - exact) / norm(exact)))


def _uniform(of, direction, size, seed):
    if direction == CAUSAL:
        return np.cumsum(of.v, 0, np.float64) / np.arange(1, len(of.v) + 1)[:, None, None]
    return np.broadcast_to(of.v.mean(0, dtype=np.float64), of.v.shape)


def _of_rank(of, direction, size, seed):
    u, s, vt = _singular(of.q.tobytes(), of.k.tobytes(), of.q.shape, direction)
    return np.einsum("htr,hr,hrs,shv->thv", u[..., :size], s[:, :size], vt[:, :size], of.v, optimize=True)


@functools.lru_cache(maxsize=4)  # of each sequence of a set, while its sizes take turns
def _singular(q: bytes, k: bytes, shape: tuple, direction: str):
    q, k = (np.frombuffer(array, np.float32).reshape(shape) for array in (q, k))
    return np.linalg.svd(weights(Inputs(q, k, q, q), direction), full_matrices=False)


def _narrowed(of: Inputs, width: int) -> Inputs:
    """With q and k of `width` entries, linear in the given ones, whose q . k / sqrt(K) are the nearest to the given."""
    if width == of.q.shape[-1]:
        return of
    # q k^T = Q (R R'^T) K^T by two QR decompositions: the small middle has its singular values.
    (qq, qr), (kq, kr) = (np.linalg.qr(x.swapaxes(0, 1).astype(np.float64)) for x in (of.q, of.k))
    u, s, vt = np.linalg.svd(qr @ kr.swapaxes(1, 2))
    scale = (s[:, None, :width] * (width / of.q.shape[-1]) ** 0.5) ** 0.5
    narrow = [basis @ side[..., :width] * scale for basis, side in ((qq, u), (kq, vt.swapaxes(1, 2)))]
    return of._replace(**{name: x.swapaxes(0, 1).astype(np.float32) for name, x in zip("qk", narrow, strict=True)})


# --- Mixers -----------------------------------------------------------------------------------------------------------


def mixed(family: str, of: Inputs, direction: str, seed: int = 0, *, bare: bool = True, **settings: Any) -> np.ndarray:
    """What a family's mixer reads of given q, k and v. `bare`: of RALA without its convolution and gate."""
    program = _program(family, of.q.shape, of.v.shape, direction, bare, tuple(settings.items()))
    return np.asarray(program(of, jax.random.key(seed)), np.float64).reshape(of.v.shape)


@functools.cache
def _program(family: str, of_q: tuple, of_v: tuple, direction: str, bare: bool, settings: tuple) -> Callable:
    length, heads, width = of_q
    settings = dict(settings)
    is_mean = settings.pop("means", False)
    config = MIXERS[family].config_class(num_heads=heads, **settings)
    sizes = Sizes(heads * of_v[-1], rope=False, direction=direction)

    @jax.jit
    def program(of, key):
        mixer = MIXERS[family](config, sizes, layer_index=0, rngs=nnx.Rngs(key))
        for name, array in (("q", of.q), ("k", of.k), ("v", of.v)):
            setattr(mixer, name, lambda x, array=array: array.reshape(1, length, -1))
        mixer.out = lambda o: o
        given = {}
        if family == "performer":
            seed = jax.random.bits(key)
            given["depth"] = random_features.draw(seed, 0, jnp.arange(1), mixer.features, width)[0]
        if family == "rala":
            drawn = jax.random.normal(key, (of.x.shape[-1], sizes.d_model)) / of.x.shape[-1] ** 0.5
            gate = jnp.ones((1, length, sizes.d_model)) if bare else (of.x @ drawn)[None]
            mixer.gate = lambda x: gate
            mixer.conv[...] = jnp.zeros_like(mixer.conv[...]) if bare else mixer.conv[...]
        if is_mean:
            group = np.arange(length) * config.mixtures // length
            table = (group[:, None] == np.arange(config.mixtures)) / np.bincount(group)
            mixer.of_keys[...] = jnp.asarray(table, jnp.float32)[:, None]
        return mixer(jnp.zeros((1, length, sizes.d_model)), **given)[0]

    return program


def _performer(of, direction, size, seed):
    return mixed("performer", of, direction, seed, features=size)


def _relu(of, direction, size, seed):
    return mixed("performer", of, direction, seed, features=size, kernel="relu")


def _linformer(of, direction, size, seed):
    return mixed("linformer", of, direction, seed, mixtures=size, length=len(of.q))


def _linformer_means(of, direction, size, seed):
    settings = {"mixtures": size, "length": len(of.q), "sharing": "key_value", "means": True}
    return mixed("linformer", of, direction, seed, **settings)


def _longformer(of, direction, size, seed):
    return mixed("longformer", of, direction, window=size)


def _based(of, direction, size, seed):
    settings = {"feature_map": "taylor2", "key_width": size}
    return mixed("linear_attention", _narrowed(of, size), direction, **settings)


def _linear(of, direction, size, seed):
    return mixed("linear_attention", of, direction)


def _rala(of, direction, size, seed):
    return mixed("rala", of, direction)


_TAYLOR = lambda width: 1 + width + width * (width + 1) // 2  # noqa: E731
_NUMBERS = (32, 128, 512, 2048)
FORMS = {
    "uniform": Form(_uniform, "", rows=lambda size: 1),
    "performer": Form(_performer, "performer", "features", _NUMBERS, 512),
    "performer, relu": Form(_relu, "performer", "features", _NUMBERS, 512),
    "linformer, drawn": Form(_linformer, "linformer", "k", (16, 64, 256), 16, both_ways_only=True),
    "linformer, means": Form(_linformer_means, "linformer", "k", (16, 64, 256), 16, both_ways_only=True),
    "softmax of rank k": Form(_of_rank, "", "k", (4, 16, 64, 256), 16),
    "longformer": Form(_longformer, "longformer", "window", (16, 64, 256), 16),
    "based": Form(_based, "linear_attention", "key width", (4, 8, 16), 16, _TAYLOR),
    "linear_attention": Form(_linear, "linear_attention", rows=lambda size: 0),
    "rala": Form(_rala, "rala", rows=lambda size: 0, both_ways_only=True),
}


def measured(sequences: list[Inputs], direction: str, length: int, all_sizes: bool) -> list[dict]:
    """Rows of all forms at one length, of all their sizes or of the usual one."""
    sequences = [of.first(length) for of in sequences]
    exact = [softmax(of, direction) for of in sequences]
    rows = []
    for name, form in FORMS.items():
        if form.both_ways_only and direction != BIDIRECTIONAL:
            continue
        for size in form.sizes_at(length, sequences[0].q.shape[-1]):
            if all_sizes or size == form.usual:
                found = [form.outputs(of, direction, size, seed) for seed, of in enumerate(sequences)]
                errors = [error(o, e) for o, e in zip(found, exact, strict=True)]
                rows.append({"form": name, "size": size, "length": length, "direction": direction, "errors": errors})
    return rows
