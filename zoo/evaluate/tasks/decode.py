"""What a token costs when the model writes, by the tokens behind it: milliseconds, and bytes of the state."""

import statistics

import numpy as np

from zoo import flops
from zoo.errors import UsageError
from zoo.evaluate.task import Request, Task
from zoo.figures import Chart, Line, line_names, of_runs, shown
from zoo.generate import Sampling, generate

_TIMES = (1, 4, 16)  # training lengths
_WRITTEN, _RUNS = 32, 5  # tokens; times, of which the median counts
_LIKELIEST = Sampling(temperature=0)


class Decode(Task):
    name = "decode"
    about = "milliseconds a token and bytes of the state, by context length, of one sequence"

    def check(self, request):
        if not self._lengths(request):
            positions = request.run.model.max_positions
            raise UsageError(f"--tasks: decode: the model's {positions} learned positions leave no room to write")

    def measure(self, request):
        model, rng, found = request.run.model, np.random.default_rng(0), []
        lengths = self._lengths(request)
        prompts = [rng.integers(0, model.tokenizer_size, length).tolist() for length in lengths]
        # Lengths take turns, so that a slow moment of the machine falls on all of them.
        rounds = [
            [generate(model, [prompt], _WRITTEN, _LIKELIEST) for prompt in prompts]
            for _ in request.track(range(_RUNS), "decode")
        ]
        for length, *runs in zip(lengths, *rounds, strict=True):
            seconds = [run.decode_seconds / run.decode_tokens for run in runs]
            found.append(
                {
                    "context_length": length,
                    "milliseconds": 1000 * statistics.median(seconds),
                    "slowest": 1000 * max(seconds),
                    "prefill_tokens_per_second": length / statistics.median(run.prefill_seconds for run in runs),
                    "state_bytes": flops.state_bytes(request.config.model, length),
                }
            )
        return {"tokens": _WRITTEN, "runs": _RUNS, "by_context_length": found}, {}

    @staticmethod
    def _lengths(request: Request) -> list[int]:
        model, lengths = request.run.model, [times * request.training_length for times in _TIMES]
        room = model.max_positions - _WRITTEN if model.learned_positions else max(lengths)
        return [length for length in lengths if length <= room]

    def tables(self, results):
        headings = ["tokens behind", "ms a token", "slowest of the runs", "tokens/s", "state bytes", "prefill tokens/s"]
        rows = {
            run: [
                [
                    f"{r['context_length']:,}",
                    shown(r["milliseconds"], ".3f"),
                    shown(r["slowest"], ".3f"),
                    f"{1000 / r['milliseconds']:,.0f}",
                    f"{r['state_bytes']:,}",
                    shown(r["prefill_tokens_per_second"], ",.0f"),
                ]
                for r in result["by_context_length"]
            ]
            for run, result in results.items()
        }
        return [of_runs("decode, one sequence", headings, rows)]

    def charts(self, results):
        names = line_names({run: ["one sequence"] for run in results})
        return [
            Chart(
                title,
                "tokens behind",
                y,
                [
                    Line(names[run][0], [(r["context_length"], r[key]) for r in result["by_context_length"]], run)
                    for run, result in results.items()
                ],
                log_y=True,
            )
            for title, y, key in (
                ("Time of a token", "milliseconds", "milliseconds"),
                ("State of one sequence", "bytes", "state_bytes"),
            )
        ]
