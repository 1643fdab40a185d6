r"""The training step of every family and size, compiled for TPUs that are not there: `python -m benchmarks.aot`.

Each row is `python train.py --aot=TOPOLOGY --config=...` in a process of its own, with a vocabulary of 32,000 unless
the config has one. Kept in benchmarks/results/aot.json after each row; rows that stand there are not done again, so a
command that was stopped goes on. 1.3b is compiled for v5e:4x4, larger ones for v5p; a smaller size is tried on the
topologies of `LADDER` until it fits. What does not fit is kept too, with the numbers. At the end the table of all rows,
as docs/scaling.md has it.

    --rows=gla:1.3b,8x8x8   rows whose text contains one of these
    --again                 compile them again
    --table                 only print what is there

Minutes a row, hours for all. Needs libtpu (pip install 'jax[tpu]'). No TPU.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys

from benchmarks import record
from zoo import config as zoo_config
from zoo import config_files, flops, roofline

RESULTS = record.RESULTS / "aot.json"
LADDER = ("v5e:2x2", "v5e:4x4", "v5p:2x2x2", "v5p:4x4x4", "v5p:8x8x8")
SECONDS = 1800
IN_COLUMNS = ("mesh.", "train.", "model.vocab_size")  # of the table, or the same for all
# Families without a preset of 8b: GPT-3's width of 6.7b, four more layers, a larger vocabulary.
EIGHT = {"model.num_layers": 36, "model.d_model": 4096, "model.vocab_size": 128_000}
EIGHT_B = {
    "mamba2_hybrid:8b": {},
    "gla:1.3b": EIGHT | {"model.gla.num_heads": 8},
    "transformer:1.3b": EIGHT | {"model.attention.num_heads": 32},
}
TOO_LARGE = (  # of which 16 sequences of 2,048 a chip do not fit a v5e, at 1.3b
    *("based", "dfw", "gated_delta_net_hybrid", "h3", "h3_hybrid", "kda_hybrid", "linformer", "mamba2_hybrid"),
    *("performer", "s4d", "transnormer"),
)
LONG = ("gla:1.3b", "transformer:1.3b")  # of which contexts of 8,192 to 1,048,576 tokens are compiled


@dataclasses.dataclass(frozen=True)
class Row:
    config: str
    topologies: tuple[str, ...]  # tried in turn until one fits
    settings: tuple[tuple[str, object], ...] = ()

    @property
    def name(self) -> str:
        """What it is kept under, and what is typed after --aot=TOPOLOGY."""
        return " ".join([f"--config={self.config}", *(f"--config.{name}={value}" for name, value in self.settings)])

    @property
    def key(self) -> str:
        """In what is kept: with the topology, where there is one alone."""
        return f"{self.topologies[0]} {self.name}" if len(self.topologies) == 1 else self.name


def rows() -> list[Row]:
    """The ones that docs/scaling.md speaks of first."""

    def row(config, topologies, **settings):
        return Row(config, tuple(topologies), tuple({k.replace("__", "."): v for k, v in settings.items()}.items()))

    families = config_files.shipped()
    large = [row(f"{name}:1.3b", ["v5e:4x4"], model__vocab_size=32_000, mesh__fsdp=16) for name in families]
    wide_heads = {"model__vocab_size": 32_000, "model__attention__num_heads": 16, "mesh__fsdp": 16}  # of 128, not 64
    large.append(row("transformer:1.3b", ["v5e:4x4"], **wide_heads))
    large += [row(f"{name}:1.3b", ["v5p:4x4x4"], model__vocab_size=32_000, mesh__fsdp=64) for name in TOO_LARGE]
    eight = []
    for config, settings in EIGHT_B.items():
        flags = {name.replace(".", "__"): value for name, value in settings.items()}
        eight.append(row(config, ["v5p:4x4x4"], mesh__fsdp=64, **flags))
        eight.append(row(config, ["v5p:4x4x4"], mesh__fsdp=32, mesh__tensor=2, **flags))
        eight.append(row(config, ["v5p:8x8x8"], mesh__fsdp=64, mesh__tensor=8, **flags))
        batch = {"train__batch_size": 512, "train__context_length": 4096}
        eight.append(row(config, ["v5p:8x8x8"], mesh__data=16, mesh__fsdp=32, **batch, **flags))
    contexts = []
    for config in LONG:
        for context, sequences, axis in ((8192, 64, 1), (32768, 16, 4), (131_072, 4, 16), (1_048_576, 1, 64)):
            batch = {"train__batch_size": sequences, "train__context_length": context}
            mesh = {"mesh__fsdp": min(16, 64 // axis), "mesh__sequence": axis}
            contexts.append(row(config, ["v5p:4x4x4"], model__vocab_size=32_000, **batch, **mesh))
    others = [
        row(f"{name}:{size}", LADDER[start:], model__vocab_size=32_000, mesh__fsdp=-1, mesh__data=1)
        for size, start in (
            ("340m", 2),
            ("125m", 2),
            ("10m", 0),
            ("tiny", 0),
        )  # 16 sequences a chip are too much for v5e
        for name in families
    ]
    return [*large, *eight, *contexts, *others]


def measure(row: Row) -> dict:
    """The first topology that it fits, or the last; what was tried before it under `smaller`."""
    smaller = {}
    for topology in row.topologies:
        command = [sys.executable, "-m", "benchmarks.aot", f"--one={topology}", *row.name.split()]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
        except subprocess.TimeoutExpired:
            found = {"topology": topology, "error": f"not compiled within {SECONDS} s"}
        else:
            said = (done.stderr.strip().splitlines() or [f"ended with {done.returncode}"])[-1]
            failed = {"topology": topology, "error": said[:300]}
            found = failed if done.returncode else json.loads(done.stdout.strip().splitlines()[-1])
        if found.get("fits"):
            break
        smaller[topology] = found.get("statement") or found["error"]
    smaller.pop(found["topology"], None)
    return {"config": row.config, "settings": dict(row.settings)} | found | {"smaller": smaller}


def one(topology: str, arguments: list[str]) -> None:
    """Print a row's numbers as a line of JSON."""
    from absl import flags as absl_flags

    from zoo.errors import exit_with_message
    from zoo.training import aot, command_line

    with exit_with_message():
        command_line.define_and_parse(["aot", *arguments])
        config = absl_flags.FLAGS.config
        zoo_config.validate(config)
        config = command_line.settle_vocabulary(config, None)
        report = aot.compile_step(config, topology)
        values = {name: value for name, value in dataclasses.asdict(report).items() if name != "estimate"}
        values |= {"fits": report.fits, "statement": aot.statement(report)}
        if estimate := report.estimate:
            by_compiler = report.by_compiler
            values |= {"estimate": estimate._asdict(), "step": estimate.step}
            values |= {"mfu": report.mfu(estimate.step), "mfu_by_compiler": by_compiler and report.mfu(by_compiler)}
        values["parameters"] = flops.num_parameters(config.model)
        values["batch"] = [config.train.batch_size, config.train.context_length]
        print(json.dumps(values))


def table(results: dict[str, dict]):
    yield "| config | topology | mesh | tokens a step | GiB of | step, ms | MFU, at most | by XLA's costs | bound by |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for row in results.values():
        sizes = ", ".join(f"{axis} {size}" for axis, size in row.get("mesh", {}).items() if size > 1)
        tokens = " x ".join(f"{n:,}" for n in row.get("batch", []))
        shown = {name: value for name, value in row["settings"].items() if not name.startswith(IN_COLUMNS)}
        config = ", ".join(
            [f"`{row['config']}`", *(f"{name.partition('.')[2]} {value}" for name, value in shown.items())]
        )
        start = f"| {config} | {row['topology']} | {sizes} | {tokens} |"
        if "mfu" not in row:
            yield f"{start} {row.get('statement') or row['error']} | | | | |"
            continue
        memory = f"{row['needed'] / 2**30:.1f} of {row['has'] / 2**30:.1f}" + ("" if row["fits"] else ": too much")
        bound = roofline.Estimate(**row["estimate"]).bound()
        by_compiler = f"{row['mfu_by_compiler']:.0%}" if row["mfu_by_compiler"] else "-"
        yield f"{start} {memory} | {1e3 * row['step']:,.0f} | {row['mfu']:.0%} | {by_compiler} | {bound} |"


def main():
    if any(argument.startswith("--one=") for argument in sys.argv):
        return one(sys.argv[1].removeprefix("--one="), sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="", help="rows whose text contains one of these")
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--table", action="store_true")
    flags = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    results = json.loads(RESULTS.read_text())["results"] if RESULTS.exists() else {}
    wanted = [row for row in rows() if any(part in f"{row.name} {row.topologies}" for part in flags.rows.split(","))]
    for row in wanted if not flags.table else ():
        key = row.key
        if key in results and not flags.again:
            continue
        found = measure(row)
        if "error" in found:  # a limit of time or memory of this machine: not a row, and tried again next time
            print(f"{key}: {found['error']}", file=sys.stderr, flush=True)
            continue
        results[key] = found
        RESULTS.write_text(json.dumps(record.environment() | {"results": results}, indent=1) + "\n")
        print(list(table({key: results[key]}))[-1], flush=True)
    listed = [row.key for row in rows() if row.key in results]
    print("\n".join(table({key: results[key] for key in listed})))


if __name__ == "__main__":
    main()
