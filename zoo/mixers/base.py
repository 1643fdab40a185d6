"""The contract of a token mixer."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from kernels.array_typing import Array, Float, Int
from zoo.mixers.from_softmax import Softmax, TakenOver, open_gate, take_over
from zoo.mixers.shared_settings import MixerConfig, NormedMixerConfig, put_around
from zoo.settings import divisors_near

__all__ = [
    "BIDIRECTIONAL",
    "CAUSAL",
    "DIRECTIONS",
    "Mixer",
    "MixerConfig",
    "NormedMixerConfig",
    "Sizes",
    "State",
    "check_heads",
    "heads_at_most",
    "heads_or_default",
    "positions_or_default",
]

State = Any  # a pytree of arrays
DIRECTIONS = CAUSAL, BIDIRECTIONAL = ("causal", "bidirectional")


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What a mixer is told of the model around it; `d_model` alone for a layer of somebody else's."""

    d_model: int
    num_layers: int = 1
    rope: bool = True  # turn q and k by rotary positions, in families that leave it to the model
    norm_epsilon: float = 1e-5
    dtype: jnp.dtype = jnp.float32  # of the computation; parameters are float32
    output_scale: float = 1.0  # of the initial output projection, relative to 1 / sqrt(fan-in)
    direction: str = CAUSAL  # or BIDIRECTIONAL: a token sees those after it too
    direction_shared: bool = False  # of a family that runs twice, both ways: by the same parameters


class Mixer(nnx.Module):
    """Mixes tokens along time: y_t is a function of x_1 ... x_t of the same segment, or of all of it (`directions`).

    A family is one file: a subclass, its config dataclass, its equation. The registry, `zoo.config`, the flops table,
    the conformance suite, benchmarks and command lines find it from there. What every family can be set to (biases,
    the norms' epsilon) comes with `MixerConfig`: see zoo/mixers/shared_settings.py.

    Attributes:
      config_class: the family's config dataclass.
      saved_names: values tagged by `jax.ad_checkpoint.checkpoint_name` that the remat policy "family" keeps.
      reads_input: whether the family's layers are handed what `on_input` makes of the model's input.
      directions: the ways that it can see: (CAUSAL, BIDIRECTIONAL), or one of them.
      runs_twice: what sees both ways: two of the family, one in reversed time, added (`zoo.mixers.BothWays`). False:
        itself, by `self.causal`, which is set before its `__init__`; its states are refused where that is False.
    """

    config_class: ClassVar[type[MixerConfig]]
    saved_names: ClassVar[tuple[str, ...]] = ()
    reads_input: ClassVar[bool] = False
    directions: ClassVar[tuple[str, ...]] = DIRECTIONS
    runs_twice: ClassVar[bool] = True
    causal: bool

    def __init_subclass__(cls, **options: Any):
        super().__init_subclass__(**options)
        put_around(cls, Sizes)

    def __init__(self, config: Any, sizes: Sizes, *, layer_index: jax.Array | int, rngs: nnx.Rngs):
        """`layer_index` counts from 0 and may be traced (the depth is stacked): use it in initial values only."""
        raise NotImplementedError

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
        state: State | None = None,
    ) -> tuple[Float[Array, "B T D"], State | None]:
        """Mix.

        Args:
          x: the block's normed input.
          segment_ids: documents of a packed row; a token whose id differs from its left neighbour's starts anew.
            The state given belongs to the first segment, the state returned is the last segment's. Or
            `zoo.taken.Segments`, where the state takes in a part of the tokens; it is handed on to `zoo.ops`.
          positions: of each token in its document; default 0, 1, ..., which is right without a state only.
          state: continue from it, for any T (prefill, chunked prefill and decoding are this call). None: from zero,
            and no state is returned.
        """
        raise NotImplementedError

    @staticmethod
    def over_depth(
        mixers: list["Mixer"], layer_index: Int[Array, "N P"], num_layers: int, step: Int[Array, ""] | None = None
    ) -> jax.Array | None:
        """What the family's layers must know of one another, or of their place in the depth; None (most) for nothing.

        Called once a forward pass, before the depth is scanned. The family stands at P places of the model's
        repeating unit, which stands N times.

        Args:
          mixers: one a place, their parameters stacked: [N, ...].
          layer_index: of each layer, counted over all families.
          num_layers: of the model.
          step: of training, for what is drawn anew in its course; None outside of training.

        Returns:
          [N, P, ...]: each layer's entry is handed to its `__call__` as `depth`. A mixer without a model gets none.
        """
        return None

    def on_input(
        self, x: Float[Array, "B T D"], *, segment_ids: Int[Array, "B T"] | None = None, state: State | None = None
    ) -> tuple[Float[Array, "B T ..."], State]:
        """What all of the family's layers are handed of the model's input, and the state for the next call.

        Called on the first of them once a forward pass, before the depth is scanned, where `reads_input`.

        Args:
          x: the embedded tokens, in that layer's norm.
          state: of `init_input_state` or an earlier call; None: from zero.

        Returns:
          what each layer's `__call__` gets as `of_input`, and the state. A mixer without a model gets none.
        """
        raise NotImplementedError

    def init_input_state(self, batch_size: int, dtype: jnp.dtype) -> State:
        """The state of `on_input` before the first token."""
        raise NotImplementedError

    def init_state(self, batch_size: int, max_length: int, dtype: jnp.dtype) -> State:
        """The state before the first token. `max_length` (tokens) bounds caches; recurrent states ignore it.

        More tokens than a cache holds are a ValueError where their number is known, else NaN, never a guess.
        """
        raise NotImplementedError

    def spread_over_tensor(self) -> dict[str, int]:
        """What `mesh.tensor` has to divide beside the dimensions of parameters, by the setting that says how many.

        Heads are whole on a device: of four on eight devices each device would compute all.
        """
        return {"num_heads": self.heads} if hasattr(self, "heads") else {}

    def as_softmax(self, span: int) -> Softmax | None:
        """What the layer hands on to another family in its place, where it is softmax attention; None: it is not.

        `span`: tokens of the contexts that it was trained on.
        """
        return None

    def from_softmax(self, softmax: Softmax) -> TakenOver:
        """What the layer takes over from softmax attention in its place; its other parameters start fresh.

        Here: projections named q, k, v and out, in as many heads as the layer has, and an output gate that is open. A
        family whose parameters have other names, or that has decays and convolutions, says so in its own file.
        """
        turned = getattr(self, "rope", False)
        found = take_over(self, softmax, heads=self.heads, turned=turned) if hasattr(self, "heads") else {}
        return found | open_gate(self, "output_gate")

    @staticmethod
    def longest(config: Any) -> int | None:
        """Tokens of the longest document that it takes, of its setting `length`; None: any."""
        return None

    @staticmethod
    def check(config: Any, d_model: int) -> list[str]:
        """What is wrong with the settings, each as "<field>: message"; empty if nothing is."""
        raise NotImplementedError

    @staticmethod
    def check_direction(config: Any, direction: str) -> list[str]:
        """What is wrong with the settings in a model of that `model.direction`, as of `check`."""
        return []

    @staticmethod
    def num_parameters(config: Any, d_model: int) -> int:
        raise NotImplementedError

    @staticmethod
    def flops_per_token(config: Any, d_model: int, context_length: int) -> float:
        """Forward floating-point operations a token (multiply and add are two): projections and recurrence.

        The recurrence counts its definition (write k v^T, read q^T S: 4 K V a head; a delta rule reads k^T S too:
        6 K V), not what a chunked algorithm spends on it; softmax attention counts the whole context for each token.
        """
        raise NotImplementedError


def positions_or_default(positions: jax.Array | None, x: jax.Array) -> jax.Array:
    if positions is not None:
        return positions
    return jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[:2])


def heads_or_default(num_heads: int, d_model: int, head_width: int) -> int:
    """`num_heads`, or for 0 a head for each `head_width` of the model's width, at least 4."""
    return num_heads or max(4, d_model // head_width)


def heads_at_most(num_heads: int, width: int, head_width: int) -> int:
    """`num_heads`, or for 0 the fewest, at least 4, that cut `width` into heads of at most `head_width`.

    A width that only twice as many would cut has no such heads: `check_heads` names it.
    """
    least = max(4, -(-width // head_width))
    return num_heads or next((heads for heads in range(least, 2 * least + 1) if width % heads == 0), least)


def check_heads(fields: dict[str, int], width_name: str, width: int) -> list[str]:
    """Problems with head counts that must divide a width."""
    problems = []
    for name, heads in fields.items():
        if width < 1:
            problems.append(f"{name}: {width_name} is {width}; make it at least 1")
        elif width % heads:
            near = divisors_near(width, heads)
            problems.append(
                f"{name}: {heads} heads do not divide {width_name} = {width}; use one of {', '.join(map(str, near))}"
            )
    return problems
