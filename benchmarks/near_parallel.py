"""What near-parallel keys cost a delta rule: `python -m benchmarks.near_parallel [--time=256]`.

One key and a tenth of noise, of unit length, with beta at 1 and at 2, where every correction swings around the last:
roundings of what tokens correct in each other do not decay. Printed of `out` and the final state, against the
recurrence in float64 of the same inputs before they are rounded: the root mean square of the difference over that of
the values, and the largest difference over the largest value. `rounding alone` is the recurrence in float64 of rounded
inputs. Pallas kernels are interpreted: where their operands are bfloat16, a CPU's products are a TPU's.

    --noise=0 --dtype=float32 --decays=none   one key, of which nothing but roundings is ever lost
"""

import argparse
import sys

import jax
import jax.numpy as jnp
import numpy as np

import kernels
from zoo.settings import argument

HEADS, WIDTH = 2, 64
DECAYS = {"none": None, "scalar": (), "vector": (WIDTH,)}


def inputs(decay: str, beta: float, time: int, noise: float) -> dict[str, np.ndarray]:
    """In float64; log-decays from -0.01 to 0."""
    rng = np.random.default_rng(0)

    def unit(x):
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    shape = (1, time, HEADS, WIDTH)
    arrays = {name: rng.standard_normal(shape) for name in ("q", "v")}
    arrays["k"] = unit(unit(rng.standard_normal((1, 1, HEADS, WIDTH))) + noise * unit(rng.standard_normal(shape)))
    arrays["beta"] = np.full(shape[:3], beta)
    arrays["initial_state"] = rng.standard_normal((1, HEADS, WIDTH, WIDTH))
    if DECAYS[decay] is not None:
        arrays["log_decay"] = -0.01 * rng.uniform(size=(*shape[:3], *DECAYS[decay]))
    return arrays


def results(arrays: dict[str, np.ndarray], implementation: str) -> list[np.ndarray]:
    """out and the final state."""
    call = jax.jit(lambda arrays: kernels.delta_rule(**arrays, implementation=implementation))
    return [np.asarray(x, np.float64) for x in call(arrays)]


def rounded(arrays: dict[str, np.ndarray], dtype: str) -> dict[str, jax.Array]:
    """What a model of `dtype` hands over."""
    return {name: jnp.asarray(x, dtype if name in "qkv" else jnp.float32) for name, x in arrays.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--implementations", default="mosaic_tpu,chunked", help="names, by commas")
    parser.add_argument("--time", type=argument(int), default=256, help="tokens")
    parser.add_argument("--noise", type=argument(float, at_least=0.0), default=0.1, help="beside a key of length 1")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of q, k and v")
    parser.add_argument("--decays", default=",".join(DECAYS), help="names, by commas")
    args = parser.parse_args()
    if unknown := set(args.decays.split(",")) - set(DECAYS):
        parser.error(f"--decays: no {', '.join(sorted(unknown))}, expected some of {', '.join(DECAYS)}")
    names = args.implementations.split(",")
    print(f"{'decays':8}{'beta':>5}  {'':16}{'out rms':>9}{'largest':>9}{'state rms':>11}{'largest':>9}")
    for decay in args.decays.split(","):
        for beta in (1.0, 2.0):
            arrays = inputs(decay, beta, args.time, args.noise)
            with jax.enable_x64(True):
                wanted = results(arrays, "reference")
                wide = {name: np.asarray(x, np.float64) for name, x in rounded(arrays, args.dtype).items()}
                found = {"rounding alone": results(wide, "reference")}
            for name in names:
                try:
                    found[name] = results(rounded(arrays, args.dtype), name)
                except (NotImplementedError, ValueError) as error:
                    sys.exit(f"--implementations={name}: {error}")
            for name, values in found.items():
                errors = [
                    measure(value - exact) / measure(exact)
                    for value, exact in zip(values, wanted, strict=True)
                    for measure in (lambda x: np.sqrt(np.mean(x**2)), lambda x: np.max(np.abs(x)))
                ]
                columns = "".join(f"{error:{width}.1e}" for error, width in zip(errors, (9, 9, 11, 9), strict=True))
                print(f"{decay:8}{beta:5.0f}  {name:16}{columns}", flush=True)


if __name__ == "__main__":
    main()
