"""Let a trained model write.

    python -m zoo.generate --workdir=runs/gla --prompt="def main(" --max_tokens=200
    python -m zoo.generate --workdir=runs/gla --prompts=questions.jsonl --output=answers.jsonl

Text goes to stdout as it is made, with several prompts in their order; the costs go to stderr. Control characters,
which a terminal would obey, are shown as escapes such as \\x1b, line ends and tabs left as they are; --raw: none.
"""

import argparse
import contextlib
import sys

from zoo import checkpoints, compile_cache
from zoo.errors import UsageError, exit_with_message
from zoo.files import expand
from zoo.generate import prompts
from zoo.generate.batch import Texts
from zoo.generate.engine import Generation
from zoo.generate.request import SETTINGS, check
from zoo.generate.text import check_stops
from zoo.settings import Parser, argument, flag


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
    add("--batch_size", type=argument(int), help="texts written at once, others wait for a place; default: all")
    add = parser.add_argument_group("what to write").add_argument
    for name, declared in SETTINGS.items():
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
    add("--raw", action="store_true", help="write control characters as they are: for a file, not for a terminal")
    return parser.parse_args(argv)


def _prompts(arguments: argparse.Namespace) -> list[prompts.Prompt]:
    settings = {name: getattr(arguments, name) for name in SETTINGS}
    single = prompts.given(arguments.prompt, arguments.prompt_file, settings, arguments.stop)
    if arguments.prompts is None:
        if not single:
            raise UsageError("no prompt; give --prompt=TEXT (empty: begin a document), --prompt_file or --prompts")
        return single
    if single:
        raise UsageError("--prompts: a file of prompts goes without --prompt and --prompt_file; put them into the file")
    return prompts.listed(arguments.prompts, settings, arguments.stop)


def _costs(result: Generation, rows: int) -> str:
    return (
        f"prefill: {result.prefill_tokens} tokens, {result.prefill_tokens / result.prefill_seconds:,.0f} tokens/s; "
        f"decode: {result.decode_tokens} tokens, {result.decode_tokens / result.decode_seconds:,.0f} tokens/s; "
        f"state: {result.state_bytes // rows:,} bytes a sequence; compiling: {result.compile_seconds:.1f} s"
    )


def main(argv: list[str] | None = None, program: str = "python -m zoo.generate") -> None:
    arguments = _arguments(argv, program)
    with exit_with_message():
        compile_cache.enable()
        check_stops(arguments.stop)
        if arguments.logprobs is not None and arguments.output is None:
            raise UsageError("--logprobs: a text shows none; give --output=FILE.jsonl, or --output=- for stdout")
        given = _prompts(arguments)
        run = checkpoints.load_run(arguments.workdir, arguments.step)
        asked = prompts.asked(given, run.tokenizer, [run.tokenizer.separator_id])
        check(run.model, [one.request for one in asked], None, arguments.batch_size, arguments.logprobs)
        with contextlib.suppress(AttributeError):  # a notebook's
            sys.stdout.reconfigure(errors="replace")
        texts = Texts(run, asked, None, arguments.stop_at_separator)
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


if __name__ == "__main__":
    main()
