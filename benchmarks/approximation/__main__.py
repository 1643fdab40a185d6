"""The command: `python -m benchmarks.approximation --help`."""

import argparse
import json

from benchmarks import approximation, record
from benchmarks.approximation import forms, inputs, ranks, report
from zoo import compile_cache
from zoo.errors import UsageError, exit_with_message
from zoo.mixers import BIDIRECTIONAL, CAUSAL
from zoo.settings import argument

NAME = "approximation"
HEADS, WIDTH, LENGTHS, SEQUENCES = 2, 16, (64, 256, 1024), 3
GAUSSIAN = {"gaussian": ("Gaussian q, k, v of unit length", 1.0), "half": ("Gaussian, q and k at half length", 0.5)}


def compared(
    what: str, sequences: list[inputs.Inputs], lengths: tuple[int, ...], directions: list[str], all_sizes: bool = True
) -> dict:
    """What is kept of one set of sequences: all sizes at the longest length, and the usual ones at the others."""
    rows = []
    for direction in directions:
        for length in lengths:
            print(f"{what}, {direction}, {length} tokens", flush=True)
            rows += forms.measured(sequences, direction, length, all_sizes and length == max(lengths))
    whole = [of.first(max(lengths)) for of in sequences]
    _, heads, width = whole[0].q.shape
    return {
        "what": what,
        "heads": heads,
        "width": width,
        "exponent": sum(of.exponent() for of in whole) / len(whole),
        "rows": rows,
        "ranks": ranks.measured(whole),
    }


def gaussian(lengths: tuple[int, ...], sequences: int, all_sizes: bool = True) -> dict[str, dict]:
    found = {}
    for name, (what, scale) in GAUSSIAN.items():
        drawn = [inputs.gaussian(max(lengths), HEADS, WIDTH, scale, seed) for seed in range(sequences)]
        found[name] = compared(f"{what}, heads of {WIDTH}", drawn, lengths, [BIDIRECTIONAL], all_sizes)
    return found


def trained(workdir: str, layer: int) -> dict:
    sequences, what = inputs.trained(workdir, layer, SEQUENCES)
    length = len(sequences[0].q)
    lengths = tuple(sorted({max(length // 4, 1), max(length // 2, 1), length}))
    return compared(f"Trained: {what}", sequences, lengths, [BIDIRECTIONAL, CAUSAL])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.approximation",
        description=approximation.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--workdir", default="", help="of a trained run with softmax attention; default: Gaussian q, k, v alone")
    add("--layer", type=argument(int, at_least=0), default=1, help="of that run's model, from 0")
    add("--quick", action="store_true", help="one size of each at 32 tokens, to see that it runs; not kept")
    add("--table", action="store_true", help="Markdown of what is kept; nothing runs")
    args = parser.parse_args(argv)
    path = record.path(NAME)
    kept = json.loads(path.read_text())["inputs"] if path.exists() and not args.quick else {}
    if args.table:
        if not kept:
            raise UsageError(f"--table: nothing is kept in {path.name}; run the command without it first")
    elif args.quick:
        kept = gaussian((32,), 1, all_sizes=False)
    else:
        compile_cache.enable()
        of_run = {"trained": trained(args.workdir, args.layer)} if args.workdir else {}
        kept |= gaussian(LENGTHS, SEQUENCES) | of_run
        record.write(NAME, {"inputs": kept})
        picture = record.RESULTS / f"{NAME}.png"
        report.draw(kept, picture)
        print(f"written to {picture.relative_to(record.RESULTS.parent.parent)}")
    print(*report.tables(kept), sep="\n")


if __name__ == "__main__":
    with exit_with_message():
        main()
