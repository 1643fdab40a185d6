"""Prompts answered as text: each token of the engine through its text's stream, to an output."""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from zoo.checkpoints import Run
from zoo.data.tokenizer import Tokenizer
from zoo.generate.engine import Chance, Generation, answer
from zoo.generate.output import Finished, JsonLines, Output, Printer, key
from zoo.generate.prompts import Asked
from zoo.generate.reading import Context
from zoo.generate.request import that_may_be_drawn
from zoo.generate.text import TextStream


class Texts:
    """What `asked` makes, numbered prompt by prompt, sample by sample."""

    def __init__(self, run: Run, asked: Sequence[Asked], context: Context | None, may_end: bool):
        self.run, self.context, self.asked = run, context, asked
        self.places = [(prompt, sample) for prompt, one in enumerate(asked) for sample in range(one.request.samples)]
        self.may_end = may_end
        self._streams: dict[int, TextStream] = {}  # of those that are being written

    def stream(self, number: int) -> TextStream:
        if number not in self._streams:
            one, before = self.asked[self.places[number][0]], self.context.tokens if self.context else ()
            self._streams[number] = TextStream(self.run.tokenizer, one.text, one.stops, before)
        return self._streams[number]

    def printer(self, raw: bool) -> Printer:
        def heading(number: int) -> str:
            prompt, sample = self.places[number]
            name, samples = f"{prompt + 1} of {len(self.asked)}", self.asked[prompt].request.samples
            name += f", sample {sample + 1} of {samples}" if samples > 1 else ""
            return (f"--- {name} ---\n" if len(self.places) > 1 else "") + self.stream(number).prompt

        return Printer(len(self.places), heading, raw)

    def json_lines(self, path: str, logprobs: int | None) -> JsonLines:
        def record(number: int) -> dict[str, Any]:
            prompt, sample = self.places[number]
            return {"prompt": self.stream(number).prompt, "number": prompt, "sample": sample}

        shared = (self.run.fingerprint, self.may_end, logprobs, _digest(self.context.tokens if self.context else ()))
        keys = [key(*shared, _described(self.asked[prompt]), prompt, sample) for prompt, sample in self.places]
        return JsonLines(path, keys, record)

    def write(
        self, output: Output, batch_size: int | None, logprobs: int | None, skip: Callable[[int], bool] | None = None
    ) -> Generation:
        tokenizer = self.run.tokenizer

        def on_token(number: int, token: int) -> bool:
            piece, stopped = self.stream(number).push(token)
            output.piece(number, piece)
            return stopped

        def on_end(number: int, ended: str, tokens: list[int], chances: list[Chance]) -> None:
            stream = self.stream(number)
            if ended != "stop":
                piece, stopped = stream.end()
                output.piece(number, piece)
                ended = "stop" if stopped else ended
            told = [_told(tokenizer, *one) for one in zip(tokens, chances, strict=False)]
            output.finish(number, Finished(stream.text, ended, len(tokens), told))
            del self._streams[number]

        return answer(
            self.run.model, [one.request for one in self.asked], context=self.context, batch_size=batch_size,
            stop_id=tokenizer.separator_id, allowed=that_may_be_drawn(self.run, self.may_end), logprobs=logprobs,
            on_token=on_token, on_end=on_end, skip=skip,
        )  # fmt: skip


def _told(tokenizer: Tokenizer, token: int, chance: Chance) -> dict[str, Any]:
    def spelt(token: int, logprob: float) -> dict[str, Any]:
        return {"token": token, "text": tokenizer.decode([token]), "logprob": logprob}

    return spelt(token, chance.chosen) | {"likeliest": [spelt(*other) for other in chance.likeliest]}


def _described(asked: Asked) -> list[Any]:
    request, sampling = asked.request, vars(asked.request.sampling)
    return [_digest(request.prompt), request.max_tokens, request.seed, sampling, asked.stops]


def _digest(tokens: Sequence[int]) -> str:
    return hashlib.sha256(np.asarray(tokens, np.int32).tobytes()).hexdigest()
