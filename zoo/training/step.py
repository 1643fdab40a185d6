"""The jitted programs of a run: initial state, one training step, one evaluation step.

The loss is the head's (`zoo.heads`), of tokens -log p(target) in nats, in the mean over the step's tokens or rows:

    loss = sum_i w_i loss_i / sum_i w_i       over all sequences of all microbatches and devices

so a microbatch counts by its weights, and accumulating gradients over microbatches is the same sum in another order.
With a teacher (`train.distill`) the loss of a token is that of `zoo.linearize.distill`.
Shardings are explicit, of state and batch; the same programs run on any mesh.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from zoo import data, heads, linearize, processes, sharding
from zoo.checkpoints import named_leaves, with_leaves
from zoo.config import Config
from zoo.errors import UsageError
from zoo.heads.base import Declared
from zoo.model import LanguageModel
from zoo.training.low_rank import low_rank
from zoo.training.optimizer import is_matrix, make_optimizer
from zoo.training.schedules import schedule

Batch = dict[str, jax.Array]  # what `zoo.heads` declares; of tokens, each [B, T]


# XLA for TPUs would write a product with gathered weights as a loop that adds each device's part to a result in HBM:
# the step of gla:1.3b on 16 v5e would take half as long again by the roofline, and twice as long by XLA's own costs.
COMPILER_OPTIONS = {"tpu": {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}}


class TrainState(NamedTuple):
    params: nnx.State  # of nnx.Param, float32
    opt: optax.OptState
    step: jax.Array  # int32: updates done, and the index of the next batch


class Programs(NamedTuple):
    """What a run executes. The state given to `train` is donated."""

    graphdef: nnx.GraphDef
    abstract_state: TrainState  # shapes with shardings
    batch_sharding: NamedSharding  # of [batch, time]
    batch_shardings: dict[str, NamedSharding]  # of each array of a batch
    init: Callable[[], TrainState]
    init_opt: Callable[[nnx.State], TrainState]  # a new run from given parameters
    train: Callable[..., tuple[TrainState, dict[str, jax.Array]]]  # of a state, a batch, and the teacher's parameters
    evaluate: Callable[[nnx.State, Batch], dict[str, jax.Array]]
    distillation: linearize.Distillation | None

    @property
    def abstract_teacher(self) -> tuple[nnx.State, ...]:
        """What `train` takes beside state and batch: the teacher's parameters, or nothing."""
        return () if self.distillation is None else (self.distillation.abstract,)

    @property
    def optimizer_bytes(self) -> int:
        """Of the optimizer's state, one copy."""
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(self.abstract_state.opt))

    def rows(self, sequences: int) -> list[int]:
        """Those of a batch of `sequences` that devices of this process hold, whole or in part; others may, too."""
        places = self.batch_sharding.addressable_devices_indices_map((sequences, self.batch_sharding.mesh.size))
        return sorted({row for rows, _ in places.values() for row in range(sequences)[rows]})

    def put(self, batch: dict[str, np.ndarray], sequences: int = 0) -> Batch:
        """Global arrays from this process's `rows` of a batch of so many `sequences` (0: it has them all)."""
        if not sequences or processes.count() == 1:
            return jax.device_put(batch, {name: self.batch_shardings[name] for name in batch})
        place = {row: i for i, row in enumerate(self.rows(sequences))}

        def part(rows: np.ndarray, index: tuple[slice, ...]) -> np.ndarray:
            return rows[[place[row] for row in range(sequences)[index[0]]]][(slice(None), *index[1:])]

        return {
            name: jax.make_array_from_callback(
                (sequences, *rows.shape[1:]), self.batch_shardings[name], functools.partial(part, rows)
            )
            for name, rows in batch.items()
        }


def build(config: Config, mesh: Mesh) -> Programs:
    """Trace nothing yet but the shapes of the state; programs compile on their first call.

    Raises:
      UsageError: the optimizer's parameter groups, `mesh.overrides` or the teacher do not fit the model.
    """
    distillation = linearize.Distillation(config, mesh) if config.train.distill.teacher else None
    init_key, dropout_key = jax.random.split(jax.random.key(config.train.seed))

    def make_params(key: jax.Array) -> nnx.State:
        # Parameters name logical axes; jit's out_shardings place them, so that no device ever holds them all.
        with sharding.use_mesh(mesh):
            return nnx.state(LanguageModel(config.model, rngs=nnx.Rngs(key)), nnx.Param)

    labels, asked = (data.labels(config, training=training) for training in (True, False))
    axes = {name: x.axes for name, x in batch_arrays(config, evaluation=True).items()}

    graphdef, abstract_params = nnx.split(abstract_model(config), nnx.Param)
    optimizer = optimizer_of(config, abstract_params)
    learning_rate = schedule(config.optimizer, config.train.steps)
    regex = config.optimizer.trainable or (distillation.trainable() if distillation else "")
    trainable = linearize.trainable_names(regex, abstract_params) - _stays(config, abstract_params)

    def start(params: nnx.State) -> TrainState:
        return TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32))

    def loss(
        params: nnx.State, batch: Batch, total_weight: jax.Array, step: jax.Array, key: jax.Array, *teacher: nnx.State
    ) -> jax.Array:
        model = nnx.merge(graphdef, params)
        given = {"dropout_key": key if config.model.dropout else None, "step": step, "labels": labels}
        if distillation is not None:
            return distillation.token_losses(model, *teacher, batch, **given).sum() / total_weight
        return model.batch_losses(batch, **given).sum() / total_weight

    def of_trainable(tree: nnx.State) -> nnx.State:
        """0 in place of what does not train."""
        if len(trainable) == len(named := named_leaves(tree)):
            return tree
        return with_leaves(tree, {n: x if n in trainable else jnp.zeros_like(x) for n, x in named.items()})

    def as_parameters(gradient: nnx.State) -> nnx.State:
        """What microbatches add up is spread as the parameters are."""
        return jax.lax.with_sharding_constraint(gradient, shardings.params)

    def loss_and_gradient(
        params: nnx.State, batch: Batch, step: jax.Array, key: jax.Array, *teacher: nnx.State
    ) -> tuple[jax.Array, nnx.State]:
        total_weight = jnp.maximum(batch["weights"].sum(), 1.0)
        pieces = config.train.accumulate_steps
        if pieces == 1:
            return jax.value_and_grad(loss)(params, batch, total_weight, step, key, *teacher)

        def piece(carry, xs):
            index, microbatch = xs
            key_of_piece = jax.random.fold_in(key, index)
            found = jax.value_and_grad(loss)(params, microbatch, total_weight, step, key_of_piece, *teacher)
            value, gradient = jax.tree.map(jnp.add, carry, found)
            return (value, as_parameters(gradient)), None

        # Microbatch j takes rows j, j + pieces, ...: each device keeps its own rows.
        split = jax.tree.map(lambda x: x.reshape(-1, pieces, *x.shape[1:]).swapaxes(0, 1), batch)
        split = {name: sharding.constrain(x, None, *axes[name]) for name, x in split.items()}
        zero = (jnp.zeros((), jnp.float32), as_parameters(jax.tree.map(jnp.zeros_like, params)))
        return jax.lax.scan(piece, zero, (jnp.arange(pieces), split))[0]

    def train(state: TrainState, batch: Batch, *teacher: nnx.State) -> tuple[TrainState, dict[str, jax.Array]]:
        with sharding.use_mesh(mesh):
            key = jax.random.fold_in(dropout_key, state.step)
            value, gradient = loss_and_gradient(state.params, batch, state.step, key, *teacher)
            gradient = of_trainable(gradient)
            norm = optax.tree.norm(gradient)
            if config.optimizer.clip_norm:
                scale = jnp.minimum(1.0, config.optimizer.clip_norm / jnp.maximum(norm, 1e-12))
                gradient = jax.tree.map(lambda g: g * scale, gradient)
            updates, opt = optimizer.update(gradient, state.opt, state.params)
            params = optax.apply_updates(state.params, of_trainable(updates))
            metrics = {
                "loss": value,
                "grad_norm": norm,
                "parameter_norm": optax.tree.norm(params),  # of the new ones: tells a poisoned state before it is saved
                "learning_rate": learning_rate(state.step),
            }
            return TrainState(params, opt, state.step + 1), metrics

    def evaluate(params: nnx.State, batch: Batch) -> dict[str, jax.Array]:
        with sharding.use_mesh(mesh):
            return nnx.merge(graphdef, params).batch_scores(batch, labels=asked)

    abstract = abstract_state(config, mesh, abstract_params)
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    everywhere = NamedSharding(mesh, PartitionSpec())
    placed = {name: NamedSharding(mesh, sharding.partition_spec(*of)) for name, of in axes.items()}
    trained = {name: placed[name] for name in abstract_batch(config)}
    of_teacher = () if distillation is None else (jax.tree.map(lambda x: x.sharding, distillation.abstract),)
    jit_init = jax.jit(lambda key: start(make_params(key)), out_shardings=shardings)
    return Programs(
        graphdef=graphdef,
        abstract_state=abstract,
        batch_sharding=sharding.batch_sharding(mesh),
        batch_shardings=placed,
        init=lambda: jit_init(init_key),
        init_opt=jax.jit(start, donate_argnums=0, in_shardings=(shardings.params,), out_shardings=shardings),
        train=jax.jit(
            train,
            donate_argnums=0,
            in_shardings=(shardings, trained, *of_teacher),
            out_shardings=(shardings, everywhere),
            compiler_options=COMPILER_OPTIONS.get(mesh.devices.flat[0].platform),
        ),
        evaluate=jax.jit(evaluate, in_shardings=(shardings.params, placed), out_shardings=everywhere),
        distillation=distillation,
    )


def optimizer_of(config: Config, params: nnx.State) -> optax.GradientTransformation:
    """Of a run: `make_optimizer`'s, or with `train.distill.rank` updates of that rank of what is kept from the teacher.

    Raises:
      UsageError: as `make_optimizer`; nothing is left that trains.
    """
    make = functools.partial(make_optimizer, config.optimizer, config.train.steps)
    rank = config.train.distill.rank
    if not rank:
        return make(params)
    trainable = linearize.trainable_names(config.optimizer.trainable, params) - _stays(config, params)
    if not trainable:
        raise UsageError(
            "optimizer.trainable: with train.distill.rank no parameter is left that trains; expected a regex of a "
            "matrix, or of a mixer that the teacher does not have"
        )
    new = linearize.new_parameters(config, trainable)
    return low_rank(make, rank, params, whole=new, low=trainable - new)


def _stays(config: Config, params: nnx.State) -> set[str]:
    """With updates of low rank: what is kept from the teacher and no matrix."""
    if not config.train.distill.rank:
        return set()
    named = sharding.parameters(params)
    return {name for name in named.keys() - linearize.new_parameters(config, named) if not is_matrix(named[name])}


def abstract_model(config: Config) -> LanguageModel:
    """The model's shapes."""
    return nnx.eval_shape(lambda: LanguageModel(config.model, rngs=nnx.Rngs(0)))


def abstract_state(config: Config, mesh: Mesh | AbstractMesh, params: nnx.State) -> TrainState:
    """Shapes and shardings of a run's state, from those of its parameters. The mesh's devices need not be there.

    Raises:
      UsageError: the optimizer's parameter groups, or `mesh.overrides`, do not fit the model.
    """
    specs = sharding.parameter_specs(params, config.mesh.overrides)
    optimizer = optimizer_of(config, params)
    state = TrainState(params, jax.eval_shape(optimizer.init, params), jax.ShapeDtypeStruct((), jnp.int32))
    shardings = sharding.named_shardings(state, mesh, specs)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings)


def batch_arrays(config: Config, sequences: int = 0, *, evaluation: bool = False) -> dict[str, Declared]:
    """The arrays of a batch, of a training step or an evaluation; `sequences`: default, a training step's."""
    rows, length = sequences or config.train.batch_size, config.train.context_length
    return heads.of(config.model).arrays(config.model, rows, length, evaluation=evaluation)


def abstract_batch(config: Config, sequences: int = 0) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of a training step's batch; `sequences`: as in `batch_arrays`."""
    return {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in batch_arrays(config, sequences).items()}
