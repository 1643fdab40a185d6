"""All families side by side: `python -m benchmarks.zoo [--size=tiny] [--families=gla,mamba] [--workdir=runs/zoo]`.

For each family, by its config in `configs/`: tokens/s in training and validation bits per byte after the same number of
tokens of the embedded corpus; tokens/s in decoding with 128, 1K, 16K and 128K tokens behind, of one sequence; state
bytes there. One table, one plot, and JSON in benchmarks/results/.

    --steps     of training (60 at tiny: 30 minutes for all on 2 cores; a comparison of quality wants more)
    --decode    measure decoding again, of what is trained already
    --ablation  GLA's gate instead: none, fixed, one a head, one a key dimension; three seeds each
    --kin       softmax attention and what approximates or reshapes it instead, and linear attention, three seeds each.
                Without linformer and rala: they see what follows, so that they have no bits per byte

A run that was stopped goes on where it was when the command is repeated.
"""

import argparse
import copy
import json
import pathlib
import statistics
import time

import jax
import jax.numpy as jnp

from benchmarks import record
from benchmarks.decode import STEPS, decoder, state_at
from zoo import checkpoints, compile_cache, flops, plots
from zoo.config import Config, from_json
from zoo.config_files import family_config
from zoo.files import expand
from zoo.mixers import CAUSAL_MIXERS
from zoo.mixers.linear.gla import GATES
from zoo.model import LanguageModel
from zoo.settings import argument
from zoo.training import train

POSITIONS = (128, 1024, 16 * 1024, 128 * 1024)  # tokens before those that are decoded
SEEDS = (0, 1, 2)
KIN = (
    "attention", "forgetting_attention", "longformer", "performer", "based", "transnormer", "conv_linear",
    "linear_attention",
)  # fmt: skip


def config_of(family: str, size: str, steps: int) -> Config:
    config = family_config(family, size)
    config.train.steps = steps
    config.eval.every = config.checkpoint.every = steps
    config.eval.final_batches = config.eval.batches
    config.optimizer.warmup_steps = min(config.optimizer.warmup_steps, steps)
    config.metrics.tensorboard = False
    return config


def trained(config: Config, workdir: pathlib.Path, init_from: str = "") -> dict:
    """Train, or go on, or read what a finished run says of itself."""
    try:
        summary = json.loads((workdir / "summary.json").read_text())
        saved = from_json((workdir / "config.json").read_text())
        if summary.get("step") == saved.train.steps == config.train.steps:
            return summary
    except (OSError, json.JSONDecodeError):
        pass
    summary = train(config, workdir, init_from=init_from)
    if "stopped_at" in summary:
        raise SystemExit(f"stopped; repeat the command to go on with {workdir}")
    return summary


def decode_speeds(model: LanguageModel, rounds: int = 15) -> dict[str, float]:
    """Tokens a second of one sequence, by the tokens behind it: median of `rounds` calls of `STEPS` tokens.

    Positions take turns, so that a slow moment of the machine falls on all of them. States and caches are put at the
    position, not filled: what a token costs does not depend on what they hold.
    """
    decode = decoder(model)
    room = (rounds + 1) * STEPS
    carried = {n: (state_at(model, 1, n, room), jnp.zeros((1, 1), jnp.int32)) for n in POSITIONS}
    seconds = {n: [] for n in POSITIONS}
    for _ in range(rounds + 1):  # the first compiles and warms up
        for n in POSITIONS:
            begin = time.perf_counter()
            carried[n] = jax.block_until_ready(decode(*carried[n]))
            seconds[n].append(time.perf_counter() - begin)
    return {str(n): STEPS / statistics.median(seconds[n][1:]) for n in POSITIONS}


def measure(family: str, size: str, steps: int, workdir: pathlib.Path, decode_again: bool = False) -> dict:
    """One row; it is kept in the family's folder. Training is never measured twice, decoding if asked to.

    What was measured at other positions than `POSITIONS` is measured again by itself.
    """
    kept = workdir / "row.json"
    row = json.loads(kept.read_text()) if kept.exists() else {}
    if not row:
        summary = trained(config_of(family, size, steps), workdir)
        row = {
            "family": family,
            "parameters": summary["parameters"],
            "tokens": summary["tokens"],
            "train_tokens_per_second": summary["tokens"] / summary["seconds"],
            "bits_per_byte": summary["eval_bits_per_byte"],
        }
    if decode_again or list(row.get("decode_tokens_per_second", ())) != [str(n) for n in POSITIONS]:
        run = checkpoints.load_run(workdir)
        row["decode_tokens_per_second"] = decode_speeds(run.model)
        row["state_bytes"] = {str(n): flops.state_bytes(run.config.model, n) for n in POSITIONS}
        kept.write_text(json.dumps(row, indent=1) + "\n")
    return row


def label(tokens: int) -> str:
    return str(tokens) if tokens < 1024 else f"{tokens // 1024}K"


HEADER = (
    f"{'family':18}{'parameters':>11}{'bits/byte':>10}{'train tok/s':>12}"
    + "".join(f"{f'decode {label(n)}':>13}" for n in POSITIONS)
    + "".join(f"{f'state {label(n)}':>13}" for n in (POSITIONS[0], POSITIONS[-1]))
)


def line(row: dict) -> str:
    decode, state = row["decode_tokens_per_second"], row["state_bytes"]
    return (
        f"{row['family']:18}{row['parameters']:>11,}{row['bits_per_byte']:>10.3f}{row['train_tokens_per_second']:>12,.0f}"
        + "".join(f"{decode[str(n)]:>13,.0f}" for n in POSITIONS)
        + "".join(f"{state[str(n)]:>13,}" for n in (POSITIONS[0], POSITIONS[-1]))
    )


def side_by_side(families: list[str], size: str, steps: int, workdir: pathlib.Path, decode_again: bool = False):
    rows = []
    for number, family in enumerate(families):
        print(f"[{number + 1}/{len(families)}] {family}", flush=True)
        rows.append(measure(family, size, steps, workdir / family, decode_again))
    rows.sort(key=lambda row: row["bits_per_byte"])
    print(f"\n{HEADER}\n" + "\n".join(map(line, rows)))
    plots.side_by_side(rows, POSITIONS, workdir / "zoo.png")
    print(f"written to {workdir / 'zoo.png'}")
    if families == list(CAUSAL_MIXERS):
        record.write(f"zoo_{size}", {"steps": steps, "rows": rows})


def over_seeds(configs: dict[str, Config], workdir: pathlib.Path, kept: str, what: str) -> None:
    """Bits per byte of each config by its name, over `SEEDS`; data and number of steps are the same. Kept as `kept`.

    Args:
      what: the names are of, such as "gate".
    """
    rows, runs = [], len(configs) * len(SEEDS)
    for name, config in configs.items():
        found = []
        for seed in SEEDS:
            print(f"[{len(rows) * len(SEEDS) + len(found) + 1}/{runs}] {what} {name}, seed {seed}", flush=True)
            of_seed = copy.deepcopy(config)
            of_seed.train.seed = seed
            found.append(trained(of_seed, workdir / f"{what}_{name}_{seed}"))
        rows.append(
            {
                what: name,
                "parameters": found[0]["parameters"],
                "bits_per_byte": [summary["eval_bits_per_byte"] for summary in found],
            }
        )
    print(f"\n{what:22}{'parameters':>12}{'bits/byte, median':>20}{'range':>20}")
    for row in rows:
        low, *_, high = sorted(row["bits_per_byte"])
        median = statistics.median(row["bits_per_byte"])
        print(f"{row[what]:22}{row['parameters']:>12,}{median:>20.4f}{f'{low:.4f} - {high:.4f}':>20}")
    record.write(kept, {"steps": config.train.steps, "rows": rows})


def gates(size: str, steps: int) -> dict[str, Config]:
    """GLA with less and less of a gate."""
    configs = {gate: config_of("gla", size, steps) for gate in GATES}
    for gate, config in configs.items():
        config.model.gla.gate = gate
    return configs


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="tiny")
    parser.add_argument("--families", default=",".join(CAUSAL_MIXERS), help="comma-separated; all by default")
    parser.add_argument("--steps", type=argument(int, unit="step"), default=60)
    parser.add_argument("--workdir", type=lambda path: pathlib.Path(expand(path)), default=pathlib.Path("runs/zoo"))
    parser.add_argument("--decode", action="store_true")
    over = parser.add_mutually_exclusive_group()
    over.add_argument("--ablation", action="store_true")
    over.add_argument("--kin", action="store_true")
    args = parser.parse_args()
    families = args.families.split(",")
    if unknown := [family for family in families if family not in CAUSAL_MIXERS]:
        parser.error(f"unknown family {unknown[0]!r}; expected some of {', '.join(CAUSAL_MIXERS)}")
    compile_cache.enable()
    workdir = args.workdir / f"{args.size}_{args.steps}_steps"
    workdir.mkdir(parents=True, exist_ok=True)
    if args.ablation:
        over_seeds(gates(args.size, args.steps), workdir, f"gla_gates_{args.size}", "gate")
    elif args.kin:
        configs = {name: config_of(name, args.size, args.steps) for name in KIN}
        over_seeds(configs, workdir, f"kin_{args.size}", "family")
    else:
        side_by_side(families, args.size, args.steps, workdir, args.decode)


if __name__ == "__main__":
    main()
