"""Tasks of lm-evaluation-harness, with the extra `eval`: `python -m zoo.evaluate --harness=TASK,...`.

`adapter` is a run as the harness' model; `prefixes` reads what contexts share once. Nothing here imports lm_eval before
a task is asked for: that takes seconds.
"""

import argparse
import importlib.util
import os
import pathlib
import sys
import time
import traceback
from typing import Any

from rich.console import Console

from zoo import checkpoints, files, heads
from zoo.errors import UsageError
from zoo.evaluate import report, tasks
from zoo.figures import Table, shown
from zoo.flops import num_parameters
from zoo.settings import Parser, argument, nearest
from zoo.terminal import one_line

_OPTIONS = {"num_fewshot": argument(int, at_least=0), "limit": argument(int, unit="document")}


def add_arguments(parser: Parser) -> None:
    parser.add_argument(
        "--harness",
        help="tasks of lm-evaluation-harness (extra `eval`) in place of --tasks: NAME?num_fewshot=5&limit=100,...",
    )
    parser.add_argument(
        "--harness_tasks", type=files.expand, help="a folder of your own task files (YAML, whose !function code runs)"
    )


def command(arguments: argparse.Namespace, workdir: str) -> None:
    """Run `arguments.harness` on the run in `workdir`; print a table, write WORKDIR/harness.json.

    Raises:
      UsageError: lm_eval is not installed, an unknown task (the nearest are named), a data set that cannot be read, or
        flags that a harness task has no use for.
    """
    others = {name: getattr(arguments, name) for name in ("source", "batches", "cache_dir")}
    others["tasks"] = arguments.tasks != tasks.DEFAULT
    for name, given in others.items():
        if given:
            raise UsageError(f"--{name} does nothing with --harness; run the two one after the other")
    if importlib.util.find_spec("lm_eval") is None:
        raise UsageError("--harness needs lm-evaluation-harness: pip install 'sequence-zoo[eval]'")
    from zoo.evaluate.harness import adapter

    asked = _asked(arguments.harness)
    output = pathlib.Path(arguments.output or pathlib.Path(workdir, "harness.json"))
    if not output.parent.is_dir():
        raise UsageError(f"--output: the folder {str(output.parent)!r} does not exist")
    config = checkpoints.read_config(workdir)
    heads.require_tokens(config.model, f"--workdir={workdir}")
    max_length = _max_length(arguments.context_length, config)
    manager = _manager([name for name, _ in asked], arguments.harness_tasks)
    loaded = [_load(manager, name) for name, _ in asked]
    run = checkpoints.load_run(workdir, arguments.step)
    begins = adapter.beginning(pathlib.Path(workdir), run.tokenizer)
    model = adapter.RunLM(run, begins, max_length)

    start = time.perf_counter()
    results = {}
    for (name, options), one in zip(asked, loaded, strict=True):
        results |= _evaluate(model, name, one, options, manager)
    record = {
        "workdir": workdir,
        "step": run.step,
        "mixer": config.model.mixer,
        "parameters": num_parameters(config.model),
        "context_length": max_length,
        "cut": model.num_cut,
        "costs": vars(model.costs),
        "tasks": results,
        "seconds": time.perf_counter() - start,
    } | report.provenance("lm_eval")
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False, markup=False, emoji=False)
    about = f"{workdir}, step {run.step}, {record['mixer']}, {record['parameters']:,} parameters"
    console.print(one_line(about))
    console.print(report.on_terminal(_table(results)))
    if model.num_cut:
        console.print(f"{model.num_cut:,} contexts lost their beginning: --context_length={max_length}")
    if model.costs.tokens:
        console.print(str(model.costs))
    try:
        files.write(output, files.to_json(record, indent=2) + "\n")
    except OSError as error:
        raise UsageError(f"--output: cannot write {str(output)!r} ({error.strerror})") from error
    console.print(one_line(f"written: {output}"), soft_wrap=True)


def _asked(text: str) -> list[tuple[str, dict[str, int]]]:
    """Tasks and their options of "a,b?num_fewshot=5&limit=100"."""
    found = []
    for spec in filter(None, map(str.strip, text.split(","))):
        name, _, query = spec.partition("?")
        options = {}
        for entry in filter(None, query.split("&")):
            option, _, value = entry.partition("=")
            if option not in _OPTIONS:
                near = nearest(option, _OPTIONS)
                raise UsageError(f"--harness: {name}: unknown option {option!r}; known, nearest first: {near}")
            try:
                options[option] = _OPTIONS[option](value)
            except argparse.ArgumentTypeError as error:
                raise UsageError(f"--harness: {name}: {option}: {error}") from None
        found.append((name, options))
    if not found:
        raise UsageError("--harness: got none; expected names of tasks, such as arc_easy,lambada_openai")
    return found


def _max_length(text: str | None, config: Any) -> int:
    """Tokens that are read at most: --context_length, or what the run was trained at."""
    learned = config.model.positions == "learned"
    try:
        length = config.train.context_length if text is None else argument(int, unit="token")(text)
    except argparse.ArgumentTypeError as error:
        raise UsageError(f"--context_length: {error}; --harness takes one") from error
    if learned and length > config.model.max_positions:
        raise UsageError(
            f"--context_length: {length} exceeds the model's {config.model.max_positions} learned positions"
        )
    return length


def _manager(names: list[str], folder: str | None) -> Any:
    """What finds tasks by name: in `folder`, and the harness' own where that has not all of them (20 seconds)."""
    from lm_eval.tasks import TaskManager

    if folder is not None and not os.path.isdir(folder):
        raise UsageError(f"--harness_tasks: {folder!r} is no folder")
    if folder is not None:
        manager = TaskManager(include_path=folder, include_defaults=False)
        if set(names) <= set(manager.all_tasks):
            return manager
    manager = TaskManager(include_path=folder)
    for name in names:
        if name not in manager.all_tasks:
            near = nearest(name, manager.all_tasks, 8)
            raise UsageError(f"--harness: unknown task {name!r}; the nearest of {len(manager.all_tasks):,}: {near}")
    return manager


def _load(manager: Any, name: str) -> dict:
    """The task, or the tasks of the group, with their data sets."""
    try:
        return manager.load([name])
    except (OSError, ImportError, KeyError, ValueError) as error:
        said = (str(error).splitlines() or [type(error).__name__])[0][:300]
        wanted = _data_set(error)
        if wanted is None:
            raise UsageError(f"--harness: {name}: cannot be made ({said})") from error
        raise UsageError(
            f"--harness: {name}: its data set {wanted} is not on this machine and cannot be fetched ({said})"
        ) from error


def _data_set(error: Exception) -> str | None:
    """What was being fetched when `error` came: it passed the task that knows."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        task = frame.f_locals.get("self")
        if frame.f_code.co_name == "download" and getattr(task, "DATASET_PATH", None):
            return " ".join(map(repr, filter(None, (task.DATASET_PATH, task.DATASET_NAME))))
    return None


def _evaluate(model: Any, name: str, loaded: dict, options: dict[str, int], manager: Any) -> dict[str, dict]:
    """Figures by task: of a group, its tasks' and its own."""
    import lm_eval

    chosen = [loaded["groups"][name]] if name in loaded["groups"] else [*loaded["tasks"].values()]
    try:
        found = lm_eval.simple_evaluate(model, tasks=chosen, task_manager=manager, log_samples=False, **options)
    except (ValueError, NotImplementedError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"--harness: {name}: {error}") from error
    results = {}
    for task, figures in found["results"].items():
        metrics = {}
        for key, value in figures.items():
            metric, comma, filtered = key.partition(",")
            if comma and not metric.endswith("_stderr"):
                error = figures.get(f"{metric}_stderr,{filtered}")
                error = error if isinstance(error, float) else None
                metrics[metric if filtered == "none" else key] = {"value": value, "standard_error": error}
        results[task] = {
            "metrics": metrics,
            "num_fewshot": found["n-shot"].get(task),
            "documents": found["n-samples"].get(task, {}).get("effective"),
            "version": found["versions"].get(task),
        }
    return results


def _table(results: dict[str, dict]) -> Table:
    rows = []
    for task, result in results.items():
        for metric, figure in result["metrics"].items():
            value = figure["value"]
            rows.append(
                [
                    task, metric, shown(value, ".4f") if isinstance(value, float) else str(value),
                    shown(figure["standard_error"], ".4f"), shown(result["documents"], ","),
                    shown(result["num_fewshot"], "d"),
                ]
            )  # fmt: skip
    headings = ["task", "metric", "value", "standard error", "documents", "few-shot"]
    return Table("lm-evaluation-harness", headings, rows, texts=2)
