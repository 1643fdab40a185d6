"""A setting is declared once, in its dataclass field: default, what it is, unit, range or choices.

    num_heads: int = setting(0, "heads", zero="one for each 64 of d_model, at least 4")
    rope_base: float = setting(10_000.0, "the slowest pair turns by 1 / base a token", at_least=1)
    gate: str = setting("key", "what a_t is chosen for", choices={"key": "each key dimension", "scalar": "each head"})

From there come its check (`problems`), how flags and JSON are read (`Setting.read`, `Setting.convert`), and what
--list, --help, error messages and docs/settings.md say of it. What relates two settings is code: a family's `check`,
and `zoo.config.validate`.
"""

import argparse
import ctypes
import dataclasses
import difflib
import math
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NoReturn

from zoo.terminal import one_line

INT_MAX = 2**31 - 1  # of int32, in which devices count
MAX_TEXT = 100_000  # characters
_SMALLEST_NORMAL = 2.0**-126  # of float32; devices take what is smaller for 0
_KINDS = {int: "a whole number", float: "a number", bool: "True or False", str: "text"}
_FLAGS = {"true": True, "t": True, "1": True, "false": False, "f": False, "0": False}


@dataclasses.dataclass(frozen=True)
class Setting:
    """The declaration of one setting; `setting` makes the field that carries it."""

    default: Any
    text: str  # what it is, in one sentence
    unit: str  # in the singular
    at_least: float | None
    above: float | None
    at_most: float | None
    below: float | None
    special: Mapping[int, str]  # values beside the range, and what they stand for
    choices: Mapping[str, str]  # and what each means; "" where its name says it
    parse: Callable[[str], Any] | None  # of text that has a form; ValueError: "got ..., expected ..."
    also: tuple[str, ...]  # what other programs call it

    @property
    def kind(self) -> type:
        """int, float, bool or str."""
        return type(self.default)

    @property
    def range(self) -> str:
        """ "at least 1 step", "more than 0 and less than 1", "True or False", "one of adamw, muon"; may be empty."""
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        return self._bounds() if self.kind in (int, float) else _KINDS[self.kind]

    @property
    def values(self) -> str:
        """The range, or the choices with their meanings: "at least 1, or 0: one for each 64 of d_model"."""
        if self.choices:
            return ", ".join(f"{name} ({meaning})" if meaning else name for name, meaning in self.choices.items())
        return self._or_special(self._bounds())

    def describe(self) -> str:
        """ "heads; at least 1, or 0: one for each 64 of d_model"."""
        return "; ".join(filter(None, (self.text, self.values)))

    def problem(self, value: Any) -> str | None:
        """ "got 0, expected at least 1 step"; None if nothing is wrong. Never raises, whatever `value` is."""
        if not self._is_kind(value):
            return self._got(value, _KINDS[self.kind])
        if self.kind is bool or value in self.special or value in self.choices:
            return None
        if self.choices:
            near = difflib.get_close_matches(value[:100], self.choices, 1, 0.5)
            return self._got(value) + (f"; did you mean {near[0]}?" if near else "")
        if self.kind is str:
            return _text_problem(value, self.parse)
        if self.kind is int:
            unsaid = None if value > INT_MAX else INT_MAX
            return None if self._inside(value) else self._got(value, bounds=self._bounds(unsaid))
        exact = _to_float(value)
        if not math.isfinite(exact):
            return self._got(value, "a finite number")
        if not self._inside(exact):
            return self._got(value)
        computed = single(exact)
        if not self._inside(computed, single) or math.isinf(computed):
            return f"{self._got(value)} (float32 takes it for {computed:g})"
        return None

    def read(self, text: str) -> Any:
        """The value of a flag. ValueError says what is wrong with it; its range is left to `problem`."""
        try:
            if self.kind is bool:
                return _FLAGS[text.strip().lower()]
            if self.kind is int:
                return int(text) if text.strip().lstrip("+-").isdecimal() else _whole(float(text))
            return self.kind(text)
        except (KeyError, ValueError):
            raise ValueError(self._got(text, _KINDS[self.kind])) from None

    def convert(self, value: Any) -> Any:
        """A value of JSON: 1000.0 may stand for 1000, and 1 for 1.0. What has another type stays what it is."""
        try:
            if self.kind is int and type(value) is float:
                return _whole(value)
            return float(value) if self.kind is float and type(value) is int else value
        except (ValueError, OverflowError):
            return value

    def _is_kind(self, value: Any) -> bool:
        if self.kind is float:
            return isinstance(value, float) or type(value) is int
        return isinstance(value, self.kind) and not (self.kind is int and isinstance(value, bool))

    def _got(self, value: Any, kind: str = "", bounds: str = "") -> str:
        expected = list(dict.fromkeys(filter(None, (kind, bounds or self.range)))) or ["a finite number"]
        return f"got {shown(value)}, expected {self._or_special(', '.join(expected))}"

    def _or_special(self, expected: str) -> str:
        special = " or ".join(f"{value}: {meaning}" for value, meaning in self.special.items())
        return f"{expected}, or {special}" if special else expected

    def _bounds(self, unsaid: float | None = INT_MAX) -> str:
        """Of the range; the largest int32 goes without saying, unless it is what was passed."""
        bounds = {"at least": self.at_least, "more than": self.above, "at most": self.at_most, "less than": self.below}
        words = {word: bound for word, bound in bounds.items() if bound is not None and bound != unsaid}
        text = " and ".join(f"{word} {number(bound)}" for word, bound in words.items())
        if not (self.unit and words):
            return text
        return f"{text} {self.unit if [*words.values()][-1] == 1 else plural(self.unit)}"

    def _inside(self, value: float, rounded: Callable[[float], float] = lambda bound: bound) -> bool:
        return (
            (self.at_least is None or value >= rounded(self.at_least))
            and (self.above is None or value > rounded(self.above))
            and (self.at_most is None or value <= rounded(self.at_most))
            and (self.below is None or value < rounded(self.below))
        )


def setting(default: Any, text: str, **declaration: Any) -> Any:
    """A dataclass field that declares a setting; see `declare`."""
    return dataclasses.field(default=default, metadata={"setting": declare(default, text, **declaration)})


def declare(
    default: Any,
    text: str,
    *,
    unit: str = "",
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    zero: str = "",
    special: Mapping[int, str] | None = None,
    choices: Iterable[str] | Mapping[str, str] = (),
    parse: Callable[[str], Any] | None = None,
    also: tuple[str, ...] = (),
) -> Setting:
    """A setting.

    Args:
      default: also says of which type it is: int, float, bool or str.
      text: what it is, in one sentence.
      unit: what is counted, in the singular: "token".
      at_least, above, at_most, below: the range. Whole numbers are at least 1 and at most 2^31 - 1 unless they say
        otherwise. Other numbers are finite, and in range in float32 too, where 1e-320 is 0 and 0.99999999999 is 1.
      zero: what 0 stands for, where it is no number of the range.
      special: the same for other values.
      choices: the strings to choose from, and what each means.
      parse: reads text that has a form; its ValueError says "got ..., expected ...".
      also: names that other programs have for it, for "did you mean".
    """
    if type(default) is int:
        at_least = 1 if at_least is None else at_least
        at_most = INT_MAX if at_most is None else at_most
    return Setting(
        default=default,
        text=text,
        unit=unit,
        at_least=at_least,
        above=above,
        at_most=at_most,
        below=below,
        special=({0: zero} if zero else {}) | dict(special or {}),
        choices=dict(choices) if isinstance(choices, Mapping) else dict.fromkeys(choices, ""),
        parse=parse,
        also=also,
    )


def argument(kind: type, **declaration: Any) -> Callable[[str], Any]:
    """The `type` of an argparse flag: int or float, in the range that `declare` takes."""
    return flag(declare(kind(), "", **declaration))


def flag(declared: Setting) -> Callable[[str], Any]:
    """The `type` of the argparse flag of a declared setting."""

    def read(text: str) -> Any:
        try:
            value = declared.read(text)
            problem = declared.problem(value)
        except ValueError as error:
            problem = str(error)
        if problem:
            raise argparse.ArgumentTypeError(problem)
        return value

    return read


class Parser(argparse.ArgumentParser):
    """Of a command's flags; what is wrong with them is one line, as every other error."""

    def __init__(self, program: str, text: str):
        super().__init__(program, description=text.split("\n")[0], allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {one_line(message)}; see --help\n")


def section(config_class: type) -> Any:
    """A dataclass field that holds a section of settings."""
    return dataclasses.field(default_factory=config_class)


def declarations(config_class: type, prefix: str = "") -> Iterator[tuple[str, Setting]]:
    """Every setting of a config dataclass and of its sections, by dotted name, in order."""
    for field in dataclasses.fields(config_class):
        if "setting" in field.metadata:
            yield prefix + field.name, field.metadata["setting"]
        else:
            yield from declarations(field.type, f"{prefix}{field.name}.")


def problems(config: Any, prefix: str = "") -> list[str]:
    """What is wrong with each setting's value by itself, as "train.steps: got 0, expected at least 1 step"."""
    found, fields = [], {field.name for field in dataclasses.fields(config)}
    for name in vars(config).keys() - fields:  # of a config file that says config.optimizer.lr = 1e-3
        known = dict(declarations(type(config), prefix))
        near = suggestions(prefix + name, known) if known else []
        hint = f"did you mean {' or '.join(near)}?" if near else "--list shows them all"
        found.append(f"{prefix}{name}: unknown setting; {hint}")
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), prefix + field.name
        if "setting" not in field.metadata:
            is_section = isinstance(value, field.type)
            found += problems(value, name + ".") if is_section else [f"{name}: got {shown(value)}, expected a section"]
        elif problem := field.metadata["setting"].problem(value):
            found.append(f"{name}: {problem}")
    return found


def single(value: float) -> float:
    """What is left of a number in float32 on a device."""
    rounded = ctypes.c_float(value).value
    return rounded if abs(rounded) >= _SMALLEST_NORMAL else 0.0


def shown(value: Any, width: int = 60) -> str:
    """A value in a message: its repr, shortened, on one line."""
    try:
        text = repr(value) if not isinstance(value, str) or len(value) <= width else repr(value[:width])
    except (ValueError, RecursionError):  # an int of thousands of digits; nested without end
        text = f"{type(value).__name__} without end"
    cut = len(text) > width + 2 or (isinstance(value, str) and len(value) > width)
    return f"{text[: width - 1]}..." if cut else text


def number(value: float) -> str:
    """A bound as messages write it: "2147483647", "1e-08"."""
    return str(value) if isinstance(value, int) else f"{value:g}"


def plural(unit: str) -> str:
    """ "steps", "batches"."""
    return unit + ("es" if unit.endswith("ch") else "s")


def suggestions(name: str, known: Mapping[str, Setting], count: int = 4) -> list[str]:
    """The settings that may have been meant by an unknown dotted name, the likeliest first."""
    asked_section, _, asked = name[:100].lower().replace("-", "_").rpartition(".")

    def likeness(full: str) -> float:
        in_section, _, field = full.rpartition(".")
        names = (field, *known[full].also)
        found = max(difflib.SequenceMatcher(None, asked, other).ratio() for other in names)
        if len(asked) > 1 and (asked in names or asked == "".join(word[0] for word in field.split("_"))):
            found = 1.0
        elif len(asked) > 2 and (asked in field or field in asked or _abbreviates(asked, field)):
            found = max(found, 0.8)
        return found + (0.2 if in_section == asked_section else 0.0)

    scores = {full: likeness(full) for full in known}
    best = max(scores.values())
    likely = [full for full, score in scores.items() if score >= max(0.75, best - 0.25)]
    return sorted(likely, key=scores.get, reverse=True)[:count]


def _abbreviates(short: str, long: str) -> bool:
    """Whether `short` is `long` with letters left out, but not the first."""
    letters = iter(long)
    return short[:1] == long[:1] and all(letter in letters for letter in short)


def nearest(name: str, known: Iterable[str], count: int | None = None) -> str:
    """`known` (the first `count`), those spelt most like `name` first."""
    return ", ".join(sorted(known, key=lambda k: -difflib.SequenceMatcher(None, name[:100].lower(), k).ratio())[:count])


def divisors_near(number: int, near: int, count: int = 3) -> list[int]:
    """The divisors of `number` that come nearest to `near`, in order."""
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    divisors = sorted({*small, *(number // n for n in small)})
    return sorted(sorted(divisors, key=lambda n: abs(n - near))[:count])


def one_of(values: Iterable[Any]) -> str:
    """ "1, 2 or 4"."""
    *others, last = map(str, values)
    return f"{', '.join(others)} or {last}" if others else last


def _whole(value: float) -> int:
    if not (value.is_integer() and abs(value) < 2**53):
        raise ValueError
    return int(value)


def _to_float(value: float) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _text_problem(value: str, parse: Callable[[str], Any] | None) -> str | None:
    if len(value) > MAX_TEXT:
        return f"got {len(value)} characters, expected at most {MAX_TEXT}"
    if any(unicodedata.category(c) in ("Cc", "Zl", "Zp") for c in value):
        return f"got {shown(value)}, expected text of one line, without control characters"
    try:
        value.encode("utf-8", "surrogateescape")  # as paths are read from a command line
    except UnicodeEncodeError:
        return f"got {shown(value)}, expected text that UTF-8 can hold"
    try:
        if parse:
            parse(value)
    except ValueError as error:
        return str(error)
    return None
