"""A run as a model of lm-evaluation-harness (`lm_eval.api.model`): every kind of request, by the run's tokenizer."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import tokenizers
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from zoo import checkpoints, files
from zoo.data.tokenizer import LARGEST_FILE, Tokenizer
from zoo.errors import UsageError
from zoo.evaluate.harness.prefixes import Costs, Query, Score, score
from zoo.generate import Request, Sampling, TextStream, answer

_TEXTS = 16  # written at once


class Beginning(NamedTuple):
    """Which tokens stand before a text.

    A run trained here begins every document with its separator, and a context too. An imported one begins as its own
    package's tokenizer says (its post-processor): most with nothing, Llama's with a token of their own.
    """

    prefix: int  # what an empty context, and a text that is scored as a whole, begins with
    of_context: tuple[int, ...] = ()
    of_text: tuple[int, ...] = ()  # scored, after the prefix
    end: int | None = None  # ends what is generated; None: the prefix


def beginning(workdir: pathlib.Path, tokenizer: Tokenizer) -> Beginning:
    """Of the run in `workdir`, whose tokenizer is `tokenizer`."""
    origin, own = workdir / checkpoints.ORIGIN, workdir / "tokenizer.json"
    separator = tokenizer.separator_id
    if not (origin / own.name).is_file() or not own.is_file():
        return Beginning(separator, of_context=(separator,))
    content = files.read_bytes(origin / own.name, LARGEST_FILE)
    if content != files.read_bytes(own, LARGEST_FILE):
        return Beginning(separator, of_context=(separator,))
    theirs = tokenizers.Tokenizer.from_str(content.decode())
    encoded = theirs.encode("a")
    special = encoded.special_tokens_mask
    added = tuple(encoded.ids[: special.index(0) if 0 in special else 0])
    bos, eos = (_special(origin, theirs, name) for name in ("bos_token", "eos_token"))
    end = separator if eos is None else eos
    return Beginning(end if bos is None else bos, added, added, end)


def _special(folder: pathlib.Path, tokenizer: tokenizers.Tokenizer, name: str) -> int | None:
    """The id of the special token that a tokenizer's files call `name`."""
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / file).is_file():
            token = files.read_json(folder / file, LARGEST_FILE).get(name)
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str) and tokenizer.token_to_id(token) is not None:
                return tokenizer.token_to_id(token)
    return None


class RunLM(TemplateLM):
    """A reopened run, for `lm_eval.simple_evaluate(model=RunLM(...))`.

    Context and continuation are encoded together and split where the context's tokens end, as the harness does. What is
    longer than `max_length` loses its beginning.

    Args:
      max_length: tokens that are read at most, of context and continuation.
      share, pack: see `prefixes.score`.

    Attributes:
      costs: what reading took so far.
      num_cut: contexts that lost their beginning.
    """

    def __init__(
        self, run: checkpoints.Run, begins: Beginning, max_length: int, *, share: bool = True, pack: bool = True
    ):
        super().__init__()
        self.costs, self.num_cut = Costs(), 0
        self._model, self._tokenizer, self._begins = run.model, run.tokenizer, begins
        self._max_length, self._ways = max_length, {"share": share, "pack": pack}

    @property
    def eot_token_id(self) -> int:
        return self._begins.prefix if self._begins.end is None else self._begins.end

    @property
    def prefix_token_id(self) -> int:
        return self._begins.prefix

    @property
    def max_length(self) -> int:
        return self._max_length

    @property
    def tokenizer_name(self) -> str:
        return self._tokenizer.fingerprint

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **options: Any) -> list[int]:
        before = self._begins.of_context if add_special_tokens in (None, True) else ()
        return [*before, *self._tokenizer.encode(string).tolist()]

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **options: Any
    ) -> list[tuple[float, bool]]:
        return [tuple(found) for found in self._scores([request[1:] for request in requests], disable_tqdm)]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Of whole texts: windows of `max_length` tokens that overlap in one token, each token scored once."""
        windows, counts = [], []
        for request in requests:
            tokens = [*self._begins.of_text, *self._tokenizer.encode(request.args[0]).tolist()]
            found = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1)
            windows += map(make_disjoint_window, found)
            counts.append(len(windows))
        nats = [found.log_likelihood for found in self._scores(windows, disable_tqdm)]
        starts = [0, *counts]
        return [sum(nats[begin:end]) for begin, end in zip(starts, counts, strict=False)]

    def _scores(self, pairs: Sequence[tuple[list[int], list[int]]], quiet: bool) -> list[Score]:
        queries = []
        for context, continuation in pairs:
            if not continuation:
                raise UsageError("--harness: a continuation that adds no token to its context cannot be scored")
            room = self.max_length + 1 - len(continuation)  # the last token is predicted, and not read
            if room < 1:
                raise UsageError(
                    f"--harness: a continuation has {len(continuation)} tokens, of {self.max_length} that are read at "
                    "most; give a larger --context_length"
                )
            self.num_cut += len(context) > room
            queries.append(Query(context[-room:], continuation))
        with tqdm(total=len(queries), desc="scoring", disable=quiet or None) as bar:
            return score(self._model, queries, costs=self.costs, on_scored=bar.update, **self._ways)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Texts up to the first of the request's `until`, the end of the document, or `max_gen_toks` tokens."""
        asked, streams = [], []
        for request in requests:
            context, options = request.args[0], dict(normalize_gen_kwargs(request.args[1]))
            streams.append(TextStream(self._tokenizer, stops=list(filter(None, options.pop("until")))))
            max_tokens = options.pop("max_gen_toks")
            asked.append(Request(self._prompt(context, max_tokens), max_tokens, _sampling(options)))

        with tqdm(total=len(requests), desc="generating", disable=disable_tqdm or None) as bar:

            def on_end(number: int, ended: str, tokens: list[int], chances: list) -> None:
                if ended != "stop":
                    streams[number].end()
                bar.update()

            answer(
                self._model, asked, batch_size=_TEXTS, stop_id=self.eot_token_id,
                on_token=lambda number, token: streams[number].push(token)[1], on_end=on_end,
            )  # fmt: skip
        return [stream.text for stream in streams]

    def _prompt(self, context: str, max_tokens: int) -> list[int]:
        room = self.max_length - max_tokens
        if room < 1:
            raise UsageError(
                f"--harness: a task asks for up to {max_tokens} new tokens, and context and text together have at most "
                f"{self.max_length}; give a larger --context_length"
            )
        tokens = self.tok_encode(context) if context else [self.prefix_token_id]
        self.num_cut += len(tokens) > room
        return tokens[-room:]


def _sampling(options: dict[str, Any]) -> Sampling:
    """Of the harness' generation arguments: greedy, unless they say do_sample."""
    is_random = options.pop("do_sample")
    known = [field.name for field in dataclasses.fields(Sampling)]
    if unknown := sorted(set(options) - set(known)):
        raise UsageError(f"--harness: a task generates with {', '.join(unknown)}; known: do_sample, {', '.join(known)}")
    return Sampling(**options) if is_random else dataclasses.replace(Sampling(**options), temperature=0.0)
