"""What a trained layer of softmax attention hands on to a mixer of another family in its place.

Projections move as what they make together: keys as the products q_t . k_s of each head, values as v_s W_o. Where
widths and heads agree, that is each matrix as it is (Kasai et al. 2021, arXiv:2103.13076; Mercat et al. 2024,
2405.06640; Wang et al. 2024, 2408.15237: q, k, v, o to C, B, x, out of an SSM). Where they do not:

    grouped heads        k and v are repeated, one for each head of q
    more heads           each is repeated; values' read-out is divided by the copies, or a head's values are split
    fewer heads          heads in groups, a head's channels beside one another: its products are the sum of theirs
    a narrower head      the matrices of that rank nearest to the products: a truncated singular value decomposition
    a wider head         the rest of q and of v start fresh, and the rest of k and of the read-out at 0

A head of rotary channels is not narrowed or widened: its pairs and their frequencies belong together.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from kernels.array_typing import Array, Float
from zoo.errors import UsageError
from zoo.layers.short_conv import ShortConv

SILU_OPEN = 1.2784645  # silu of it is 1
SIGMOID_OPEN = 3.0  # sigmoid of it is 0.95
NOT_CHOSEN = "0: the same for every token"


class Taken(NamedTuple):
    """A parameter's value and, in words, what it was made of."""

    value: jax.Array | None  # None: it starts fresh, and the words say what would change that
    of: str


TakenOver = dict[str, Taken]  # by the parameter's path in its mixer: "q.kernel"


class Softmax(NamedTuple):
    """Softmax attention of one layer. The last of the D + 1 rows of a projection is its bias, or 0."""

    q: Float[Array, "D+1 H K"]
    k: Float[Array, "D+1 H K"]  # of grouped heads, repeated
    v: Float[Array, "D+1 H V"]
    out: Float[Array, "H V D"]
    out_bias: Float[Array, " D"] | None
    biases: tuple[str, ...]  # of "q", "k", "v", "out", those that have one
    turned: bool  # by rotary positions
    span: float  # tokens that a query could see

    def keys(
        self, fresh_q: Float[Array, "D HK"], fresh_k: Float[Array, "D HK"], heads: int, *, turned: bool = False
    ) -> tuple[jax.Array, jax.Array, str] | None:
        """q and k, [D + 1, heads * width] of as many channels as the fresh ones have, and how; None: they do not fit.

        `turned`: the family turns them by rotary positions too.
        """
        width, had = fresh_q.shape[1] // heads, self.q.shape[1:]
        turned = turned and self.turned
        q, k = (_in_heads(x, heads, turned) for x in (self.q, self.k))
        if q is None or k is None or (turned and q.shape[-1] != width):
            return None
        q, k = _narrowed(q, k, width)
        q, k = _widened(q, fresh_q), _widened(k, jnp.zeros_like(fresh_k))
        q = q if width == had[1] else q * math.sqrt(width / had[1])  # products are divided by sqrt(width) again
        return q, k, _how(had, (heads, width))

    def values(
        self, fresh_v: Float[Array, "D HV"], fresh_out: Float[Array, "HV D"], heads: int
    ) -> tuple[jax.Array, jax.Array, str] | None:
        """v [D + 1, heads * width], the read-out [heads * width, D], and how; None: they do not fit."""
        width, had, d = fresh_v.shape[1] // heads, self.v.shape[1:], self.out.shape[-1]
        out = jnp.moveaxis(self.out, -1, 0)  # [D, H, V]
        copies = heads // had[0] if heads % had[0] == 0 else 1
        if copies > 1 and copies * width == had[1]:
            v, out = (x.reshape(x.shape[0], heads, width) for x in (self.v, out))
        else:
            v, out = (_in_heads(x, heads) for x in (self.v, out))
            if v is None or out is None:
                return None
            v, out = _narrowed(v, out / copies if copies > 1 else out, width)
        v, out = _widened(v, fresh_v), _widened(out, jnp.zeros_like(fresh_out.T))
        return v, out.T.reshape(-1, d), _how(had, (heads, width))

    @property
    def reach(self) -> float:
        """Tokens after which a decay leaves 1 / e.

        Softmax attends by content, mostly near by; a decay over the whole span weighs all of it alike, and a short
        training does not unlearn that.
        """
        return math.sqrt(self.span)

    @property
    def log_decay(self) -> float:
        """Of one token: exp(reach log_decay) = 1 / e."""
        return -1 / self.reach

    @property
    def forgets(self) -> str:
        """`log_decay` in words."""
        return f"1 / e after {self.reach:.3g} tokens"


def take_over(
    mixer: nnx.Module,
    softmax: Softmax,
    *,
    heads: int,
    key_heads: int = 0,
    writes: int = 1,
    q: str = "q",
    k: str = "k",
    v: str = "v",
    out: str = "out",
    turned: bool = False,
) -> TakenOver:
    """Projections of `mixer`, by their names in it, that carry on those of softmax attention.

    Args:
      heads: of values; key_heads: of q and k, 0: as many.
      writes: k and v that a token has, beside one another in each head: each is softmax's.

    Raises:
      UsageError: softmax attention has biases where this mixer has none.
    """
    names = {"q": q, "k": k, "v": v, "out": out}
    layers = {part: _layer(mixer, name) for part, name in names.items()}
    keys = values = None
    if layers["q"] is not None and layers["k"] is not None:
        fresh_k = _first_write(_kernel(layers["k"]), key_heads or heads, writes)
        keys = softmax.keys(_kernel(layers["q"]), fresh_k, key_heads or heads, turned=turned)
    if layers["v"] is not None and layers["out"] is not None:
        fresh_v = _first_write(_kernel(layers["v"]), heads, writes)
        values = softmax.values(fresh_v, _kernel(layers["out"]), heads)
    parts = ("q", "k") * (keys is not None) + ("v", "out") * (values is not None)
    check_biases(softmax, {part: (names[part], layers[part]) for part in parts})
    found, each = {}, "" if writes == 1 else f", at each of {writes} steps"
    if keys is not None:
        made = _every_write(keys[1], key_heads or heads, writes)
        found |= projected(q, layers["q"], keys[0], f"q, {keys[2]}")
        found |= projected(k, layers["k"], made, f"k, {keys[2]}{each}")
    if values is not None:
        made = _every_write(values[0], heads, writes)
        found |= projected(v, layers["v"], made, f"v, {values[2]}{each}")
        found[f"{out}.kernel"] = Taken(values[1], f"out, {values[2]}")
        if layers["out"].bias is not None and softmax.out_bias is not None:
            found[f"{out}.bias"] = Taken(softmax.out_bias, "out's bias")
    return found


def check_biases(softmax: Softmax, layers: Mapping[str, tuple[str, nnx.Linear]]) -> None:
    """UsageError where a projection that is taken over, by its part of softmax attention, has no place for its bias."""
    lost = [part for part in softmax.biases if part in layers and layers[part][1].bias is None]
    if lost:
        wanted = dict.fromkeys(name for part, (name, _) in layers.items() if part in softmax.biases)
        raise UsageError(
            f"softmax attention has a bias on {', '.join(lost)}, and this mixer none; set its biases={','.join(wanted)}"
        )


def projected(name: str, layer: nnx.Linear, made: Float[Array, "D+1 F"], of: str) -> TakenOver:
    """A projection's kernel, and its bias where it has one."""
    found = {f"{name}.kernel": Taken(made[:-1], of)}
    return found | ({f"{name}.bias": Taken(made[-1], f"{of}, its bias")} if layer.bias is not None else {})


def open_gate(mixer: nnx.Module, name: str, bias: float = SILU_OPEN) -> TakenOver:
    """A gate that lets everything pass, whatever its input: softmax attention has none.

    It takes a bias to be open: without one, the gate starts fresh, and the words say so.
    """
    layer = _layer(mixer, name)
    if layer is None:
        return {}
    if layer.bias is None:
        return {f"{name}.kernel": Taken(None, f"fresh: a gate that softmax attention lacks; biases={name} opens it")}
    opened = jnp.full_like(layer.bias[...], bias)
    return {
        f"{name}.kernel": Taken(jnp.zeros_like(_kernel(layer)), "0: the gate is open"),
        f"{name}.bias": Taken(opened, f"{bias:.4g}: the gate is open"),
    }


def constant(parameter: nnx.Param, value: float, of: str) -> Taken:
    return Taken(jnp.full_like(parameter[...], value), of)


def short_convs(mixer: nnx.Module, prefix: str = "") -> TakenOver:
    """Convolutions that hand on the token itself, whose taps on those before it start at 0."""
    found = {}
    for path, layer in nnx.iter_modules(mixer):
        if isinstance(layer, ShortConv):
            taps = jnp.zeros_like(layer.weight[...]).at[..., -1].set(1.0)
            found[prefix + ".".join([*map(str, path), "weight"])] = Taken(taps, "the token itself")
    return found


def decaying(mixer: nnx.Module, softmax: Softmax, choice: str) -> TakenOver:
    """exp(A_log) softplus(choice(x) + decay_bias) = 1 / reach at every token; `choice` names its last projection."""
    bias = inverse_softplus(-softmax.log_decay)
    return {
        f"{choice}.kernel": Taken(jnp.zeros_like(_kernel(_layer(mixer, choice))), NOT_CHOSEN),
        "decay_bias": constant(mixer.decay_bias, bias, f"{bias:.4g}: {softmax.forgets}"),
        "A_log": constant(mixer.A_log, 0.0, "0: the step size alone decays"),
    }


def inverse_softplus(x: float) -> float:
    return x + math.log(-math.expm1(-x))


def _layer(mixer: nnx.Module, name: str) -> nnx.Linear | None:
    for part in name.split("."):
        mixer = getattr(mixer, part, None)
    return mixer if isinstance(mixer, nnx.Linear) else None


def _kernel(layer: nnx.Linear) -> jax.Array:
    return layer.kernel[...]


def _first_write(x: jax.Array, heads: int, writes: int) -> jax.Array:
    """[D, heads * writes * width] -> [D, heads * width]."""
    return x.reshape(x.shape[0], heads, writes, -1)[:, :, 0].reshape(x.shape[0], -1)


def _every_write(x: jax.Array, heads: int, writes: int) -> jax.Array:
    """[D, heads * width] -> [D, heads * writes * width]."""
    return jnp.repeat(x.reshape(x.shape[0], heads, 1, -1), writes, axis=2).reshape(x.shape[0], -1)


def _in_heads(x: jax.Array, heads: int, turned: bool = False) -> jax.Array | None:
    """[D, H, K] -> [D, heads, width]: repeated, or some beside one another; None where neither is whole."""
    d, has, width = x.shape
    if heads % has == 0:
        return x if heads == has else jnp.repeat(x, heads // has, axis=1)
    if has % heads:
        return None
    if not turned:
        return x.reshape(d, heads, -1)
    # Rotary pairs channel i with i + width / 2: pairs of one frequency come to lie beside one another.
    x = x.reshape(d, heads, has // heads, 2, width // 2)
    return jnp.transpose(x, (0, 1, 3, 4, 2)).reshape(d, heads, -1)


def _narrowed(a: jax.Array, b: jax.Array, width: int) -> tuple[jax.Array, jax.Array]:
    """a [M, H, w], b [N, H, w] -> [M, H, width], [N, H, width], of products a b^T as near as that rank can be."""
    if a.shape[-1] <= width:
        return a, b
    (q_a, r_a), (q_b, r_b) = (jnp.linalg.qr(x.swapaxes(0, 1)) for x in (a, b))
    u, s, vt = jnp.linalg.svd(r_a @ r_b.swapaxes(1, 2), full_matrices=False)
    root = jnp.sqrt(s[:, None, :width])
    a, b = q_a @ (u[..., :width] * root), q_b @ (vt.swapaxes(1, 2)[..., :width] * root)
    return a.swapaxes(0, 1), b.swapaxes(0, 1)


def _widened(x: jax.Array, fresh: jax.Array) -> jax.Array:
    """[M, H, w] -> [M, H * width], whose further channels in each head are those of fresh [D, H * width]."""
    rows, heads, width = x.shape
    fresh = fresh.reshape(fresh.shape[0], heads, -1)[..., width:]
    fresh = jnp.pad(fresh, ((0, rows - fresh.shape[0]), (0, 0), (0, 0)))  # no bias
    return jnp.concatenate([x, fresh], axis=-1).reshape(rows, -1)


def _how(had: tuple[int, int], has: tuple[int, int]) -> str:
    return f"{had[0]} heads of {had[1]}" + ("" if had == has else f" as {has[0]} of {has[1]}")
