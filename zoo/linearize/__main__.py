"""Which layers of softmax attention a trained model can spare.

    python -m zoo.linearize importance --workdir=runs/teacher --mixer=gla@expand_k=1
    python -m zoo.linearize importance --workdir=runs/teacher --mixer=gla --steps=40 --budget=2

Puts the mixer in place of each layer of softmax attention alone, and of all but some; prints what each costs, the
order, and the pattern that keeps a budget of softmax layers (docs/linearize.md). Writes WORKDIR/importance-MIXER.json
and .png.
"""

import argparse
import copy
import pathlib
import sys
from collections.abc import Iterable
from typing import Any

import jax
from flax import nnx
from rich.console import Console
from rich.progress import track

from zoo import checkpoints, compile_cache, data, files, lists, memory
from zoo.config import Config, DistillConfig, ModelConfig
from zoo.data import synthetic
from zoo.errors import UsageError, exit_with_message, warn
from zoo.evaluate import report
from zoo.figures import Chart
from zoo.linearize import importance
from zoo.linearize.importance import Rows, Swapped
from zoo.linearize.transfer import Transfer
from zoo.model import LanguageModel
from zoo.settings import Parser, argument
from zoo.terminal import one_line

PROGRAM = "python -m zoo.linearize"
MQAR = "mqar"


def _arguments(argv: list[str], program: str) -> argparse.Namespace:
    parser = Parser(program, __doc__)
    add = parser.add_argument
    add("--workdir", type=files.expand, required=True, help="the run of softmax attention")
    add("--mixer", required=True, help="the family in its place, with settings or without: gla@expand_k=1")
    add(
        "--steps", type=argument(int, unit="step", at_least=0), default=0,
        help="of train.distill.stage=mixers before, of all layers at once; 0: as they take over from softmax",
    )  # fmt: skip
    add("--budget", type=argument(int, at_least=0), help="layers that stay softmax; default: a quarter, at least one")
    add("--by", choices=importance.BY, default="loss", help="what ranks the layers")
    add("--recall", default=MQAR, help="a synthetic task whose answers are asked for too; empty: none")
    add("--batches", type=argument(int), default=8, help="of validation rows, and of the task's")
    add("--output", type=files.expand, help="the JSON to write, and the plot beside it")
    return parser.parse_args(argv)


def _student(workdir: str, config: Config, target: ModelConfig, steps: int, folder: pathlib.Path) -> LanguageModel:
    """The target's model: with what it takes over, or what it has learnt of the run's own mixers."""
    if steps:
        return _trained(workdir, config, target, steps, folder)
    models = tuple(
        nnx.eval_shape(lambda model=model: LanguageModel(model, rngs=nnx.Rngs(0))) for model in (config.model, target)
    )
    transfer = Transfer(f"--workdir={workdir}", config.model, target, models, config.train.context_length)
    source = nnx.state(checkpoints.load_run(workdir).model, nnx.Param)

    @jax.jit
    def made(source):
        fresh = LanguageModel(target, rngs=nnx.Rngs(config.train.seed))
        return transfer(source, nnx.state(fresh, nnx.Param))

    return nnx.merge(nnx.graphdef(models[1]), made(source))


def _trained(workdir: str, config: Config, target: ModelConfig, steps: int, folder: pathlib.Path) -> LanguageModel:
    from zoo.training import train

    config = copy.deepcopy(config)
    config.model, config.train.steps = target, steps
    config.train.distill = DistillConfig(teacher=workdir, stage="mixers")
    config.optimizer.trainable = ""
    config.optimizer.warmup_steps = min(config.optimizer.warmup_steps, steps // 4)
    config.eval.every = config.checkpoint.every = steps
    config.eval.final_batches, config.metrics.tensorboard = config.eval.batches, False
    own = folder / f"{steps}_steps"
    if "stopped_at" in train(config, own, init_from=workdir):
        raise KeyboardInterrupt
    return checkpoints.load_run(own).model


def _rows(config: Config, recall: str, batches: int) -> dict[str, Rows]:
    """Validation rows, and those of a task that model and context have room for. A run of a task has its own."""
    text = data.validation_batches(config).at_most(batches)
    found = {"": Rows(list(text), data.labels(config, training=False))}
    if not recall or found[""].labels is not None:
        return found
    try:
        room = min(synthetic.TASKS[MQAR].vocab_size, config.model.vocab_size // 2 * 2)
        spec = f"{MQAR}?vocab_size={room}" if recall == MQAR else recall
        if not synthetic.is_task(spec):
            raise UsageError(f"--recall: unknown task {recall!r}; expected one of {', '.join(synthetic.TASKS)}")
        task = synthetic.of_spec(spec, config.train.context_length, setting="--recall")
        if task.vocab_size > config.model.vocab_size:
            has = f"{task.vocab_size} token ids, and the model {config.model.vocab_size}"
            raise UsageError(f"--recall: {spec} has {has}; where it can be smaller, say so: {task.name}?vocab_size=")
    except UsageError as error:
        if recall != MQAR:
            raise
        warn(f"left out: {error}")
        return found
    rows = synthetic.validation_rows(task, config, batches)
    return found | {"recall": Rows(list(rows), task.labels(training=False))}


def _figures(swapped: Swapped, rows: dict[str, Rows], layers: Iterable[int]) -> importance.Figures:
    of = swapped.figures(layers, rows[""])
    found = {"loss": of["eval_loss"]}
    if "eval_bits_per_byte" in of:
        found["bits_per_byte"] = of["eval_bits_per_byte"]
    of = swapped.figures(layers, rows["recall"]) if "recall" in rows else of
    if "eval_accuracy" in of:
        found |= {"recall_loss": of["eval_loss"], "recall": of["eval_accuracy"]}
    return found


def _importance(arguments: argparse.Namespace) -> None:
    compile_cache.enable()
    workdir, mixer = arguments.workdir, arguments.mixer
    config = checkpoints.read_config(workdir)
    if config.model.head != "tokens":
        raise UsageError(f"--workdir: a model of {config.model.head} predicts no tokens; expected model.head=tokens")
    target = importance.with_mixer(config.model, mixer)
    layers = importance.swappable(config.model, target)
    budget = max(1, len(layers) // 4) if arguments.budget is None else arguments.budget
    if budget > len(layers):
        raise UsageError(f"--budget: got {budget}, and the run has {len(layers)} layers of softmax attention")
    config.data.cache_dir, config.data.tokenizer = "", data.tokenizer.spec_for_run(workdir, config)
    memory.check_forward(config, config.train.context_length)
    name = f"importance-{report.in_file_names(mixer)}.json"
    output = pathlib.Path(arguments.output or pathlib.Path(workdir, name))
    if not output.parent.is_dir():
        raise UsageError(f"--output: the folder {str(output.parent)!r} does not exist")
    rows = _rows(config, arguments.recall, arguments.batches)
    if arguments.by == "recall_loss" and len(rows) == 1 and rows[""].labels is None:
        raise UsageError("--by: nothing is recalled; name a task that fits with --recall, or use --by=loss")
    student = _student(workdir, config, target, arguments.steps, output.with_suffix(""))
    run = checkpoints.load_run(workdir)
    swapped = Swapped(run.model, student, (config.model, target))

    def progress(steps: Iterable[Any]) -> Iterable[Any]:
        console = Console(stderr=True)
        return track(steps, "layers", console=console, transient=True, disable=not sys.stderr.isatty())

    found = importance.measured(layers, lambda of: _figures(swapped, rows, of), arguments.by, progress)
    pattern = importance.pattern_of(config.model, target, found["order"][:budget])
    record = {"workdir": workdir, "step": run.step, "mixer": mixer, "trained_steps": arguments.steps}
    record |= {"batches": arguments.batches, "budget": budget, "pattern": pattern} | found | report.provenance()
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False, markup=False, emoji=False)
    console.print(*map(report.on_terminal, importance.tables(found, mixer)), sep="\n")
    print(f"order       {', '.join(map(str, found['order']))}, the dearest first")
    print(f"{f'keep {budget}':11} --config.model.mixer={pattern}")
    _write(record, importance.charts(found, mixer), mixer, output)


def _write(record: dict[str, Any], charts: list[Chart], mixer: str, output: pathlib.Path) -> None:
    picture = output.with_suffix(".png")
    try:
        with files.replacing(output) as path:
            path.write_text(files.to_json(record, indent=2) + "\n")
        with files.replacing(picture) as path:
            report.draw(charts, {mixer: lists.places(mixer)[0][0]}, path)
    except OSError as error:
        raise UsageError(f"--output: cannot write beside {str(output)!r} ({error.strerror})") from error
    print(one_line(f"written     {output}, {picture}"))


def main(argv: list[str] | None = None, program: str = PROGRAM) -> None:
    argv = sys.argv[1:] if argv is None else argv
    with exit_with_message(at_once=True):
        if argv and argv[0] in ("--help", "-h"):
            print(__doc__)
        elif not argv or argv[0] != "importance":
            raise UsageError(f"{program}: expected importance")
        else:
            _importance(_arguments(argv[1:], f"{program} importance"))


if __name__ == "__main__":
    main()
