"""A TPU's matmuls on a CPU: float32 operands in one pass of bfloat16 unless more precision is asked for."""

import jax
import jax.numpy as jnp
from jax import lax

INNER = {"jit": "jaxpr", "pjit": "jaxpr", "closed_call": "call_jaxpr", "custom_vjp_call": "call_jaxpr"}


def on_a_tpu(function, passes=6):
    """`function`, its products rounded as on a TPU; `passes` of bfloat16 stand for Precision.HIGHEST."""

    def run(*args):
        closed, shape = jax.make_jaxpr(function, return_shape=True)(*args)
        out = evaluate(closed, jax.tree.leaves(args), passes)
        return jax.tree.unflatten(jax.tree.structure(shape), out)

    return jax.jit(run)


def evaluate(closed, args, passes):
    jaxpr, values = closed.jaxpr, {}

    def value(var):
        return var.val if hasattr(var, "val") else values[var]

    def inner(closed):
        return lambda *args: evaluate(closed, args, passes)

    values |= dict(zip((*jaxpr.constvars, *jaxpr.invars), (*closed.consts, *args), strict=True))
    for eqn in jaxpr.eqns:
        name, params, inputs = eqn.primitive.name, eqn.params, [value(var) for var in eqn.invars]
        if name == "dot_general":
            outputs = [product(*inputs, params, passes)]
        elif name == "scan":
            outputs = scan(inner(params["jaxpr"]), inputs, eqn)
        elif name in INNER:
            outputs = inner(params[INNER[name]])(*inputs)
        else:
            assert not any(isinstance(x, type(closed)) for x in jax.tree.leaves(params)), f"what is in {name}?"
            outputs = eqn.primitive.bind(*inputs, **params)
            outputs = outputs if eqn.primitive.multiple_results else [outputs]
        values |= dict(zip(eqn.outvars, outputs, strict=True))
    return [value(var) for var in jaxpr.outvars]


def scan(body, inputs, eqn):
    """What a scan stacks has an axis more outside than in its body."""
    inside = eqn.params["jaxpr"].jaxpr
    carries = sum(a.aval.ndim == b.aval.ndim for a, b in zip(inside.outvars, eqn.outvars, strict=True))
    fixed = sum(a.aval.ndim == b.aval.ndim for a, b in zip(inside.invars, eqn.invars, strict=True))
    consts, carry, xs = inputs[: fixed - carries], inputs[fixed - carries : fixed], inputs[fixed:]

    def step(carry, xs):
        outputs = body(*consts, *carry, *xs)
        return outputs[:carries], outputs[carries:]

    carry, stacked = lax.scan(step, carry, xs, length=eqn.params["length"], reverse=eqn.params["reverse"])
    return [*carry, *stacked]


def product(a, b, params, passes):
    """Of three bfloat16 parts of each operand, the products of the largest ones."""
    precision = params["precision"]
    highest = precision is not None and set(precision) == {lax.Precision.HIGHEST}
    pairs = [(0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (2, 0)][: passes if highest else 1]
    parts = [three_parts(x) if x.dtype == jnp.float32 else [x, 0 * x, 0 * x] for x in (a, b)]
    multiply = lambda a, b: lax.dot_general_p.bind(a, b, **params)  # noqa: E731
    return sum(multiply(parts[0][i], parts[1][j]) for i, j in reversed(pairs))


def three_parts(x):
    parts = []
    for _ in range(3):
        parts.append(lax.reduce_precision(x, 8, 7))
        x = x - parts[-1]
    return parts
