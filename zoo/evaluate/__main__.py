"""Evaluate a trained model.

    python -m zoo.evaluate --workdir=runs/gla
    python -m zoo.evaluate --workdir=runs/gla --tasks=perplexity --context_length=256,1024
    python -m zoo.evaluate --workdir=runs/mqar --tasks='mqar?pairs=8,needle'
    python -m zoo.evaluate --workdir=runs/digits-0 --workdir=runs/digits-1 --workdir=runs/digits-2

On the validation split of the run's corpus, or on any text with --source. Prints tables, and writes
WORKDIR/evaluate.json, with plots, losses by document (.npz) and a report (.html) beside it; for another text
WORKDIR/evaluate-NAME-FINGERPRINT.json. Several runs, which may differ in train.seed alone, are evaluated one by one;
means over seeds follow, with intervals, and stand in the first one's evaluate-seeds.json.
"""

import argparse
import contextlib
import copy
import pathlib
import re
import sys
import time
from collections.abc import Sequence

import numpy as np
from rich.console import Console

from zoo import checkpoints, compile_cache, data, files, memory
from zoo.config import Config
from zoo.errors import UsageError, exit_with_message, warn
from zoo.evaluate import documents, evaluated, harness, html, report, seeds, tasks
from zoo.evaluate.task import Request, Task
from zoo.flops import num_parameters
from zoo.settings import Parser, argument
from zoo.terminal import one_line, printable


def _arguments(argv: list[str] | None, program: str) -> argparse.Namespace:
    parser = Parser(program, __doc__)
    add = parser.add_argument
    add(
        "--workdir", type=files.expand, required=True, action="append",
        help="the run to load; repeated: runs that differ in train.seed alone",
    )  # fmt: skip
    add("--step", type=argument(int, at_least=0), help="the checkpoint's step; default: the newest")
    add(
        "--tasks", default=tasks.DEFAULT,
        help=f"comma-separated: {', '.join(tasks.TASKS)}; synthetic tasks, with options or without (mqar?pairs=8); "
        "default: all that the run's head can do, but those",
    )  # fmt: skip
    add("--context_length", help="tokens, comma-separated for several; default: what the run was trained at")
    add("--source", help="`stdlib`, a path, a glob or a synthetic task; default: the run's validation split")
    add("--batches", type=argument(int, at_least=0), default=0, help="at most so many, spread over the text; 0: all")
    add(
        "--output",
        type=files.expand,
        help="the JSON to write; default: in WORKDIR, evaluate.json, or with --source a name of its own",
    )
    add(
        "--cache_dir",
        type=files.expand,
        default="",
        help="of tokenized text; default: the user's cache directory, whatever the run used",
    )
    harness.add_arguments(parser)
    return parser.parse_args(argv)


def _checked(names: str, request: Request) -> dict[str, Task]:
    """Those of --tasks. What cannot be measured of this run is left out with a warning, if it was not asked for."""
    chosen, head = tasks.find(names), request.config.model.head
    named = set(map(str.strip, names.split(",")))
    not_asked = tasks.TASKS.keys() - named if tasks.DEFAULT in named else set()
    chosen = {name: task for name, task in chosen.items() if task.head == head or name not in not_asked}
    for name, task in list(chosen.items()):
        try:
            if task.head != head:
                raise UsageError(f"--tasks: {name}: needs model.head={task.head}, and the run has {head}")
            if not (request.run.model.causal or task.both_ways):
                raise UsageError(f"--tasks: {name}: it asks for the next token, which a bidirectional model reads")
            task.check(request)
        except UsageError as error:
            if name not in not_asked or name == "perplexity":
                raise
            warn(f"left out: {str(error).removeprefix('--tasks: ')}")
            del chosen[name]
    return chosen


def _check_of_tokens(config: Config, arguments: argparse.Namespace) -> None:
    """UsageError for flags of text, where the run's head is of rows."""
    for name in ("source", "context_length"):
        if getattr(arguments, name) is not None and config.model.head != "tokens":
            own = f"a run of model.head={config.model.head} is evaluated on its own validation rows"
            raise UsageError(f"--{name}: {own}; leave it out")


def _context_lengths(text: str | None, default: int) -> list[int]:
    if text is None:
        return [default]
    try:
        return list(dict.fromkeys(map(argument(int, unit="token"), text.split(","))))
    except argparse.ArgumentTypeError as error:
        raise UsageError(f"--context_length: {error}, or several lengths, such as 256,1024") from error


def _with_data(config: Config, workdir: str, source: str | None, cache_dir: str) -> Config:
    """The run's config, reading `source` with the run's own tokenizer. A workdir does not say where files are written,
    and text that its tokenizer does not know is measured all the same: the share is printed."""
    config = copy.deepcopy(config)
    config.data.cache_dir, config.data.max_lost_text = cache_dir, 1.0
    config.data.tokenizer = data.tokenizer.spec_for_run(workdir, config)
    if source is not None:
        config.data.source, config.data.weights, config.data.validation_source = source, "", source
    return config


def main(argv: list[str] | None = None, program: str = "python -m zoo.evaluate") -> None:
    arguments = _arguments(argv, program)
    with exit_with_message():
        compile_cache.enable()
        workdirs = list(dict.fromkeys(arguments.workdir))
        if len(workdirs) > 1:
            for flag in ("output", "harness"):
                if getattr(arguments, flag) is not None:
                    raise UsageError(f"--{flag}: it is of one run; give one --workdir")
            seeds.check({workdir: checkpoints.read_config(workdir) for workdir in workdirs})
        if arguments.harness is not None:
            return harness.command(arguments, workdirs[0])
        tasks.find(arguments.tasks)
        console = Console(width=None if sys.stdout.isatty() else 120, highlight=False, markup=False, emoji=False)
        records = [_evaluate(workdir, arguments, console) for workdir in workdirs]
        if len(records) > 1:
            _over_seeds(records, console)


def _evaluate(workdir: str, arguments: argparse.Namespace, console: Console) -> dict:
    """Measure a run, print and write it: what stands in its evaluate.json."""
    config = checkpoints.read_config(workdir)
    _check_of_tokens(config, arguments)
    config = _with_data(config, workdir, arguments.source, arguments.cache_dir)
    folder = pathlib.Path(arguments.output or pathlib.Path(workdir, "evaluate.json")).parent
    if not folder.is_dir():
        raise UsageError(f"--output: the folder {str(folder)!r} does not exist")
    lengths = _context_lengths(arguments.context_length, config.train.context_length)
    memory.check_forward(config, max(lengths))
    corpus = data.corpus_info(config)
    output = pathlib.Path(arguments.output or folder / _name(arguments.source, corpus["fingerprint"]))
    run = checkpoints.load_run(workdir, arguments.step)
    request = Request(config, run, lengths, arguments.batches)
    chosen = _checked(arguments.tasks, request)

    start = time.perf_counter()
    table = {"table_order": None, "table_bits_per_byte": None, "table_bytes": None}
    if arguments.source is None:  # the run's own text
        table = data.table_figures(data.training_dataset(config), data.validation_batches(config), run.step)
    results, kept = {}, {}
    for name, task in chosen.items():
        began = time.perf_counter()
        results[name], arrays = task.measure(request)
        results[name]["seconds"] = time.perf_counter() - began
        kept |= arrays
    record = {
        "workdir": workdir,
        "step": run.step,
        "mixer": config.model.mixer,
        "parameters": num_parameters(config.model),
        "corpus": {
            "source": corpus["source"],
            "fingerprint": corpus["fingerprint"],
            "validation_tokens": corpus["validation_tokens"],
            "validation_bytes": corpus["validation_bytes"],
            "lost_text": corpus["lost_text"],
            "gzip_bits_per_byte": corpus["gzip_bits_per_byte"],
        }
        | table,
        "batches": arguments.batches,
        "tasks": results,
        "seconds": time.perf_counter() - start,
    } | report.provenance()

    about = f"{workdir}, step {run.step}, {record['mixer']}, {record['parameters']:,} parameters"
    console.print(one_line(about))
    for name, task in chosen.items():
        console.print(*map(report.on_terminal, task.tables({"": results[name]})), sep="\n")
    console.print(printable(_about_text(corpus)))
    _write(record, chosen, kept, output, console)
    if "perplexity" in results:
        measured = results["perplexity"]["by_context_length"][0]
        figures = record["corpus"] | {"eval_tokens": measured["tokens"]}
        console.print(*data.conclusion(measured["bits_per_byte"], figures), sep="\n")
    return record


def _over_seeds(records: Sequence[dict], console: Console) -> None:
    """Of runs that differ in their seed: print and write the means of what tasks have figures of."""
    if len(steps := {record["step"] for record in records}) > 1:
        warn(f"the runs were evaluated at different steps ({', '.join(map(str, sorted(steps)))})")
    found = {}
    for name in records[0]["tasks"]:
        of_task = seeds.measured(tasks.of_record(name), [record["tasks"][name] for record in records])
        if of_task:
            found[name] = of_task
            console.print(report.on_terminal(seeds.table(name, of_task)))
    about = {"workdirs": [record["workdir"] for record in records], "steps": [record["step"] for record in records]}
    about["corpus"] = records[0]["corpus"]
    figures = {name: {figure: of._asdict() for figure, of in own.items()} for name, own in found.items()}
    path = pathlib.Path(records[0]["workdir"], "evaluate-seeds.json")
    try:
        files.write(path, files.to_json(about | {"tasks": figures} | report.provenance(), indent=2) + "\n")
    except OSError as error:
        raise UsageError(f"--workdir: cannot write {str(path)!r} ({error.strerror})") from error
    console.print(one_line(f"written: {path}"), soft_wrap=True)


def _name(source: str | None, fingerprint: str) -> str:
    """Of the JSON: the run's own evaluation is kept apart from those on other texts."""
    if source is None:
        return "evaluate.json"
    stem = re.sub(r"[^0-9A-Za-z]+", "-", pathlib.PurePath(source).stem).strip("-")[:40]
    return f"evaluate-{stem or 'text'}-{fingerprint[:8]}.json"


def _about_text(corpus: dict) -> str:
    text = f"text: {one_line(corpus['source'])} ({corpus['fingerprint']})"
    if corpus["lost_text"]:
        text += f"; the tokenizer has no tokens for {corpus['lost_text']:.2%} of its bytes, which are not counted"
    return text


def _write(
    record: dict, chosen: dict[str, Task], kept: dict[str, np.ndarray], output: pathlib.Path, console: Console
) -> None:
    name = pathlib.Path(record["workdir"]).resolve().name
    run = evaluated.Evaluated(name, record["mixer"], record, {})
    title = f"Evaluation of {name}, step {record['step']}"
    page = html.page(title, [_about_text(record["corpus"])], {name: run.mixer}, evaluated.sections([run]))
    written: list[pathlib.Path] = []

    def replacing(path: pathlib.Path) -> contextlib.AbstractContextManager[pathlib.Path]:
        written.append(path)
        return files.replacing(path)

    try:
        with replacing(output) as path:
            path.write_text(files.to_json(record, indent=2) + "\n")
        with replacing(output.with_suffix(".html")) as path:
            path.write_text(page, encoding="utf-8")
        if kept:
            with replacing(output.with_suffix(".npz")) as path:
                documents.write(path, record["corpus"]["fingerprint"], kept)
        else:
            output.with_suffix(".npz").unlink(missing_ok=True)  # of the evaluation that this one takes the place of
        for task_name, task in chosen.items():
            if charts := task.charts({name: record["tasks"][task_name]}):
                with replacing(output.with_name(f"{output.stem}_{report.in_file_names(task_name)}.png")) as path:
                    report.draw(charts, {name: run.mixer}, path)
    except OSError as error:
        raise UsageError(f"--output: cannot write {str(written[-1])!r} ({error.strerror})") from error
    console.print(one_line("written: " + ", ".join(map(str, written))), soft_wrap=True)


if __name__ == "__main__":
    main()
