"""Draws docs/gates.png, what is left of a state after t tokens, and prints the costs in docs/zoo.md:

    python docs/gates.py

A mixer is linear in its state. Two runs over the same tokens, from a state of ones and from one of zeros, differ by
what is left of the ones: the product of the gates, read off the module itself, with the parameters it starts with.
"""

import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from matplotlib import pyplot as plt
from matplotlib.lines import Line2D

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from zoo import flops  # noqa: E402
from zoo.config import Config, preset  # noqa: E402
from zoo.mixers import CAUSAL_MIXERS, MIXERS, Sizes  # noqa: E402

D_MODEL, TIME, LINES = 64, 512, 24
MATRIX = {"linear_attention": "S", "mlstm": "S", "rwkv6": "S", "gateloop": "R"}  # others: the state is the matrix
SEQUENCES = {"one sequence of random tokens": "#1f5fa8", "another": "#d1662b"}  # and its colour


def remaining(family: str) -> np.ndarray:
    """Share of the state's entries left after each token: [2 sequences, TIME, entries]."""
    sizes = Sizes(d_model=D_MODEL, num_layers=2)
    mixer = MIXERS[family](getattr(Config().model, family), sizes, layer_index=0, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (TIME, 2, 1, D_MODEL))
    name = MATRIX.get(family)

    def matrix(state):
        value = state[name] if name else state
        return value * jnp.exp(state["m"])[..., None, None] if family == "mlstm" else value  # kept divided by exp(m)

    def trajectory(fill):
        zero = mixer.init_state(2, TIME, jnp.float32)
        start = {**zero, name: zero[name] + fill} if name else zero + fill

        def step(state, token):
            _, state = mixer(token, positions=jnp.zeros((2, 1), jnp.int32), state=state)
            return state, matrix(state)

        return jax.lax.scan(step, start, x)[1]

    large = 1e4  # beside what the tokens write, so that the difference keeps its digits
    left = np.asarray(jax.jit(trajectory)(large)) - np.asarray(jax.jit(trajectory)(0.0))
    left = left[..., :1] if family != "dfw" else left  # columns are alike unless values have gates
    return left.reshape(TIME, 2, -1).swapaxes(0, 1) / large


def draw(path: pathlib.Path) -> None:
    families = [family for family in CAUSAL_MIXERS if recurrent(family)]
    columns = 5
    rows = -(-len(families) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(13, 0.4 + 2.6 * rows), sharex=True, sharey=True, squeeze=False,
                                layout="constrained")  # fmt: skip
    for axis, family in zip(axes.flat, families, strict=False):
        for sequence, colour in zip(remaining(family), SEQUENCES.values(), strict=True):
            entries = np.unique(np.linspace(0, sequence.shape[1] - 1, LINES).astype(int))
            axis.plot(np.arange(1, TIME + 1), sequence[:, entries], color=colour, linewidth=0.6, alpha=0.6)
        axis.set(title=family, xscale="log", xlim=(1, TIME), ylim=(-0.02, 1.05))
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes.flat[len(families) :]:
        axis.set_visible(False)
    figure.supxlabel("tokens since it was written")
    figure.supylabel("share left")
    lines = [Line2D([], [], color=colour) for colour in SEQUENCES.values()]
    title = "a line: one entry of a state; its colour, what is read:"
    figure.legend(lines, SEQUENCES, title=title, loc="outside upper center", ncols=2, frameon=False)
    figure.savefig(path, dpi=80)


def recurrent(family: str) -> bool:
    """Whether the family's state is a matrix that a gate shrinks."""
    state = jax.eval_shape(
        lambda: MIXERS[family](
            getattr(Config().model, family), Sizes(D_MODEL, 2), layer_index=0, rngs=nnx.Rngs(0)
        ).init_state(1, 8, jnp.float32)
    )
    return family in MATRIX or (hasattr(state, "shape") and state.ndim == 4)


def costs() -> None:
    print("| family | state, KB a layer | mixer, MFLOP a token |\n|---|---|---|")
    for family, mixer in MIXERS.items():
        cells = [], []
        for size in ("tiny", "125m"):
            model = preset(size).model
            model.mixer, model.num_layers, model.vocab_size = family, 1, 64
            model.direction = mixer.directions[0]
            state = flops.state_bytes(model, 1024)
            cells[0].append("-" if state is None else f"{(state - 4) / 1024:,.0f}")
            cells[1].append(f"{mixer.flops_per_token(getattr(model, family), model.d_model, 1024) / 1e6:.2f}")
        print(f"| `{family}` | {' / '.join(cells[0])} | {' / '.join(cells[1])} |")


if __name__ == "__main__":
    draw(ROOT / "docs" / "gates.png")
    costs()
