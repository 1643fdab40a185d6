"""What is left of a softmax model with other mixers: `python -m benchmarks.linearize text | mqar`.

text: transformer:tiny on the embedded text, trained as `make demo DEMO=transformer:tiny` is and four times as long,
  then linearized with a fifth of its tokens to each of `MIXERS`, three ways: the mixers alone and then the logits
  (both), the logits alone, and from scratch, without the teacher. Bits per byte beside the teacher's, on the same rows.
mqar: a model of four layers of softmax attention that recalls (arXiv:2312.04927), then linearized (both) with 0, 1, 2
  and 3 of them left, which stand evenly or are those that `python -m zoo.linearize importance` chooses by recall. Some
  seeds do not learn to recall in that budget: the first that do are teachers, and the command says which do not.

Every seed has a teacher of its own. What ended is kept in benchmarks/results/ with its date and machine, and is not
repeated by the same command (--again does); what was stopped goes on where it was. --kept runs nothing: the table, and
what did not come out as it should, of what is kept. On one core text takes 70 minutes with --budgets=1 and 200
with --budgets=4 (beside other work), and mqar 40.
"""

import argparse
import copy
import json
import pathlib
import shutil
import statistics
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from benchmarks import record
from benchmarks.approximation.report import markdown
from benchmarks.zoo import config_of, trained
from zoo import compile_cache, plots
from zoo.config import Config, leaves, preset
from zoo.errors import UsageError, exit_with_message
from zoo.figures import Chart, Line, Table, shown
from zoo.files import expand
from zoo.linearize import importance, settled_width
from zoo.linearize.__main__ import main as command
from zoo.settings import argument

NAME = "linearize"
SHARE = 0.2  # of the teacher's tokens
MIXERS_SHARE = 0.4  # of those, the mixers alone
WITHIN = {False: 0.06, True: 0.03}  # of the teacher's bits per byte; True: where softmax layers stay
METHODS = ("both", "logits", "scratch")
_GLA, _DELTA = "gla@num_heads=4@expand_k=1@biases=output_gate", "gated_delta_net@num_heads=4@expand_k=1@expand_v=1"
MIXERS = {
    "gla": _GLA,
    "gated_delta_net": _DELTA,
    "mamba2": "mamba2@expand=1@groups=4@state_dim=64",
    "performer": "performer",
    "gla,gla,attention": f"{_GLA},{_GLA},attention",
    "gated_delta_net,gated_delta_net,attention": f"{_DELTA},{_DELTA},attention",
}
RECALLING = {
    "gla": "gla@num_heads=1@expand_k=1@biases=output_gate",
    "gated_delta_net": "gated_delta_net@num_heads=1@expand_k=1@expand_v=1",
}
LAYERS, TASK = 4, "mqar?vocab_size=256&pairs=8"
RECALLS, TRIED = 0.95, 5  # a teacher's accuracy; seeds tried for one that reaches it


class Recipe(NamedTuple):
    """Of a stage: its optimizer, its learning rate beside the teacher's, rows of a step."""

    optimizer: str
    rate: float
    rows: int


# Of text, where a fifth of the tokens is 36 of the teacher's steps, too few for new mixers: the best of what was tried,
# no full grid, at 1x, mostly with gla and seeds 0 and 1: 1, 2 and 8 rows a step, muon and adamw. From scratch has its
# own best, and at 4x as many steps: there muon updates all parameters, which takes most of the time.
RECIPES = {
    ("text", "mixers"): Recipe("muon", 2.0, 1),
    ("text", "logits"): Recipe("adamw", 0.07, 1),
    ("text", "scratch"): Recipe("muon", 0.3, 1),
    ("mqar", "mixers"): Recipe("adamw", 1.0, 32),
    ("mqar", "logits"): Recipe("adamw", 0.3, 32),
}


class Case(NamedTuple):
    """One model. `mixer` names a pattern; `how` is one of METHODS, or which layers stay softmax."""

    task: str  # text or mqar
    budget: int  # of the teacher's training, in demos
    mixer: str
    how: str
    stay: int = 0  # of mqar, so many layers
    seed: int = 0

    @property
    def name(self) -> str:
        size = f"{self.budget}x" if self.task == "text" else f"{self.stay}"
        return f"{self.task} {size} {self.mixer} {self.how} {self.seed}"


class Stage(NamedTuple):
    """A run. Without `init_from` it begins anew."""

    config: Config
    workdir: pathlib.Path
    init_from: str = ""


def teacher(task: str, budget: int, seed: int, folder: pathlib.Path) -> Stage:
    if task == "text":
        config = config_of("attention", "tiny", budget * preset("tiny").train.steps)
    else:
        config = config_of("attention", "tiny", 1600)
        model, optimizer = config.model, config.optimizer
        model.num_layers, model.d_model, model.attention.num_heads = LAYERS, 64, 1
        model.mlp, model.positions, model.max_positions = "none", "learned", 64
        config.data.source, config.train.context_length, config.train.batch_size = TASK, 64, 32
        config.eval.batches = config.eval.final_batches = 0
        optimizer.name, optimizer.learning_rate, optimizer.warmup_steps = "adamw", 2e-3, 100
        optimizer.final_fraction = 0.0
    config.train.seed = seed
    return Stage(config, folder / _in_folder("teacher", config))


def stages(case: Case, how: str, of: Stage, pattern: str, folder: pathlib.Path) -> list[Stage]:
    """The runs that make a linearized model of a teacher. `how`: one of METHODS."""
    if how == "scratch":
        recipe = RECIPES[case.task, how]
        config = _changed(of.config, pattern, SHARE, recipe._replace(rows=recipe.rows * case.budget))
        return [Stage(config, folder / _in_folder(how, config))]
    alone = MIXERS_SHARE * SHARE if how == "both" else 0.0
    found, before = [], of.workdir
    for stage, share in (("mixers", alone), ("logits", SHARE - alone)):
        if share:
            config = _changed(of.config, pattern, share, RECIPES[case.task, stage])
            distill = config.train.distill
            distill.teacher, distill.stage, distill.tokens_weight = str(of.workdir), stage, 0.5
            found.append(Stage(config, folder / _in_folder(stage, config), str(before)))
            before = found[-1].workdir
    return found


def _changed(config: Config, pattern: str, share: float, recipe: Recipe) -> Config:
    """The teacher's configuration, for a share of its tokens; evaluated on the same rows."""
    changed = copy.deepcopy(config)
    steps = round(share * config.train.steps * config.train.batch_size / recipe.rows)
    changed.model.mixer, changed.train.steps, changed.train.batch_size = pattern, steps, recipe.rows
    changed.model.d_ff = settled_width(config.model, changed.model)  # from scratch, too
    changed.eval.every = changed.checkpoint.every = steps
    changed.eval.batch_size = config.eval.batch_size or config.train.batch_size
    changed.optimizer.name = recipe.optimizer
    changed.optimizer.learning_rate *= recipe.rate
    changed.optimizer.warmup_steps = min(changed.optimizer.warmup_steps, steps // 4)
    return changed


def _said(config: Config) -> str:
    """What a result depends on: the settings that are not the default, but for paths."""
    default, own = leaves(Config()), leaves(config)
    names = [name for name in own if own[name] != default[name] and name != "train.distill.teacher"]
    return " ".join(f"{name}={own[name]}" for name in names)


def _in_folder(stage: str, config: Config) -> str:
    return f"{stage}_{zlib.crc32(_said(config).encode()):08x}"


# --- Runs -------------------------------------------------------------------------------------------------------------


def of_teacher(task: str, budget: int, seed: int = 0) -> Case:
    return Case(task, budget, "attention", "teacher", LAYERS, seed)


def cases(task: str, budgets: Sequence[int], mixers: Sequence[str], seeds: Sequence[int]) -> list[tuple[Case, str]]:
    """Each with its pattern; "" where the layers that stay are still to be chosen."""
    found = []
    for budget in budgets:
        of = [(of_teacher(task, budget), "attention")]
        for mixer in mixers:
            if task == "text":
                of += [(Case(task, budget, mixer, how), MIXERS[mixer]) for how in METHODS]
                continue
            for stay in range(LAYERS):
                evenly = importance.evenly(range(LAYERS), stay)
                of.append((Case(task, budget, mixer, "spaced", stay), _pattern(mixer, evenly)))
            of += [(Case(task, budget, mixer, "chosen", stay), "") for stay in range(1, LAYERS)]
        found += [(case._replace(seed=seed), pattern) for case, pattern in of for seed in seeds]
    return found


def recalling(count: int, teachers: Callable[[Case], Mapping | None]) -> list[int]:
    """The first seeds whose teachers recall, and in print which do not. `teachers` tells how each did; None: unknown.

    Raises:
      UsageError: none does.
    """
    found, failed = [], []
    for seed in range(TRIED * count):
        if len(found) < count and (of := teachers(of_teacher("mqar", 1, seed))):
            (found if of["eval_accuracy"] >= RECALLS else failed).append(seed)
    if failed:
        print(f"teachers that do not recall, and are left out: of seeds {', '.join(map(str, failed))}", flush=True)
    if failed and not found:
        raise UsageError(f"no teacher recalls {RECALLS:.0%} of {TASK}, of the seeds below {TRIED * count}")
    return found


def _pattern(mixer: str, stay: Iterable[int]) -> str:
    return ",".join("attention" if layer in stay else RECALLING[mixer] for layer in range(LAYERS))


def _chosen(case: Case, of: Stage) -> str:
    """The pattern whose layers `zoo.linearize importance` keeps, after as many steps of the mixers alone."""
    steps = round(SHARE * MIXERS_SHARE * of.config.train.steps)
    flags = [f"--mixer={RECALLING[case.mixer]}", f"--steps={steps}", "--by=recall_loss"]
    output = of.workdir / f"importance-{case.mixer}-{zlib.crc32(' '.join(flags).encode()):08x}.json"
    if not output.exists():
        command(["importance", f"--workdir={of.workdir}", f"--output={output}", *flags])
    return _pattern(case.mixer, json.loads(output.read_text())["order"][: case.stay])


def kept_runs() -> dict[str, dict]:
    path = record.path(NAME)
    return json.loads(path.read_text())["runs"] if path.exists() else {}


def run(case: Case, pattern: str, workdir: pathlib.Path, again: bool = False) -> dict:
    """What is kept of the case, or what its runs come to; folders of what is kept go, but for teachers'."""
    of, kept = teacher(case.task, case.budget, case.seed, workdir), {} if again else kept_runs().get(case.name, {})
    folder = workdir / case.name.replace(" ", "_").replace(",", "-")

    def planned(pattern: str) -> tuple[list[Stage], str]:
        how = case.how if case.how in METHODS else "both"
        chain = [of] if case.how == "teacher" else stages(case, how, of, pattern, folder)
        return chain, "; ".join(_said(stage.config) for stage in chain)

    known = pattern or kept.get("pattern")
    if kept and known and planned(known)[1] == kept["setup"]:
        return kept
    trained(*of)
    pattern = pattern or _chosen(case, of)
    chain, setup = planned(pattern)
    for stage in chain:
        summary = trained(*stage)
    names = ("eval_bits_per_byte", "eval_accuracy", "eval_loss", "parameters", "tokens")
    found = {name: summary.get(name) for name in names}
    found |= {"seconds": _seconds(chain), "pattern": pattern, "setup": setup} | record.environment()
    record.write(NAME, {"runs": kept_runs() | {case.name: found}})
    shutil.rmtree(folder, ignore_errors=True)
    return found


def _seconds(chain: Sequence[Stage]) -> float:
    return sum(json.loads((stage.workdir / "summary.json").read_text())["seconds"] for stage in chain)


# --- What is shown ----------------------------------------------------------------------------------------------------


class Found(NamedTuple):
    """Of the seeds of a case."""

    values: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def __str__(self) -> str:
        spread = f" ({min(self.values):.3f} - {max(self.values):.3f})" if len(self.values) > 1 else ""
        return f"{self.median:.3f}{spread}"


def by_case(runs: Mapping[Case, Mapping], figure: str) -> dict[Case, Found]:
    """The seeds together, under the case of seed 0."""
    found: dict[Case, Found] = {}
    for case, run in runs.items():
        found.setdefault(case._replace(seed=0), Found([])).values.append(run[figure])
    return found


def text_table(runs: Mapping[Case, Mapping]) -> tuple[Table, list[str]]:
    """Bits per byte of each mixer and budget, and what did not come out as it should."""
    found, rows, failed = by_case(runs, "eval_bits_per_byte"), [], []
    for budget in dict.fromkeys(case.budget for case in found):
        of = found.get(of_teacher("text", budget))
        if of is None:
            continue
        for mixer in MIXERS:
            ways = {how: found.get(Case("text", budget, mixer, how)) for how in METHODS}
            both, logits, scratch = ways.values()
            if not any(ways.values()):
                continue
            gap = both and both.median / of.median - 1
            cells = ["-" if way is None else str(way) for way in ways.values()]
            rows.append([f"{budget}x", mixer, str(of), *cells, shown(gap, "+.1%")])
            where, within = f"{budget}x {mixer}", WITHIN["attention" in mixer]
            if gap is not None and gap > within:
                failed.append(f"{where}: {gap:+.1%} of the teacher's bits per byte, more than {within:.0%}")
            if both and logits and both.median >= logits.median:
                failed.append(f"{where}: the logits alone are no worse than after the mixers")
            if both and scratch and both.median >= scratch.median:
                failed.append(f"{where}: from scratch it is no worse")
    headings = [
        "budget",
        "mixer",
        "teacher",
        "mixers, then logits",
        "logits alone",
        "from scratch",
        "beside the teacher",
    ]
    return Table("Bits per byte, median of seeds", headings, rows, texts=2), failed


def recall_table(runs: Mapping[Case, Mapping]) -> tuple[Table, list[str]]:
    """MQAR's accuracy by the layers of softmax that stay, and where those that were chosen are no better."""
    found, rows, failed = by_case(runs, "eval_accuracy"), [], []
    for case, of in found.items():
        rows.append([case.mixer, f"{case.stay}", case.how, str(of)])
        evenly = found.get(case._replace(how="spaced"))
        if case.how == "chosen" and evenly and of.median <= evenly.median:
            failed.append(f"{case.mixer}, {case.stay} layers: the chosen ones recall no more than evenly spaced ones")
    return Table(f"{TASK}: accuracy, median of seeds", ["mixer", "softmax layers", "how", "accuracy"], rows, 3), failed


def recall_chart(runs: Mapping[Case, Mapping]) -> tuple[Chart, dict[str, str]]:
    """And the mixer of each line."""
    points: dict[tuple[str, str], list] = {}
    found = by_case(runs, "eval_accuracy")
    for case, of in found.items():
        for name in (case.mixer,) if case.how != "teacher" else ():
            points.setdefault((name, case.how), []).append((case.stay, of.median))
    whole = [(case.stay, of.median) for case, of in found.items() if case.how == "teacher"]
    lines = {f"{mixer}, {how}": sorted(of + whole) for (mixer, how), of in points.items()}
    mixers = {f"{mixer}, {how}": mixer for mixer, how in points}
    drawn = [Line(name, of, name) for name, of in lines.items()]
    return Chart(TASK, "layers of softmax attention", "accuracy", drawn, log_x=False), mixers


def report(task: str, runs: Mapping[Case, Mapping]) -> None:
    table, failed = (text_table if task == "text" else recall_table)(runs)
    print("", markdown(table), sep="\n")
    print(*(["Did not come out so:", *failed] if failed else ["All came out so."]), sep="\n")
    if task == "mqar":
        path = record.RESULTS / f"{NAME}_{task}.png"
        chart, mixers = recall_chart(runs)
        plots.charts([chart], mixers, path)
        print(f"written to {path.relative_to(record.RESULTS.parent.parent)}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.linearize", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("task", choices=("text", "mqar"))
    add("--mixers", default="", help="some of them, separated by spaces; all by default")
    add("--budgets", default="1,4", help="of text, in demos' trainings")
    add("--seeds", type=argument(int, unit="seed"), default=3)
    add("--workdir", type=lambda path: pathlib.Path(expand(path)), default=pathlib.Path("runs/linearize"))
    add("--again", action="store_true", help="repeat runs whose results are kept")
    add("--kept", action="store_true", help="run nothing")
    args = parser.parse_args(argv)
    known = MIXERS if args.task == "text" else RECALLING
    mixers = args.mixers.split() or list(known)
    if unknown := [mixer for mixer in mixers if mixer not in known]:
        raise UsageError(f"--mixers: unknown {unknown[0]!r}; expected some of {' '.join(known)}")
    try:
        budgets = [argument(int)(part) for part in args.budgets.split(",")] if args.task == "text" else [1]
    except argparse.ArgumentTypeError as error:
        raise UsageError(f"--budgets: {error}") from error
    kept = kept_runs()

    def teachers(case: Case) -> Mapping | None:
        return kept.get(case.name) if args.kept else run(case, "attention", args.workdir, args.again)

    if not args.kept:
        compile_cache.enable()
    seeds = range(args.seeds) if args.task == "text" else recalling(args.seeds, teachers)
    chosen = cases(args.task, budgets, mixers, seeds)
    if args.kept:
        report(args.task, {case: kept[case.name] for case, _ in chosen if case.name in kept})
        return
    found = {}
    for number, (case, pattern) in enumerate(chosen, 1):
        print(f"[{number}/{len(chosen)}] {case.name}", flush=True)
        found[case] = run(case, pattern, args.workdir, args.again)
    report(args.task, found)


if __name__ == "__main__":
    with exit_with_message():
        main()
