"""Updates of low rank: the sum moves as two factors would, and nothing else does."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from zoo.config import OptimizerConfig
from zoo.layers.parameter import parameter
from zoo.sharding import parameters
from zoo.training.low_rank import low_rank
from zoo.training.optimizer import make_optimizer


def test_a_matrix_moves_as_the_product_of_two_factors():
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    kept, gate, scale = normal(2, 5, 4), normal(2, 5, 3), normal(5)
    values = {"kept": (kept, ("layers", "embed", "heads")), "gate": (gate, ("layers", "embed", "rank"))}
    params = nnx.State(
        {name: parameter(x, axes) for name, (x, axes) in values.items()} | {"scale": parameter(scale, ("norm",))}
    )
    x, wanted = normal(7, 5), normal(2, 7, 4)

    def loss(kept, gate):
        return jnp.mean((jnp.einsum("bd,lde->lbe", x, kept) - wanted) ** 2) + jnp.mean((x @ gate) ** 2)

    config = OptimizerConfig(learning_rate=1e-2, warmup_steps=0, schedule="constant")
    make = lambda tree: make_optimizer(config, 10, tree)  # noqa: E731
    optimizer = low_rank(make, 2, params, whole={"gate"}, low={"kept"})

    @jax.jit
    def both(params):
        """Four steps of it, and of the factors by themselves."""
        state = optimizer.init(params)
        own = {"A": state.factors["kept.down"], "B": state.factors["kept.up"], "gate": params["gate"]}
        alone = make(own)
        opt = alone.init(own)
        for _ in range(4):
            gradient = jax.grad(lambda p: loss(p["kept"][...], p["gate"][...]))(params)
            updates, state = optimizer.update(gradient, state, params)
            params = optax.apply_updates(params, updates)
            gradient = jax.grad(lambda p: loss(kept + p["A"][...] @ p["B"][...], p["gate"][...]))(own)
            updates, opt = alone.update(gradient, opt, own)
            own = optax.apply_updates(own, updates)
        return params, state, own

    params, state, own = both(params)
    update = own["A"][...] @ own["B"][...]
    np.testing.assert_allclose(params["kept"][...] - kept, update, atol=1e-5)
    np.testing.assert_allclose(params["gate"][...], own["gate"][...], atol=1e-6)
    np.testing.assert_array_equal(params["scale"][...], scale)
    assert float(jnp.abs(update).max()) > 1e-2 and np.linalg.matrix_rank(update).tolist() == [2, 2]
    # Nothing is kept of the whole matrix, nor of what stays.
    shapes = {name: leaf.shape for name, leaf in parameters(state).items()}
    assert (2, 5, 4) not in shapes.values() and (5,) not in shapes.values()
    axes = {name: x.get_metadata()["out_sharding"] for name, x in state.factors.items()}
    assert axes == {"kept.down": ("layers", "embed", "rank"), "kept.up": ("layers", "rank", "heads")}
