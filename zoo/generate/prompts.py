"""The prompts of a command line: of flags, of files that are one prompt each, of files with one on each line."""

import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from zoo.data.tokenizer import Tokenizer
from zoo.errors import UsageError
from zoo.generate.request import SETTINGS, Request
from zoo.generate.sampling import Sampling
from zoo.generate.text import check_stops
from zoo.settings import nearest, shown

_LARGEST_PROMPT, _LARGEST_LIST = 16 << 20, 256 << 20  # bytes
_JSON_LINES = (".jsonl", ".ndjson")


class Prompt(NamedTuple):
    """A prompt as it was given."""

    where: str  # for messages: "--prompts: x.jsonl, line 3"
    text: bytes
    settings: dict[str, Any]  # of SETTINGS
    stops: tuple[str, ...]


class Asked(NamedTuple):
    """A prompt as it is answered."""

    request: Request
    stops: tuple[str, ...]
    text: list[int]  # the prompt's tokens without the separator before them


def given(texts: Sequence[str], files: Sequence[str], settings: dict[str, Any], stops: Sequence[str]) -> list[Prompt]:
    """Of --prompt and --prompt_file.

    Raises:
      UsageError: a file that cannot be read, or is too large.
    """
    prompts = [(f"--prompt={text}", os.fsencode(text)) for text in texts]
    prompts += [(f"--prompt_file={path}", _content("--prompt_file", path, _LARGEST_PROMPT)) for path in files]
    return [Prompt(where, text, settings, tuple(stops)) for where, text in prompts]


def listed(path: str, settings: dict[str, Any], stops: Sequence[str]) -> list[Prompt]:
    """Of --prompts: a line of text each, or of a .jsonl file a JSON string or an object, whose settings go before
    `settings` and `stops`. Empty lines are left out.

    Raises:
      UsageError: a file that cannot be read or has no prompt; a line that is not one.
    """
    lines = _content("--prompts", path, _LARGEST_LIST).split(b"\n")
    numbered = [(f"--prompts: {path}, line {n}", line.removesuffix(b"\r")) for n, line in enumerate(lines, 1)]
    numbered = [(where, line) for where, line in numbered if line.strip()]
    if not numbered:
        raise UsageError(f"--prompts: {path!r} has no prompt; expected one on each line")
    if path.endswith(_JSON_LINES):
        return [_of_json(where, line, settings, stops) for where, line in numbered]
    return [Prompt(where, line, settings, tuple(stops)) for where, line in numbered]


def asked(prompts: Sequence[Prompt], tokenizer: Tokenizer, before: Sequence[int]) -> list[Asked]:
    """The requests, each prompt after the tokens `before`: as a document begins in training, with the separator.

    Raises:
      UsageError: text that the tokenizer cannot read.
    """
    found = []
    for prompt in prompts:
        text = encoded(tokenizer, prompt.text, prompt.where)
        own = dict(prompt.settings)
        numbers = {field.name: own.pop(field.name) for field in dataclasses.fields(Sampling)}
        found.append(Asked(Request([*before, *text], sampling=Sampling(**numbers), **own), prompt.stops, text))
    return found


def encoded(tokenizer: Tokenizer, text: bytes, where: str) -> list[int]:
    """Its tokens. UsageError, naming `where` it stands, for what the tokenizer cannot read."""
    try:
        return tokenizer.encode_bytes(text).tolist()
    except UnicodeDecodeError as error:
        raise UsageError(f"{where}: not UTF-8 at byte {error.start}, which this tokenizer needs") from error


def _of_json(where: str, line: bytes, settings: dict[str, Any], stops: Sequence[str]) -> Prompt:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, nested without end
        raise UsageError(f"{where}: no JSON ({shown(str(error))}); expected a string or an object") from error
    own = {"prompt": value} if isinstance(value, str) else value
    text = own.get("prompt") if isinstance(own, dict) else None
    if not isinstance(text, str):
        raise UsageError(f'{where}: got {shown(value)}, expected a string or {{"prompt": "...", ...}}')
    found = dict(settings)
    for name, setting in own.items():
        if name in ("prompt", "stop"):
            continue
        if name not in SETTINGS:
            known = nearest(name, [*SETTINGS, "stop"])
            raise UsageError(f"{where}: unknown setting {shown(name)}; known, nearest first: {known}")
        found[name] = SETTINGS[name].convert(setting)
        if problem := SETTINGS[name].problem(found[name]):
            raise UsageError(f"{where}: {name}: {problem}")
    stops = own.get("stop", [*stops])
    stops = [stops] if isinstance(stops, str) else stops
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise UsageError(f"{where}: stop: got {shown(stops)}, expected a string, or a list of strings")
    try:
        check_stops(stops)
        return Prompt(where, text.encode(), found, tuple(stops))
    except UnicodeEncodeError as error:
        raise UsageError(f"{where}: its prompt has half of a character ({error.reason})") from error
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from error


def _content(flag: str, path: str, largest: int) -> bytes:
    """Of a file, or of a pipe: --prompt_file=<(command), or - for stdin."""
    try:
        with contextlib.nullcontext(sys.stdin.buffer) if path == "-" else open(path, "rb") as file:
            content = file.read(largest + 1)
    except OSError as error:
        raise UsageError(f"{flag}: {path!r} cannot be read ({error.strerror})") from error
    if len(content) > largest:
        raise UsageError(f"{flag}: {path!r} has more than {largest >> 20} MiB; give a shorter one")
    return content
