"""The calls that `python -m benchmarks.kernels --table=gpu` times: operands, arithmetic and traffic.

Nothing here makes an array of jax or of torch: both processes draw the same operands from it.
"""

import dataclasses
import math

import numpy as np

from kernels.linear_attention import specs

CHECKED_TIME = 224  # tokens of the comparison with float64: no multiple of a chunk of 64
CHECKED_HEADS = 2
CACHE_BYTES = 2**28  # several times the second-level cache of any GPU
FLOAT32 = ("log_decay", "beta", "dt", "A", "D", "bonus")  # operands; the others are bfloat16
NEGATIVE_OR_SMALL = {"log_decay": -0.1, "dt": 0.02, "A": -8.0}  # scale of |normal|


@dataclasses.dataclass(frozen=True)
class Call:
    """`op` of [batch, time] tokens; `shape` is a `specs.Shape`, channels and numbers, or heads and their width."""

    op: str
    batch: int
    time: int
    shape: specs.Shape | tuple[int, int]

    @property
    def operands(self) -> dict[str, tuple[int, ...]]:
        tokens = (self.batch, self.time)
        if self.op == "selective_scan":
            channels, numbers = self.shape
            wide, narrow = (*tokens, channels), (*tokens, numbers)
            return {"x": wide, "dt": wide, "A": (channels, numbers), "B": narrow, "C": narrow, "D": (channels,)}
        if self.op == "attention":
            return dict.fromkeys(("q", "k", "v"), (*tokens, *self.shape))
        heads, keys = self.shape.heads, self.shape.key_dim
        decays = {"fixed": (heads,), "scalar": (*tokens, heads), "vector": (*tokens, heads, keys)}
        q = (*tokens, self.shape.groups, keys)
        operands = {"q": q, "k": q, "v": (*tokens, heads, self.shape.value_dim)}
        if self.op == "delta_rule":
            operands["beta"] = (*tokens, heads)
        if self.op == "dplr_delta_rule":
            operands |= {"a": q, "b": q}
        if self.shape.decay != "none":
            operands["log_decay"] = decays[self.shape.decay]
        return operands | ({"bonus": (heads, keys)} if self.shape.bonus else {})

    @property
    def out(self) -> tuple[int, ...]:
        return self.operands["x" if self.op == "selective_scan" else "v"]

    @property
    def constants(self) -> tuple[str, ...]:
        """Operands that are no layer's parameter or activation, and get no gradient."""
        return ("log_decay",) if self.op == "linear_attention" and self.shape.decay == "fixed" else ()

    def flops(self) -> tuple[float, float]:
        """Forward, forward and backward.

        linear_attention and the delta rules: a chunk algorithm's, chunk 64. attention: causal, a backward pass is 2.5
        forward passes. selective_scan: 7 operations a number of the state, 3 times that with the backward pass.
        """
        tokens = self.batch * self.time
        if self.op == "selective_scan":
            forward = 7.0 * tokens * math.prod(self.shape)
            return forward, 3 * forward
        if self.op == "attention":
            forward = 2.0 * tokens * self.time * math.prod(self.shape)  # half of all pairs, two products
            return forward, 3.5 * forward
        adds = MULTIPLY_ADDS[self.op](self.batch, self.time, self.shape.heads, self.shape.key_dim, self.shape.value_dim)
        return 2.0 * adds[0], 2.0 * adds[1]

    def bytes(self) -> tuple[float, float]:
        """Each operand read once a pass, each result written once: the least a device has to move."""
        size = {name: nbytes(name, shape) for name, shape in self.operands.items()}
        read, out = sum(size.values()), 2 * math.prod(self.out)
        gradients = sum(size[name] for name in size if name not in self.constants)
        return read + out, 2 * read + 2 * out + gradients

    def checked(self) -> "Call":
        """The same call with few tokens and heads, for a reference in float64."""
        if self.op == "selective_scan":
            return dataclasses.replace(self, batch=1, time=CHECKED_TIME, shape=(min(128, self.shape[0]), self.shape[1]))
        if self.op == "attention":
            shape = min(CHECKED_HEADS, self.shape[0]), self.shape[1]
        else:
            shared = self.shape.heads // self.shape.groups
            groups = 1 if shared > 1 else min(CHECKED_HEADS, self.shape.groups)
            shape = dataclasses.replace(self.shape, groups=groups, heads=groups * min(shared, 16))
        return dataclasses.replace(self, batch=1, time=min(CHECKED_TIME, self.time), shape=shape)

    def draw(self, normal) -> dict:
        """Operands by name, and the cotangent of the output, from `normal(shape)` of numpy, jax or torch: float32."""
        arrays = {name: normal(shape) for name, shape in (self.operands | {"cotangent": self.out}).items()}
        if self.op == "delta_rule":
            arrays["k"] = unit(arrays["k"])
        if self.op == "dplr_delta_rule":  # RWKV-7's: kappa of unit length, times a rate from 0 to 1
            kappa, rate = unit(arrays["a"]), 0.5 + 0.5 * arrays["b"] / (1 + abs(arrays["b"]))
            arrays |= {"a": -kappa, "b": kappa * rate}
        return {name: scaled(name, array) for name, array in arrays.items()}

    def draw_checked(self) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(0)
        return self.checked().draw(lambda shape: rng.standard_normal(shape, np.float32))


def unit(x):
    return x / ((x**2).sum(-1) ** 0.5)[..., None]


def scaled(name, normal):
    if name == "beta":
        return 1 + normal / (1 + abs(normal))  # from 0 to 2
    return NEGATIVE_OR_SMALL[name] * abs(normal) if name in NEGATIVE_OR_SMALL else normal


def input_sets(call):
    """How many sets of operands take turns, so that none of them is in the device's cache when its turn comes."""
    return max(2, min(32, math.ceil(CACHE_BYTES / call.bytes()[0])))


def nbytes(name, shape):
    return (4 if name in FLOAT32 else 2) * math.prod(shape)


def chunk_multiply_adds(batch, time, heads, key_dim, value_dim, chunk=64):
    """Forward: scores and their product with v; states: update and read. Backward: scores and states again, and two
    products for each of the four."""
    k_term, v_term, state_term = chunk * key_dim, chunk * value_dim, key_dim * value_dim
    forward = k_term + v_term + 2 * state_term
    both = 4 * k_term + 3 * v_term + 7 * state_term
    return batch * time * heads * forward, batch * time * heads * both


def delta_multiply_adds(batch, time, heads, key_dim, value_dim, chunk=64):
    """Forward: scores of q and of k, products with v of the inverse and of the scores; states: update and two reads;
    the inverse. Backward: scores and states again, and two products for each."""
    k_term, v_term, state_term = chunk * key_dim, chunk * value_dim, key_dim * value_dim
    forward = 2 * k_term + 2 * v_term + 3 * state_term + chunk**2 // 3
    both = 3 * forward + 2 * k_term + state_term
    return batch * time * heads * forward, batch * time * heads * both


def dplr_multiply_adds(batch, time, heads, key_dim, value_dim, chunk=64):
    """Forward: scores of q and of a with b and k, products with v, or what is corrected, of the scores and of the
    inverse; states: two updates and two reads; the inverse. Backward: scores again, and two products for each."""
    k_term, v_term, state_term = chunk * key_dim, chunk * value_dim, key_dim * value_dim
    forward = 4 * (k_term + v_term + state_term) + chunk**2 // 3
    return batch * time * heads * forward, batch * time * heads * (3 * forward + 4 * k_term)


MULTIPLY_ADDS = {
    "linear_attention": chunk_multiply_adds,
    "delta_rule": delta_multiply_adds,
    "dplr_delta_rule": dplr_multiply_adds,
}
CALLS = {  # in the order of what is missed most if the time is over
    **{name: Call("linear_attention", *call) for name, call in specs.CALLS.items()},
    "delta_fla_none": Call("delta_rule", 4, 8192, specs.Shape(32, 32, 128, 128, "none")),  # its own benchmark
    "delta_fla_scalar": Call("delta_rule", 4, 8192, specs.Shape(32, 32, 128, 128, "scalar")),
    "delta_fla_per_key": Call("delta_rule", 4, 8192, specs.Shape(32, 32, 128, 128, "vector")),
    "delta_qwen3_next": Call("delta_rule", 4, 8192, specs.Shape(16, 32, 128, 128, "scalar")),  # its heads
    "dplr_rwkv7_1.5b": Call("dplr_delta_rule", 4, 8192, specs.Shape(32, 32, 64, 64, "vector")),  # its heads
    "dplr_128": Call("dplr_delta_rule", 4, 8192, specs.Shape(32, 32, 128, 128, "vector")),
    "attention_32x128": Call("attention", 8, 8192, (32, 128)),
    "attention_1.3b": Call("attention", 16, 2048, (32, 64)),
    "mamba_1.3b": Call("selective_scan", 16, 2048, (4096, 16)),
    "mamba_340m": Call("selective_scan", 16, 2048, (2048, 16)),
    "mamba_125m": Call("selective_scan", 16, 2048, (1536, 16)),
    "mamba_4096": Call("selective_scan", 8, 8192, (4096, 16)),
}
QUICK_CALLS = {
    "quick_scalar": Call("linear_attention", 1, 96, specs.Shape(1, 2, 64, 64, "scalar")),
    "quick_fixed": Call("linear_attention", 1, 96, specs.Shape(2, 2, 64, 64, "fixed")),
    "quick_per_key": Call("linear_attention", 1, 96, specs.Shape(2, 2, 64, 64, "vector")),
    "quick_delta": Call("delta_rule", 1, 96, specs.Shape(1, 2, 64, 64, "scalar")),
    "quick_dplr": Call("dplr_delta_rule", 1, 96, specs.Shape(2, 2, 64, 64, "vector")),
    "quick_attention": Call("attention", 1, 96, (2, 64)),
    "quick_mamba": Call("selective_scan", 1, 96, (128, 16)),
}
