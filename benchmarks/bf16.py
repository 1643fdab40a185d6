"""What bfloat16 costs each family, and whose it is: `python -m benchmarks.bf16 [--families=gla,rwkv6] [--tokens=2,64]`.

Models at their initial weights (width 64, 3 layers, 256 tokens of vocabulary), all families of the registry. Of a
token's last hidden vector, |value - exact| / |exact|, the median over the tokens up to 2, 16 and 64 of 32 sequences:

    gap      the bfloat16 model, of a float32 model with float32 weights: what a user sees
    weights  float64 with weights rounded to bfloat16, of float64 without: the architecture's answer to its weights
    ideal    float64 that rounds where bfloat16 has to, of float64, both with rounded weights: the architecture's
             answer to activations of 8 bits
    lost     the bfloat16 model, of float64 with the same rounded weights; what it has above `ideal` can be mended
    gap rms  as gap, the root-mean-square of the difference over that of the vectors: a few tokens make it

bfloat16 has to round (`observed`) what a projection reads and writes (gates are kept in float32), what an op reads and
writes in the model's dtype, and the residual stream. The bfloat16 model is compiled so that every rounding in its code
takes place; compilers may leave some out. "float64" computes gates and norms of heads in float32.
"""

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import zoo.layers
import zoo.model
from benchmarks import record
from kernels import dispatch
from zoo import ops
from zoo.config_files import family_config
from zoo.mixers import CAUSAL_MIXERS

SEQUENCES, SEEDS = 16, (0, 1)
AS_WRITTEN = {"xla_allow_excess_precision": False}  # the compiler options under which no rounding is left out
COLUMNS = ("gap", "weights", "ideal", "lost", "gap rms")


def rounded(x: jax.Array) -> jax.Array:
    """x with the digits of bfloat16, in its own dtype. Arrays of another dtype than float64, gates' too, stay."""
    return jax.lax.reduce_precision(x, 8, 7) if getattr(x, "dtype", None) == jnp.float64 else x


def rounded_matrices(parameters: Any) -> Any:
    """The weights that a bfloat16 model reads: those of projections and embeddings rounded, vectors as they are."""

    def one(path, leaf):
        matrix = any(name in jax.tree_util.keystr(path) for name in ("kernel", "embedding"))
        return jax.lax.reduce_precision(leaf, 8, 7) if matrix else leaf

    return jax.tree.map_with_path(one, parameters)


@contextlib.contextmanager
def observed(rounding: bool) -> Iterator[list[tuple[str, jax.Array]]]:
    """With `rounding`, a float64 model traced in here rounds what bfloat16 has to; other models stay as they are.

    Yields:
      the arrays that ops are given, each with the op's name, in the order of the calls.
    """
    given = []
    cut = rounded if rounding else lambda x: x
    linear = sys.modules["zoo.layers.linear"]
    project, constrain = linear.IMPLEMENTATIONS["reference"], zoo.model.sharding.constrain

    def product(x, kernel, precision, out_dtype):
        y = project(cut(x), kernel, precision, out_dtype)
        return cut(y) if out_dtype is None else y.astype(jnp.float32)

    def op(name, function):
        def call(*args, **options):
            args, options = [cut(x) for x in args], {key: cut(x) for key, x in options.items()}
            given.extend((name, x) for x in (*args, *options.values()) if getattr(x, "ndim", 0))
            result = function(*args, **options)
            return (cut(result[0]), *result[1:]) if isinstance(result, tuple) else cut(result)

        return call

    with contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch.dict(linear.IMPLEMENTATIONS, dict.fromkeys(linear.IMPLEMENTATIONS, product)))
        for name in set(ops.__all__) - {"cross_entropy"}:
            patched = op(name, getattr(ops, name))
            for module in (ops, ops.recurrences, ops.segments, ops.softmax, ops.time):  # ops call each other
                if hasattr(module, name):
                    patches.enter_context(mock.patch.object(module, name, patched))
        stream = lambda x, *axes: constrain(cut(x) if axes[-1] is None else x, *axes)  # noqa: E731
        patches.enter_context(mock.patch.object(zoo.model.sharding, "constrain", stream))
        yield given


def wide(function: Callable) -> Callable:
    """`function` called in float64, on the ops' definitions; its results as numpy arrays."""

    def call(*args):
        with jax.enable_x64(True), dispatch.use_implementation("reference"):
            return jax.tree.map(np.asarray, function(*args))

    return call


def token_errors(value: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """|value - exact| / |exact| of vectors [..., D]; 0 where both are 0."""
    value, exact = (np.asarray(x).astype(np.complex128) for x in (value, exact))
    return np.linalg.norm(value - exact, axis=-1) / np.maximum(np.linalg.norm(exact, axis=-1), 1e-30)


def _model(family: str, dtype: str, seed: int):
    config = family_config(family).model
    config.num_layers, config.d_model, config.vocab_size, config.dtype = 3, 64, 256, dtype
    with mock.patch.object(zoo.model, "validate_model"):  # float64 is no setting
        return nnx.split(zoo.model.LanguageModel(config, rngs=nnx.Rngs(seed)))


def measure(family: str, lengths: list[int]) -> dict[str, Any]:
    def hidden(dtype, rounding=False):
        graphdef, _ = _model(family, dtype, 0)

        def call(parameters, tokens):
            with observed(rounding):
                return nnx.merge(graphdef, parameters).hidden(tokens)[0]

        return jax.jit(call, compiler_options=AS_WRITTEN)

    full, half = hidden("float32"), hidden("bfloat16")
    exact, ideal = wide(hidden("float64")), wide(hidden("float64", rounding=True))
    errors, squares = {name: [] for name in COLUMNS[:-1]}, []
    for seed in SEEDS:
        _, parameters = _model(family, "float32", seed)
        parameters = jax.tree.map(jnp.asarray, parameters)
        narrow = rounded_matrices(parameters)
        tokens = jax.random.randint(jax.random.key(seed), (SEQUENCES, max(lengths)), 0, 256)
        of_float32, of_bf16, of_narrow = full(parameters, tokens), half(parameters, tokens), exact(narrow, tokens)
        errors["gap"].append(token_errors(of_bf16, of_float32))
        errors["weights"].append(token_errors(of_narrow, exact(parameters, tokens)))
        errors["ideal"].append(token_errors(ideal(narrow, tokens), of_narrow))
        errors["lost"].append(token_errors(of_bf16, of_narrow))
        squares.append((np.asarray(of_bf16 - of_float32) ** 2, np.asarray(of_float32) ** 2))
    row = {"family": family} | {
        name: [float(np.median(np.concatenate(found)[:, :n])) for n in lengths] for name, found in errors.items()
    }
    difference, size = (np.concatenate(part) for part in zip(*squares, strict=True))
    return row | {"gap rms": [float(np.sqrt(difference[:, :n].sum() / size[:, :n].sum())) for n in lengths]}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", default=",".join(CAUSAL_MIXERS), help="comma-separated; all by default")
    parser.add_argument("--tokens", default="2,16,64", help="up to which errors are counted, comma-separated")
    args = parser.parse_args()
    families, lengths = args.families.split(","), [int(n) for n in args.tokens.split(",")]
    if unknown := [family for family in families if family not in CAUSAL_MIXERS]:
        parser.error(f"unknown family {unknown[0]!r}; expected some of {', '.join(CAUSAL_MIXERS)}")
    if min(lengths) < 1:
        parser.error(f"--tokens={args.tokens}: expected at least 1")
    width = 7 * len(lengths) + 2
    print(f"in thousandths, over the first {args.tokens} tokens")
    print(f"{'family':18}" + "".join(f"{name:>{width}}" for name in (*COLUMNS, "lost / ideal")))
    rows = []
    for family in families:
        rows.append(row := measure(family, lengths))
        cells = ["".join(f"{1e3 * x:7.1f}" for x in row[name]) for name in COLUMNS]
        cells.append("".join(f"{lost / ideal:7.2f}" for lost, ideal in zip(row["lost"], row["ideal"], strict=True)))
        print(f"{family:18}" + "".join(f"{cell:>{width}}" for cell in cells), flush=True)
    if families == list(CAUSAL_MIXERS):
        record.write("bf16", {"tokens": lengths, "rows": rows})


if __name__ == "__main__":
    main()
