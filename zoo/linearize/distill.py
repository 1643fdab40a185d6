"""What a model learns from a teacher, a loss of each token, in nats where it is one of logits.

    mixers   sum over layers l of |f_l(h_l) - g_l(h_l)|^2 / (|g_l(h_l)|^2 + eps), divided by their number
    logits   (1 - a) tau^2 KL(softmax(z' / tau) | softmax(z / tau)) + a (-log softmax(z)[target])

f_l is a mixer of the model and g_l the teacher's in its place, each with the model's norms around it, and h_l is the
teacher's residual stream before it: all layers come out of one forward pass of the teacher, and no gradient passes
between them (Bick et al. 2024, arXiv:2408.10189; Zhang et al. 2024, 2410.10254). Layers whose mixer is the teacher's,
settings included, are not counted. z and z' are the logits of the model and of the teacher, tau the temperature
(Hinton et al. 2015, 1503.02531), a the share of the tokens' own loss.
"""

import re
from collections.abc import Iterable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from kernels.array_typing import Array, Float, Int
from zoo import checkpoints, flops, sharding
from zoo.config import MLP_LAYER, Config, DistillConfig, ModelConfig, places
from zoo.errors import UsageError
from zoo.labelled import at_labels
from zoo.layers import in_pieces
from zoo.linearize.along import along
from zoo.linearize.transfer import Layers, walk
from zoo.model import LanguageModel

EPSILON = 1e-6
OF_TEACHER = "train.distill.teacher"


class Distillation:
    """What a run learns from the teacher of `config.train.distill`.

    Attributes:
      config: the teacher's.
      abstract: its parameters, [shape, dtype, sharding]. The loss takes them as they are here: matrices are bfloat16
        where `teacher_dtype` says so.

    Raises:
      UsageError: no run there, or one that `config` cannot learn from.
    """

    def __init__(self, config: Config, mesh: Mesh):
        self.settings: DistillConfig = config.train.distill
        self.config = checkpoints.read_config(self.settings.teacher)
        _check(self.settings, self.config.model, config.model)
        of_dtype = {"run": self.config.model.dtype}
        self.config.model.dtype = of_dtype.get(self.settings.teacher_dtype, self.settings.teacher_dtype)
        model = nnx.eval_shape(lambda: LanguageModel(self.config.model, rngs=nnx.Rngs(0)))
        self.graphdef, params = nnx.split(model, nnx.Param)
        specs = sharding.parameter_specs(params)
        self.loaded = _with_shardings(params, {name: NamedSharding(mesh, spec) for name, spec in specs.items()})
        self.abstract = jax.tree.map(
            lambda x, dtype: jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding),
            self.loaded,
            jax.eval_shape(self.held, self.loaded),
        )
        self.layers = replaced_layers(self.config.model, config.model)

    def held(self, params: nnx.State) -> nnx.State:
        """The teacher's parameters as they stay in memory."""
        if self.settings.teacher_dtype != "bfloat16":
            return params
        named = checkpoints.named_leaves(params)
        matrices = ("kernel", "embedding")
        kept = {n: x.astype(jnp.bfloat16) if n.endswith(matrices) else x for n, x in named.items()}
        return checkpoints.with_leaves(params, kept)

    def token_losses(
        self,
        model: LanguageModel,
        teacher: nnx.State,
        batch: dict[str, jax.Array],
        *,
        step: Int[Array, ""],
        dropout_key: jax.Array | None,
        labels: int | None,
    ) -> Float[Array, "B T"]:
        """Weights times the loss of each token."""
        teacher = nnx.merge(self.graphdef, jax.lax.stop_gradient(teacher))
        tokens, segment_ids = batch["tokens"], batch["segment_ids"]
        if self.settings.stage == "mixers":
            errors = mixer_errors(model, teacher, self.layers, tokens, segment_ids=segment_ids, step=step)
            return errors * batch["weights"]
        hidden, _ = model.hidden(tokens, segment_ids=segment_ids, dropout_key=dropout_key, step=step)
        theirs, _ = teacher.hidden(tokens, segment_ids=segment_ids)
        width, share, temperature = hidden.shape[-1], self.settings.tokens_weight, self.settings.temperature

        def losses(both, targets, weights):
            own, of_teacher = both[..., :width].astype(hidden.dtype), both[..., width:].astype(theirs.dtype)
            kl = in_pieces(lambda a, b: divergence(model.logits(a), teacher.logits(b), temperature), own, of_teacher)
            found = (1 - share) * temperature**2 * kl * weights
            return found + share * model.losses(own, targets, weights) if share else found

        return at_labels(losses, jnp.concatenate([hidden, theirs], -1), batch["targets"], batch["weights"], labels)

    def trainable(self) -> str:
        """The parameters that the stage is for: a regex over their paths; "": all."""
        return _of_mixers(self.layers) if self.settings.stage == "mixers" else ""

    def flops_per_token(self, model: ModelConfig, context_length: int, labels: int | None) -> float:
        """Of a step: the teacher's forward pass, and the model's three times, of stage `mixers` its mixers alone."""
        theirs = flops.forward_flops_per_token(self.config.model, context_length, labels)
        if self.settings.stage == "logits":
            return theirs + flops.train_flops_per_token(model, context_length, labels)
        own = places(model)
        units = model.num_layers // self.layers[0].count
        mixers = (own[layers.target].flops_per_token(model.d_model, context_length) for layers in self.layers)
        return theirs + 3 * units * sum(mixers)


def divergence(
    logits: Float[Array, "B T vocab"], of_teacher: Float[Array, "B T vocab"], temperature: float
) -> Float[Array, "B T"]:
    """KL(softmax(z' / tau) | softmax(z / tau)) in nats, z' of the teacher."""
    own, theirs = (jax.nn.log_softmax(z / temperature, axis=-1) for z in (logits, of_teacher))
    return jnp.sum(jnp.exp(theirs) * (theirs - own), axis=-1)


def mixer_errors(
    model: LanguageModel,
    teacher: LanguageModel,
    replaced: list[Layers],
    tokens: Int[Array, "B T"],
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    step: Int[Array, ""] | None = None,
) -> Float[Array, "B T"]:
    """Squared error of the mixers' outputs relative to the teacher's, the mean over `replaced` layers."""

    def visit(layers, theirs, own, error, _):
        y = theirs()
        return y, error + _relative(own(), y) if layers in replaced else error

    zero = jnp.zeros(tokens.shape, jnp.float32)
    _, error = along(teacher, model, tokens, visit, zero, segment_ids=segment_ids, step=step)
    units = model.num_units * len(model.pattern) // replaced[0].count
    return error / (len(replaced) * units)


def _relative(y: jax.Array, wanted: jax.Array) -> jax.Array:
    y, wanted = y.astype(jnp.float32), wanted.astype(jnp.float32)
    return jnp.sum((y - wanted) ** 2, -1) / (jnp.sum(wanted**2, -1) + EPSILON)


def replaced_layers(teacher: ModelConfig, model: ModelConfig) -> list[Layers]:
    """Layers of another mixer than the teacher's: another family, or other settings of it."""
    theirs, own = places(teacher), places(model)
    return [
        layers
        for layers in walk(len(theirs), len(own))
        if MLP_LAYER not in (theirs[layers.source].family, own[layers.target].family)
        and (theirs[layers.source].family, theirs[layers.source].settings)
        != (own[layers.target].family, own[layers.target].settings)
    ]


def new_parameters(config: Config, names: Iterable[str]) -> set[str]:
    """Of the parameters' names those of mixers that the teacher of `config.train.distill` does not have."""
    teacher = checkpoints.read_config(config.train.distill.teacher).model
    regex = _of_mixers(replaced_layers(teacher, config.model))
    return {name for name in names if re.search(regex, name)}


def _of_mixers(layers: list[Layers]) -> str:
    """A regex of their parameters."""
    blocks = sorted({each.target for each in layers})
    return rf"^units\.blocks\.({'|'.join(map(str, blocks))})\.mixer\."


def _check(settings: DistillConfig, teacher: ModelConfig, model: ModelConfig) -> None:
    where = f"{OF_TEACHER}={settings.teacher}"
    if heads := [head for head in (teacher.head, model.head) if head != "tokens"]:
        raise UsageError(f"{where}: a model of {heads[0]} predicts no tokens; expected model.head=tokens of both")
    names = ["vocab_size", "direction"] + ["num_layers", "d_model"] * (settings.stage == "mixers")
    found = [
        f"{where}: its model.{name} is {getattr(teacher, name)}, and {getattr(model, name)} here"
        for name in names
        if getattr(teacher, name) != getattr(model, name)
    ]
    if not found and settings.stage == "mixers":
        theirs, own = places(teacher), places(model)
        for layers in walk(len(theirs), len(own)):
            kinds = theirs[layers.source].family, own[layers.target].family
            if (kinds[0] == MLP_LAYER) != (kinds[1] == MLP_LAYER):
                found.append(f"{where}: layer {layers.place} is {kinds[0]}, and {kinds[1]} here")
        if not found and not replaced_layers(teacher, model):
            found.append(
                f"train.distill.stage: mixers are learnt where they differ, and {settings.teacher} has those of "
                "model.mixer; set another model.mixer, or train.distill.stage=logits"
            )
    if found:
        raise UsageError("\n       ".join(found))


def trainable_names(regex: str, params: nnx.State) -> set[str]:
    """Of the parameters, by dotted path, those that train: in whose path the regex is found; "": all.

    Raises:
      UsageError: none.
    """
    names = set(checkpoints.named_leaves(params))
    found = {name for name in names if re.search(regex, name)}
    if not found:
        raise UsageError(f"optimizer.trainable: {regex!r} matches no parameter of {', '.join(sorted(names))}")
    return found


def _with_shardings(params: nnx.State, shardings: dict[str, NamedSharding]) -> nnx.State:
    named = checkpoints.named_leaves(params)
    placed = {n: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=shardings[n]) for n, x in named.items()}
    return checkpoints.with_leaves(params, placed)
