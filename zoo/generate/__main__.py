"""Let a trained model write.

    python -m zoo.generate --workdir=runs/gla --prompt="def main(" --max_tokens=200
    python -m zoo.generate --workdir=runs/gla --prompts=questions.jsonl --output=answers.jsonl
    python -m zoo.generate --workdir=runs/gla --interactive
    python -m zoo.generate --workdir=runs/lorenz --horizon=200

Text goes to stdout as it is made, with several prompts in their order; the costs go to stderr. Control characters,
which a terminal would obey, are shown as escapes such as \\x1b, line ends and tabs left as they are; --raw: none.
A run with model.head=values goes on with its series (`zoo.generate.series`): a csv and a plot in the workdir.
"""

import argparse
import contextlib
import dataclasses
import sys

from zoo import checkpoints, compile_cache, heads
from zoo.checkpoints import Run
from zoo.errors import UsageError, exit_with_message
from zoo.files import expand
from zoo.generate import interactive, prompts, series, state_file
from zoo.generate.batch import Texts
from zoo.generate.engine import Generation
from zoo.generate.reading import Context
from zoo.generate.request import SETTINGS, check
from zoo.generate.sampling import Sampling
from zoo.generate.session import Session
from zoo.generate.text import check_stops
from zoo.settings import INT_MAX, Parser, argument, flag
from zoo.terminal import printable

_OF_SAMPLING = [field.name for field in dataclasses.fields(Sampling)]


_OF_SERIES = ("horizon", "window")
_OF_BOTH = ("workdir", "step", "output")


def _arguments(argv: list[str] | None, program: str) -> argparse.Namespace:
    parser = Parser(program, __doc__)
    add = parser.add_argument_group("the run").add_argument
    add("--workdir", type=expand, required=True, help="the run to load")
    add("--step", type=argument(int, at_least=0), help="the checkpoint's step; default: the newest")
    add = parser.add_argument_group("prompts").add_argument
    add("--prompt", action="append", default=[], help="may be repeated; empty: begin a document")
    add("--prompt_file", type=expand, action="append", default=[], help="its content is a prompt; repeatable; -: stdin")
    add(
        "--prompts", type=expand,
        help='a prompt on each line; of a .jsonl file a string, or {"prompt": "...", "max_tokens": 8, "stop": ["\\n"]} '
        "with any of the settings below for this prompt alone; -: stdin",
    )  # fmt: skip
    add("--load_state", type=expand, help="of --save_state: what stands before each prompt, read already")
    add("--interactive", action="store_true", help="turns typed at the terminal, with the state kept; /help says more")
    add("--batch_size", type=argument(int), help="texts written at once, others wait for a place; default: all")
    add = parser.add_argument_group("what to write").add_argument
    nothing = dataclasses.replace(SETTINGS["max_tokens"], special={0: "none, with --save_state"})
    for name, declared in (SETTINGS | {"max_tokens": nothing}).items():
        add(f"--{name}", type=flag(declared), default=declared.default, help=f"{declared.describe()} [%(default)s]")
    add("--stop", action="append", default=[], help="end a text before this; repeatable")
    add(
        "--stop_at_separator", action=argparse.BooleanOptionalAction, default=True,
        help="end where the model ends the document; --no-stop_at_separator: it may not, and writes max_tokens",
    )  # fmt: skip
    add = parser.add_argument_group("where to").add_argument
    add(
        "--output", type=expand,
        help="a file of JSON lines, one a text, written when it is finished; the same command goes on where one was "
        "stopped; -: to stdout",
    )  # fmt: skip
    add(
        "--logprobs", type=argument(int, at_least=0),
        help="with --output: the log-probability of each token (nats, the model's own: before penalty, temperature and "
        "cuts), and of so many likeliest ones",
    )  # fmt: skip
    add("--save_state", type=expand, help="a file for the state after the text, to go on from: see --load_state")
    add("--raw", action="store_true", help="write control characters as they are: for a file, not for a terminal")
    add = parser.add_argument_group("of a run with model.head=values; with it --output names the csv").add_argument
    add("--horizon", type=argument(int, unit="step"), help="steps to predict; default: model.horizon")
    of_window = {"type": argument(int, at_least=-INT_MAX), "default": 0}
    add("--window", **of_window, help="a window that validates, after whose input; -1: the last [%(default)s]")
    return parser.parse_args(argv)


def _check_head(arguments: argparse.Namespace, head: str) -> None:
    """UsageError for flags that are not of the head."""
    defaults = vars(_arguments(["--workdir="], ""))
    for name, value in vars(arguments).items():
        if value != defaults[name] and name not in _OF_BOTH and (name in _OF_SERIES) != (head == "values"):
            needs = "values" if name in _OF_SERIES else "tokens"
            raise UsageError(f"--{name}: of runs with model.head={needs}, and this one has {head}; leave it out")


def _check(arguments: argparse.Namespace) -> None:
    """UsageError for flags that do not go together."""
    check_stops(arguments.stop)
    is_list, single = arguments.prompts is not None, bool(arguments.prompt or arguments.prompt_file)
    if is_list and single:
        raise UsageError("--prompts: a file of prompts goes without --prompt and --prompt_file; put them into the file")
    if arguments.logprobs is not None and arguments.output is None:
        raise UsageError("--logprobs: a text shows none; give --output=FILE.jsonl, or --output=- for stdout")
    if arguments.max_tokens == 0 and not (arguments.save_state and not arguments.interactive):
        raise UsageError("--max_tokens: got 0, expected at least 1 token; 0 reads a prompt for --save_state alone")
    one = "--interactive" if arguments.interactive else "--save_state" if arguments.save_state else None
    others = {
        "--prompts": is_list,
        "--prompt and --prompt_file": single and arguments.interactive,
        "--output": arguments.output is not None,
        "--batch_size": arguments.batch_size is not None,
        "--samples": arguments.samples > 1,
        "more than one prompt": len(arguments.prompt) + len(arguments.prompt_file) > 1,
    }
    for name in (name for name, is_given in others.items() if one and is_given):
        raise UsageError(f"{one}: it is one text on stdout, and goes without {name}")


def _prompts(arguments: argparse.Namespace) -> list[prompts.Prompt]:
    settings = {name: getattr(arguments, name) for name in SETTINGS}
    if arguments.prompts is not None:
        return prompts.listed(arguments.prompts, settings, arguments.stop)
    given = [] if arguments.interactive else [*arguments.prompt]
    if not (given or arguments.prompt_file or arguments.interactive):
        if arguments.load_state is None:
            raise UsageError("no prompt; give --prompt=TEXT (empty: begin a document), --prompt_file or --prompts")
        given = [""]  # it just goes on
    return prompts.given(given, arguments.prompt_file, settings, arguments.stop)


def _costs(result: Generation, rows: int) -> str:
    return (
        f"prefill: {result.prefill_tokens} tokens, {result.prefill_tokens / result.prefill_seconds:,.0f} tokens/s; "
        f"decode: {result.decode_tokens} tokens, {result.decode_tokens / result.decode_seconds:,.0f} tokens/s; "
        f"state: {result.state_bytes // rows:,} bytes a sequence; compiling: {result.compile_seconds:.1f} s"
    )


def _write_texts(arguments: argparse.Namespace, run: Run, asked: list[prompts.Asked], context: Context | None) -> None:
    check(run.model, [one.request for one in asked], context, arguments.batch_size, arguments.logprobs)
    texts = Texts(run, asked, context, arguments.stop_at_separator)
    if arguments.output is None:
        output, done = texts.printer(arguments.raw), set()
    else:
        output = texts.json_lines(arguments.output, arguments.logprobs)
        done = output.done
    left = len(texts.places) - len(done)
    if not left:
        print(f"{arguments.output} has all {len(done)} texts", file=sys.stderr)
        return
    result = texts.write(output, arguments.batch_size, arguments.logprobs, done.__contains__)
    already = f"; {len(done)} of {len(texts.places)} texts were there" if done else ""
    print(f"step {run.step}; {_costs(result, min(arguments.batch_size or left, left))}{already}", file=sys.stderr)


def _take_turns(arguments: argparse.Namespace, run: Run, given: list[prompts.Prompt], context: Context | None) -> None:
    session, sampling = Session(run, context), Sampling(**{name: getattr(arguments, name) for name in _OF_SAMPLING})

    def tell(text: str) -> None:
        sys.stdout.write(text if arguments.raw else printable(text))
        sys.stdout.flush()

    def write(said: bytes) -> None:
        tokens = prompts.encoded(run.tokenizer, said, "the text")
        session.turn(
            tokens, arguments.max_tokens, sampling, arguments.seed, stops=arguments.stop,
            may_end=arguments.stop_at_separator, tell=tell, echo=not arguments.interactive,
        )  # fmt: skip
        tell("\n")

    def save(path: str) -> None:
        state_file.save(path, session.context, run)

    if arguments.interactive:
        interactive.run(session, write, save)
    else:
        write(given[0].text)
    if arguments.save_state is not None:
        save(arguments.save_state)
    saved = f", saved in {arguments.save_state}" if arguments.save_state is not None else ""
    size = f"{len(session.context.tokens)} tokens, {session.state_bytes:,} bytes"
    print(f"step {run.step}; the state: {size}{saved}", file=sys.stderr)


def main(argv: list[str] | None = None, program: str = "python -m zoo.generate") -> None:
    arguments = _arguments(argv, program)
    with exit_with_message():
        compile_cache.enable()
        model = checkpoints.read_config(arguments.workdir).model
        _check_head(arguments, model.head)
        if model.head == "values":
            run = checkpoints.load_run(arguments.workdir, arguments.step)
            series.command(run, arguments.output, arguments.workdir, arguments.horizon, arguments.window)
            return
        heads.require_tokens(model, f"--workdir={arguments.workdir}")
        _check(arguments)
        given = _prompts(arguments)
        run = checkpoints.load_run(arguments.workdir, arguments.step)
        context = state_file.load(arguments.load_state, run) if arguments.load_state is not None else None
        with contextlib.suppress(AttributeError):  # a notebook's
            sys.stdout.reconfigure(errors="replace")
        if arguments.interactive or arguments.save_state is not None:
            _take_turns(arguments, run, given, context)
        else:
            begin = [run.tokenizer.separator_id] if context is None else []
            _write_texts(arguments, run, prompts.asked(given, run.tokenizer, begin), context)


if __name__ == "__main__":
    main()
