"""Operations of the dot products in a jaxpr, a scan's body counted as often as it runs."""

import math

import jax


def dot_flops(function, *args) -> float:
    return _count(jax.make_jaxpr(function)(*args).jaxpr)


def _count(jaxpr) -> float:
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[i] for i in contracted)
            continue
        assert equation.primitive.name != "while", "a loop of unknown length cannot be counted"
        times = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        branches = equation.params.get("branches")
        if branches:
            total += max(_count(branch.jaxpr) for branch in branches)
            continue
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                total += times * _count(inner)
    return total
