"""What a token costs beside what it must: `python -m benchmarks.decode [--families=gla,...] [--behind=...]`.

A step reads the parameters once, and of each sequence reads and writes the recurrent state, or reads the keys and
values behind it and writes its own. Its floor is these bytes at the rate of a memory copy, or its matrix products at
the rate of a matrix product, whichever takes longer; both rates are measured in turn with the model. Weights are
random: nothing here depends on them. A state of more than --largest_state bytes is left out.

What was measured is kept family by family in benchmarks/results/decode_<size>.<platform>.json; --kept prints the table
of it. All families take 6 minutes with --rounds=5, and should have the machine to themselves.
"""

import argparse
import datetime
import functools
import json
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks import measure, record
from benchmarks.approximation.report import markdown
from zoo import compile_cache, flops
from zoo.config import ModelConfig
from zoo.config_files import family_config
from zoo.figures import Table
from zoo.generate.decoding import units_apart
from zoo.mixers import CAUSAL_MIXERS, Mixer
from zoo.mixers.linear.transnormer import TransNormer
from zoo.mixers.softmax.longformer import Longformer
from zoo.model import LanguageModel
from zoo.settings import argument

STEPS = 16  # tokens a call, as in zoo.generate
COPIED = 256 << 20  # bytes: beyond what a core's caches hold
WIDTH = 1024  # of the matrix product
VOCAB = 1024


def build(family: str, size: str) -> tuple[LanguageModel, ModelConfig]:
    config = family_config(family, size).model
    config.vocab_size = VOCAB
    return LanguageModel(config, rngs=nnx.Rngs(0)), config


def decoder(model: LanguageModel) -> Callable:
    """(state, token) -> the same, `STEPS` tokens later."""
    graphdef, parameters = nnx.split(model)

    @functools.partial(jax.jit, donate_argnums=2)
    def decode(parameters, units, state, token):
        model = nnx.merge(graphdef, parameters)

        def step(carry, _):
            state, token = carry
            logits, state = model(token, state=state, units=units)
            return (state, jnp.argmax(logits, axis=-1).astype(jnp.int32)), None

        return jax.lax.scan(step, (state, token), length=STEPS)[0]

    return functools.partial(decode, parameters, units_apart(graphdef, parameters))


def state_at(model: LanguageModel, batch: int, behind: int, room: int):
    """A state of zeros with `behind` tokens counted and room for as many more: what it holds costs nothing."""

    def move(path, leaf):
        counts = path[-1] in (jax.tree_util.DictKey("position"), jax.tree_util.DictKey("index"))
        return jnp.full_like(leaf, behind) if counts else leaf

    return jax.tree_util.tree_map_with_path(move, model.init_state(batch, behind + room))


def bytes_of_a_step(model: LanguageModel, state, behind: int) -> int:
    """Read and written by one token of each sequence, of a state what its layer uses."""
    parameters = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    parameters -= 0 if model.head.tied else model.embed.embedding[...].nbytes
    parameters -= model.position_embed.embedding[...].nbytes if model.learned_positions else 0
    of_layers = [block for unit in state["layers"] for block in unit]
    moved = sum(2 * leaf.nbytes for leaf in jax.tree.leaves(state | {"layers": None}))
    for number, of_layer in enumerate(of_layers):
        mixer = model.units.blocks[number % len(model.pattern)].mixer
        share = _shares(mixer, 2 * number >= len(of_layers))
        for path, leaf in jax.tree.leaves_with_path(of_layer):
            name = getattr(path[-1], "key", None)
            is_cache = name in ("k", "v") and leaf.ndim == 4
            times = min(1, behind / leaf.shape[2]) if is_cache else 2
            moved += leaf.nbytes * times * share.get(name, 1)
    return int(parameters + moved)


def _shares(mixer: Mixer, is_upper: bool) -> dict[str, float]:
    """Of a state's arrays, what a layer in the lower or upper half uses, where that is not all."""
    if isinstance(mixer, TransNormer):
        is_norm = is_upper if mixer.kind == "depth" else mixer.kind == "norm"
        return {"k": 0, "v": 0} if is_norm else {"S": 0}
    return dict.fromkeys(("k", "v"), mixer.window / mixer.slots) if isinstance(mixer, Longformer) else {}


def measured(functions: dict, rounds: int) -> dict[str, list[float]]:
    """Seconds of each call, the functions in turn; the first call of each, which compiles, does not count."""
    seconds = {name: [] for name in functions}
    for turn in range(rounds + 1):
        for name, function in functions.items():
            begin = time.perf_counter()
            jax.block_until_ready(function())
            if turn:
                seconds[name].append(time.perf_counter() - begin)
    return seconds


def family_rows(family: str, size: str, behind: list[int], batches: list[int], rounds: int, largest: int) -> list[dict]:
    """A row for each number of tokens behind and each batch."""
    model, config = build(family, size)
    decode = decoder(model)
    source, target = np.ones(COPIED, np.uint8), np.empty(COPIED, np.uint8)
    multiply, operations = measure.matmul(WIDTH)
    rows = []
    for batch in batches:
        for n in behind:
            room = (rounds + 1) * STEPS
            if batch * flops.state_bytes(config, n + room) > largest:
                continue
            carried = [state_at(model, batch, n, room), jnp.zeros((batch, 1), jnp.int32)]
            moved = bytes_of_a_step(model, carried[0], n)

            def step(carried=carried):
                carried[:] = decode(*carried)
                return carried[1]

            def copy():
                np.copyto(target, source)

            seconds = measured({"step": step, "copy": copy, "multiply": multiply}, rounds)
            row = {"family": family, "batch": batch, "behind": n, "bytes": moved}
            # The best of each is nearer to the machine where others work on it too.
            for name, of in (("", statistics.median), ("best_", min)):
                taken = {function: of(times) for function, times in seconds.items()}
                memory = moved * taken["copy"] / (2 * COPIED)
                compute = batch * flops.forward_flops_per_token(config, n) * taken["multiply"] / operations
                row |= {
                    f"{name}floor_seconds": max(memory, compute),
                    f"{name}bound": "memory" if memory > compute else "compute",
                    f"{name}seconds": taken["step"] / STEPS,
                    f"{name}copy_gb_per_second": 2 * COPIED / taken["copy"] / 1e9,
                    f"{name}multiply_gflops": operations / taken["multiply"] / 1e9,
                }
            rows.append(row)
            print(line(rows[-1]), flush=True)
    return rows


HEADER = (
    f"{'family':20}{'batch':>6}{'behind':>8}{'MB':>9}{'floor ms':>10}{'':>9}{'ms':>9}{'of floor':>9}{'best':>7}"
    f"{'tokens/s':>10}{'copy GB/s':>11}"
)


def line(row: dict) -> str:
    return (
        f"{row['family']:20}{row['batch']:>6}{row['behind']:>8}{row['bytes'] / 1e6:>9.1f}"
        f"{1e3 * row['floor_seconds']:>10.2f}{row['bound']:>9}{1e3 * row['seconds']:>9.2f}"
        f"{row['seconds'] / row['floor_seconds']:>9.2f}{row['best_seconds'] / row['best_floor_seconds']:>7.2f}"
        f"{row['batch'] / row['seconds']:>10,.0f}{row['copy_gb_per_second']:>11.1f}"
    )


def table(rows: list[dict]) -> str:
    """Of each family tokens/s of one sequence, and for each batch its time over the floor, by the tokens behind it."""
    behind, batches = (sorted({row[name] for row in rows}) for name in ("behind", "batch"))
    found = {(row["family"], row["batch"], row["behind"]): row for row in rows}
    of_behind = ", ".join(f"{n:,}" for n in behind)
    lines = []
    for family in dict.fromkeys(row["family"] for row in rows):
        cells = [family, *("-" for _ in behind)]
        for i, n in enumerate(behind, 1):
            if row := found.get((family, batches[0], n)):
                cells[i] = f"{row['batch'] / row['seconds']:,.0f}"
        for batch in batches:
            of = [found.get((family, batch, n)) for n in behind]
            cells.append(
                ", ".join("-" if row is None else f"{row['seconds'] / row['floor_seconds']:.2f}" for row in of)
            )
        lines.append(cells)
    headings = [
        "mixer",
        *(f"tokens/s, {n:,} behind" for n in behind),
        *(f"of floor, batch {batch}" for batch in batches),
    ]
    return markdown(Table(f"Of floor after {of_behind} tokens", headings, lines, texts=1))


def numbers(text: str) -> list[int]:
    return [argument(int, at_least=1)(number) for number in text.split(",")]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="tiny")
    parser.add_argument("--families", default=",".join(CAUSAL_MIXERS), help="comma-separated; all by default")
    parser.add_argument("--behind", type=numbers, default=[128, 1024, 16 * 1024], help="tokens behind the one measured")
    parser.add_argument("--batch", type=numbers, default=[1, 8, 64], help="sequences")
    parser.add_argument("--rounds", type=argument(int, at_least=3), default=9, help="calls measured of each")
    parser.add_argument("--largest_state", type=argument(int, at_least=1), default=4 << 30, help="bytes")
    parser.add_argument("--kept", action="store_true", help="measure nothing")
    args = parser.parse_args()
    families = args.families.split(",")
    if unknown := [family for family in families if family not in CAUSAL_MIXERS]:
        parser.error(f"unknown family {unknown[0]!r}; expected some of {', '.join(CAUSAL_MIXERS)}")
    name, found = f"decode_{args.size}", {}
    if (path := record.path(name)).exists():
        found = json.loads(path.read_text())["rows"]
    if not args.kept:
        compile_cache.enable()
        print(HEADER)
        for family in families:
            of_family = family_rows(family, args.size, args.behind, args.batch, args.rounds, args.largest_state)
            found[family] = [row | {"date": datetime.date.today().isoformat()} for row in of_family]
            record.write(name, {"steps_per_call": STEPS, "rows": found})
    if rows := [row for family in families for row in found.get(family, ())]:
        print("", table(rows), sep="\n")


if __name__ == "__main__":
    main()
