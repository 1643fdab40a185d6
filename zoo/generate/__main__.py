"""Let a trained model write.

    python -m zoo.generate --workdir=runs/gla --prompt="def main(" --max_tokens=200

Text goes to stdout as it is made, with several prompts in their order; the costs go to stderr. Control characters,
which a terminal would obey, are shown as escapes such as \\x1b, line ends and tabs left as they are; --raw: none.
"""

import argparse
import contextlib
import os
import sys

import numpy as np

from zoo import checkpoints, compile_cache, data
from zoo.errors import UsageError, exit_with_message
from zoo.files import expand
from zoo.generate.sampler import Generation, Sampling, check_request, generate
from zoo.settings import Parser, argument
from zoo.terminal import printable

_LARGEST_PROMPT = 16 << 20  # bytes


def _arguments(argv: list[str] | None, program: str) -> argparse.Namespace:
    parser = Parser(program, __doc__)
    add = parser.add_argument
    add("--workdir", type=expand, required=True, help="the run to load")
    add("--step", type=argument(int, at_least=0), help="the checkpoint's step; default: the newest")
    add("--prompt", action="append", default=[], help="may be repeated; empty: begin a document")
    add("--prompt_file", type=expand, action="append", default=[], help="its content is a prompt; repeatable; -: stdin")
    add("--max_tokens", type=argument(int, unit="token"), default=200, help="tokens to write at most, a prompt")
    add("--temperature", type=argument(float, at_least=0), default=1.0, help="0: always the likeliest token")
    add("--top_k", type=argument(int, at_least=0), default=0, help="draw from the k likeliest tokens; 0: all")
    add(
        "--top_p", type=argument(float, above=0, at_most=1), default=1.0,
        help="draw from the likeliest tokens that hold this share of probability",
    )  # fmt: skip
    add("--seed", type=argument(int, at_least=0, at_most=2**32 - 1), default=0, help="of the draws")
    add(
        "--stop_at_separator", action=argparse.BooleanOptionalAction, default=True,
        help="end where the model ends the document; --no-stop_at_separator: it may not, and writes max_tokens",
    )  # fmt: skip
    add("--raw", action="store_true", help="write control characters as they are: for a file, not for a terminal")
    return parser.parse_args(argv)


def _prompts(arguments: argparse.Namespace, tokenizer: data.tokenizer.Tokenizer) -> list[list[int]]:
    """The tokens of each prompt, the separator before them not among them."""
    texts = [(f"--prompt={prompt}", os.fsencode(prompt)) for prompt in arguments.prompt]
    for path in arguments.prompt_file:
        try:
            with contextlib.nullcontext(sys.stdin.buffer) if path == "-" else open(path, "rb") as file:
                content = file.read(_LARGEST_PROMPT + 1)  # of a pipe too: --prompt_file=<(command)
        except OSError as error:
            raise UsageError(f"--prompt_file: {path!r} cannot be read ({error.strerror})") from error
        if len(content) > _LARGEST_PROMPT:
            raise UsageError(f"--prompt_file: {path!r} has more than {_LARGEST_PROMPT >> 20} MiB; give a shorter one")
        texts.append((f"--prompt_file={path}", content))
    if not texts:
        raise UsageError("no prompt; give --prompt=TEXT (empty: begin a document) or --prompt_file=PATH")
    prompts = []
    for name, text in texts:
        try:
            prompts.append(tokenizer.encode_bytes(text).tolist())
        except UnicodeDecodeError as error:
            raise UsageError(f"{name}: not UTF-8 at byte {error.start}, which this tokenizer needs") from error
    return prompts


class Printer:
    """Prompts and what follows them: the first text as it is made, the others when all are done (one cursor)."""

    def __init__(self, prompts: list[list[int]], tokenizer: data.tokenizer.Tokenizer, raw: bool = False):
        self._prompts, self._tokenizer, self._raw = prompts, tokenizer, raw
        self._decoder = tokenizer.stream_decoder()  # of prompt and text, for a character may begin in the prompt
        self._write(self._heading(0) + "".join(map(self._decoder.push, prompts[0])))

    def on_token(self, row: int, token: int) -> None:
        if row == 0:
            self._write(self._decoder.push(token))

    def finish(self, tokens: list[list[int]]) -> None:
        self._write(self._decoder.flush() + "\n")
        for row in range(1, len(tokens)):
            self._write(self._heading(row) + self._tokenizer.decode(self._prompts[row] + tokens[row]) + "\n")

    def _heading(self, row: int) -> str:
        return f"--- {row + 1} of {len(self._prompts)} ---\n" if len(self._prompts) > 1 else ""

    def _write(self, text: str) -> None:
        sys.stdout.write(text if self._raw else printable(text))
        sys.stdout.flush()


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
        sampling = Sampling(arguments.temperature, arguments.top_k, arguments.top_p)
        run = checkpoints.load_run(arguments.workdir, arguments.step)
        tokenizer = run.tokenizer
        texts = _prompts(arguments, tokenizer)
        prompts = [[tokenizer.separator_id, *text] for text in texts]  # as documents begin in training
        allowed = np.ones(run.model.vocab_size, bool)
        allowed[tokenizer.separator_id] = arguments.stop_at_separator
        check_request(run.model, prompts, arguments.max_tokens)
        with contextlib.suppress(AttributeError):  # a notebook's
            sys.stdout.reconfigure(errors="replace")
        printer = Printer(texts, tokenizer, arguments.raw)
        result = generate(
            run.model, prompts, arguments.max_tokens, sampling,
            seed=arguments.seed, stop_id=tokenizer.separator_id, allowed=allowed, on_token=printer.on_token,
        )  # fmt: skip
        printer.finish(result.tokens)
        print(f"step {run.step}; {_costs(result, len(texts))}", file=sys.stderr)


if __name__ == "__main__":
    main()
