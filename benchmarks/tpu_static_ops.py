"""The subjects of `benchmarks.tpu_static`: a function for each op that has a TPU kernel, an entry for each shape."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

import kernels
from kernels.delta_rule import mosaic_tpu as delta_rule_tpu
from kernels.delta_rule import specs as delta_rule_specs
from kernels.dispatch import Device
from kernels.divisors import largest_divisor
from kernels.dplr_delta_rule import mosaic_tpu as dplr_delta_rule_tpu
from kernels.linear_attention import mosaic_tpu, specs

TIME = 4096  # tokens of the shapes that tiles were chosen by


@dataclasses.dataclass(frozen=True)
class Op:
    """One op at one shape.

    Attributes:
      function: the op of operands by name, on layouts as projections leave them.
      arrays: shape and dtype of each operand.
      out: those of the result.
      time: tokens.
      unit: what cycles are counted for, beside a token.
      units: how many of them a token has.
    """

    function: Callable
    arrays: dict[str, tuple]
    out: tuple
    time: int
    unit: str
    units: int


def counted(shape: specs.Shape) -> specs.Shape:
    """`shape` with at most eight heads of v (sixteen of 64 lanes), or those of two heads of q and k: more take many
    minutes to count.

    Heads that do not share q and k have nothing to do with each other, and so many have enough grid steps to hide the
    first operands' way and work for both cores of a v5p: what a token and head costs is the same.
    """
    shared = shape.heads // shape.groups
    heads = 8 * max(1, 128 // shape.value_dim)
    groups = largest_divisor(shape.groups, max(2, heads // shared))
    return dataclasses.replace(shape, groups=groups, heads=groups * shared)


def linear_attention(shape: specs.Shape, time, implementation, tiles) -> Op:
    shape = counted(shape)
    if implementation != "mosaic_tpu":  # the profiler goes through every step of XLA's loops and fusions: minutes
        time = 256 if shape.decay == "vector" else 512
    g, h, k, v = shape.groups, shape.heads, shape.key_dim, shape.value_dim
    widths = {"q": (g, k), "k": (g, k), "v": (h, v)}
    decay = {"fixed": (h,), "scalar": (1, time, h), "vector": (1, time, h * k)}[shape.decay]

    def function(arrays):
        heads = {name: arrays[name].reshape(1, time, *width) for name, width in widths.items()}
        log_decay = arrays["log_decay"]
        log_decay = log_decay.reshape(1, time, h, k) if shape.decay == "vector" else log_decay
        bonus = {"bonus": arrays["bonus"]} if shape.bonus else {}
        with mosaic_tpu.use(tiles=specs.Tiles(*tiles) if tiles else None):
            out, _ = kernels.linear_attention(*heads.values(), log_decay, **bonus, implementation=implementation)
        return out.reshape(1, time, h * v)

    arrays = {name: ((1, time, heads * width), jnp.bfloat16) for name, (heads, width) in widths.items()}
    arrays["log_decay"] = decay, jnp.float32
    if shape.bonus:
        arrays["bonus"] = (h, k), jnp.float32
    return Op(function, arrays, ((1, time, h * v), jnp.bfloat16), time, "head", h)


DELTA_RULE = {  # heads, K = V and decays
    **{f"delta_rule_{decay}": (8, 128, decay) for decay in ("none", "scalar", "vector")},
    **{f"delta_rule_{decay}_64": (16, 64, decay) for decay in ("scalar", "vector")},
}


def delta_rule(heads, width, decay, implementation, tiles) -> Op:
    """Heads of q, k and v; `decay` is "none", "scalar" or "vector"."""
    time = TIME if implementation == "mosaic_tpu" else 256  # the profiler goes through every step: minutes
    rows = {name: ((1, time, heads * width), jnp.bfloat16) for name in ("q", "k", "v")}
    numbers = {"beta": ((1, time, heads), jnp.float32)}
    if decay != "none":
        numbers["log_decay"] = (1, time, heads * width if decay == "vector" else heads), jnp.float32

    def function(arrays):
        arrays = dict(arrays)
        for name in (*rows, *(("log_decay",) if decay == "vector" else ())):
            arrays[name] = arrays[name].reshape(1, time, heads, width)
        with delta_rule_tpu.use(tiles=delta_rule_specs.Tiles(*tiles) if tiles else None):
            out, _ = kernels.delta_rule(**arrays, implementation=implementation)
        return out.reshape(1, time, heads * width)

    return Op(function, rows | numbers, rows["v"], time, "head", heads)


def dplr_delta_rule(heads, width, implementation, tiles) -> Op:
    """Heads of K = V = `width`."""
    time = 2048 if implementation == "mosaic_tpu" else 256  # the profiler goes through every step: minutes
    rows = {name: ((1, time, heads * width), jnp.bfloat16) for name in ("q", "k", "v", "a", "b")}
    arrays = rows | {"log_decay": ((1, time, heads * width), jnp.float32)}

    def function(arrays):
        arrays = {name: x.reshape(1, time, heads, width) for name, x in arrays.items()}
        with dplr_delta_rule_tpu.use(tiles=specs.Tiles(*tiles) if tiles else None):
            out, _ = kernels.dplr_delta_rule(**arrays, implementation=implementation)
        return out.reshape(1, time, heads * width)

    return Op(function, arrays, rows["v"], time, "head", heads)


def selective_scan(channels, numbers, implementation, tiles) -> Op:
    del tiles
    time = 1024 if implementation == "mosaic_tpu" else 256  # the profiler goes through every step: minutes for 4096
    arrays = {
        "x": ((1, time, channels), jnp.bfloat16),
        "dt": ((1, time, channels), jnp.float32),
        "A": ((channels, numbers), jnp.float32),
        "B": ((1, time, numbers), jnp.bfloat16),
        "C": ((1, time, numbers), jnp.bfloat16),
        "D": ((channels,), jnp.float32),
    }
    return Op(
        lambda arrays: kernels.selective_scan(**arrays, implementation=implementation)[0],
        arrays,
        arrays["x"],
        time,
        "channel",
        channels,
    )


def linear_scan(channels, dtype, implementation, tiles) -> Op:
    """Decays per token; complex ones are made of real operands."""
    del tiles
    time = 4096 if implementation == "mosaic_tpu" else 256
    row = (1, time, channels)
    arrays = {"x": (row, jnp.float32), "log_decay": (row, jnp.float32)}
    if dtype == jnp.complex64:
        arrays |= {"x_imaginary": (row, jnp.float32), "angle": (row, jnp.float32)}

    def function(arrays):
        x, log_decay = arrays["x"], arrays["log_decay"]
        if dtype == jnp.complex64:
            x, log_decay = jax.lax.complex(x, arrays["x_imaginary"]), jax.lax.complex(log_decay, arrays["angle"])
        return jnp.real(kernels.linear_scan(x, log_decay, implementation=implementation)[0])

    return Op(function, arrays, arrays["x"], time, "channel", channels)


SHAPES = {  # of published or preset models: (implementation, tiles) -> Op
    **{
        name: functools.partial(linear_attention, shape, TIME if name.startswith("square") else 2048)
        for name, shape in specs.SHAPES.items()
    },
    **{name: functools.partial(delta_rule, *shape) for name, shape in DELTA_RULE.items()},
    "dplr_128": functools.partial(dplr_delta_rule, 8, 128),
    "dplr_64": functools.partial(dplr_delta_rule, 16, 64),
    "mamba_125m": functools.partial(selective_scan, 1536, 16),
    "mamba_1.3b": functools.partial(selective_scan, 4096, 16),
    "scan": functools.partial(linear_scan, 1024, jnp.float32),
    "scan_complex": functools.partial(linear_scan, 1024, jnp.complex64),
}

TILED = [*specs.SHAPES, *DELTA_RULE]


def tiles_of(shape: str, chip: str) -> tuple[tuple[int, ...], Callable[[tuple[int, ...]], bool]]:
    """Of a shape of TILED: the tiles that `specs` chooses for a chip, and which are possible."""
    device = Device("tpu", chip)
    if shape in DELTA_RULE:
        heads, width, decay = DELTA_RULE[shape]
        slots = specs.slots(heads, heads, width, width, per_key=True)
        tile = delta_rule_specs.TILE // slots.pack
        chosen = delta_rule_specs.tiles(device, TIME, slots, jnp.bfloat16, decay == "vector")

        def possible(tiles):
            return tiles[0] <= tile and tiles[1] >= tile * max(tiles[3:]) and tiles[2] <= slots.heads

        return dataclasses.astuple(chosen), possible
    sizes = counted(specs.SHAPES[shape])
    slots = specs.slots(sizes.heads, sizes.groups, sizes.key_dim, sizes.value_dim, sizes.decay == "vector")

    def possible(tiles):
        lanes = tiles[0] * slots.pack
        return lanes >= 128 and tiles[1] >= tiles[0] * max(tiles[3:]) and tiles[2] <= slots.heads

    return dataclasses.astuple(specs.tiles(device, TIME, slots, jnp.bfloat16)), possible
