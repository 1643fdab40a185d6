"""Settings that are lists written as text: data.weights, optimizer.learning_rate_factors, optimizer.trainable,
mesh.overrides, model.mixer, biases, dilations.

A reader raises ValueError with "got ..., expected ..."; a declaration's check and the code that uses the list call it.
"""

import re
import warnings
from collections.abc import Iterator, Sequence

from zoo.settings import shown

MIN_WEIGHT = 1e-6  # of a source; its inverse is the largest
MAX_FACTOR = 1000  # of a learning rate
MAX_REPEATS = 4  # in a regex, and as many groups
MAX_REGEX = 200  # characters


def weights(text: str) -> list[float]:
    """ "3,1" as numbers; empty: none."""
    found = []
    for entry in text.split(",") if text.strip() else ():
        try:
            found.append(float(entry))
        except ValueError:
            found.append(0.0)
        if not MIN_WEIGHT <= found[-1] <= 1 / MIN_WEIGHT:
            raise ValueError(
                f"got {shown(entry)}, expected a number from {MIN_WEIGHT:g} to {1 / MIN_WEIGHT:g} for each source, "
                "comma-separated, or nothing"
            )
    return found


def names(text: str) -> list[str]:
    """ "q,k,v", or "q+k+v", as names; empty: none."""
    found = [entry.strip() for entry in re.split("[,+]", text)] if text.strip() else []
    for i, name in enumerate(found):
        if not name or name in found[:i]:
            raise ValueError(f"got {shown(text)}, expected different names, comma-separated, or nothing")
    return found


def counts(text: str) -> list[int]:
    """ "1+2", or "1,2", as whole numbers from 1 on."""
    found = [entry.strip() for entry in re.split("[,+]", text)]
    if not all(re.fullmatch("[1-9][0-9]{0,4}", entry) for entry in found):
        raise ValueError(f"got {shown(text)}, expected whole numbers from 1 to 99999, as in 1+2")
    return [int(entry) for entry in found]


def places(text: str) -> list[tuple[str, tuple[tuple[str, str], ...]]]:
    """ "gla,attention@window=512@positions=none" as (family, its settings there, each a name and a value)."""
    found = []
    for entry in text.split(","):
        family, *settings = (part.strip() for part in entry.split("@"))
        pairs = [tuple(part.strip() for part in setting.split("=", 1)) for setting in settings]
        if any(len(pair) < 2 or not pair[0] for pair in pairs):
            raise ValueError(
                f"got {shown(entry)}, expected a family, or family@setting=value, as in attention@window=512"
            )
        if len({name for name, _ in pairs}) < len(pairs):
            raise ValueError(f"got {shown(entry)}, which sets the same twice, expected once")
        found.append((family, tuple(pairs)))
    return found


def learning_rate_factors(text: str) -> list[tuple[str, float]]:
    """ "embed=0.1,gate=2" as (regex, factor)."""
    found = []
    for regex, factor, entry in rules(text):
        try:
            found.append((regex, float(factor)))
        except (ValueError, OverflowError):
            found.append(("", 0.0))
        if not found[-1][0] or not 0 <= found[-1][1] <= MAX_FACTOR:
            raise ValueError(
                f"got {shown(entry)}, expected regex=factor, as in embed=0.1, with a factor from 0 to {MAX_FACTOR}"
            )
        check_repeats(regex)
    return found


def mesh_overrides(text: str, axes: Sequence[str]) -> list[tuple[str, tuple[tuple[str, ...], ...]]]:
    r""" "embed\.embedding=none|data+fsdp" as (regex, the mesh axes of each dimension), of the mesh's `axes`."""
    found = []
    for regex, value, entry in rules(text):
        if not regex:
            raise ValueError(
                f"got {shown(entry)}, expected regex=AXES, a mesh axis or none for each dimension, as in "
                "embed.embedding=none|fsdp"
            )
        names = [() if part == "none" else tuple(part.split("+")) for part in value.replace(" ", "").split("|")]
        used = [name for dimension in names for name in dimension]
        if unknown := [name for name in used if name not in axes]:
            named = shown(unknown[0]) if unknown[0] else "nothing"
            raise ValueError(f"got {named} in {shown(entry)}, expected none or {', '.join(axes)} (two of them: a+b)")
        if twice := [name for name in axes if used.count(name) > 1]:
            raise ValueError(f"got {shown(entry)}, which spreads two dimensions over {twice[0]}, expected one")
        check_repeats(regex)
        found.append((regex, tuple(names)))
    return found


def rules(text: str) -> Iterator[tuple[str, str, str]]:
    """Of "regex=value,...": regex ("" for what is none), value, and the entry as it is written."""
    for entry in filter(None, text.split(",")):
        regex, _, value = entry.rpartition("=")
        if len(regex) > MAX_REGEX:
            raise ValueError(f"got {shown(regex)} of {len(regex)} characters, expected a regex of at most {MAX_REGEX}")
        yield regex if _compiles(regex) else "", value, entry


def regex(text: str) -> str:
    """A regex as it is; empty: none."""
    if len(text) > MAX_REGEX or not _compiles(text):
        raise ValueError(f"got {shown(text)}, expected a regex of at most {MAX_REGEX} characters, or nothing")
    check_repeats(text)
    return text


def _compiles(regex: str) -> bool:
    try:
        with warnings.catch_warnings(action="ignore"):  # of regexes that a later Python may read otherwise
            re.compile(regex)
    except (re.error, ValueError, OverflowError, RecursionError):
        return False
    return True


def check_repeats(regex: str) -> None:
    """ValueError for a regex that may match for ever.

    Python's engine backtracks: a repeat multiplies its time by a name's length, a group by its alternatives, and a
    repeat of a group by far more.
    """
    plain = re.sub(r"\\.|\[\^?\]?[^]]*\]", "x", regex)
    repeats, groups = (len(re.findall(marks, plain)) for marks in (r"(?<!\()[*+?{]", r"\("))
    if max(repeats, groups) > MAX_REPEATS or re.search(r"\)[*+?{]", plain):
        raise ValueError(
            f"got {shown(regex)}, which may match for ever; expected at most {MAX_REPEATS} of * + ? {{, none after "
            f"a group, and at most {MAX_REPEATS} groups"
        )
