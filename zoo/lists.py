"""Settings that are lists written as text: data.weights and optimizer.learning_rate_factors.

A reader raises ValueError with "got ..., expected ..."; a declaration's check and the code that uses the list call it.
"""

import re
import warnings

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


def learning_rate_factors(text: str) -> list[tuple[str, float]]:
    """ "embed=0.1,gate=2" as (regex, factor)."""
    found = []
    for entry in filter(None, text.split(",")):
        regex, _, factor = entry.rpartition("=")
        if len(regex) > MAX_REGEX:
            raise ValueError(f"got {shown(regex)} of {len(regex)} characters, expected a regex of at most {MAX_REGEX}")
        try:
            with warnings.catch_warnings(action="ignore"):  # of regexes that a later Python may read otherwise
                re.compile(regex)
            found.append((regex, float(factor)))
        except (re.error, ValueError, OverflowError, RecursionError):
            found.append(("", 0.0))
        if not found[-1][0] or not 0 <= found[-1][1] <= MAX_FACTOR:
            raise ValueError(
                f"got {shown(entry)}, expected regex=factor, as in embed=0.1, with a factor from 0 to {MAX_FACTOR}"
            )
        # Python's engine backtracks: a repeat multiplies its time by a name's length, a group by its alternatives, and
        # a repeat of a group by far more.
        plain = re.sub(r"\\.|\[\^?\]?[^]]*\]", "x", regex)
        repeats, groups = (len(re.findall(marks, plain)) for marks in (r"(?<!\()[*+?{]", r"\("))
        if max(repeats, groups) > MAX_REPEATS or re.search(r"\)[*+?{]", plain):
            raise ValueError(
                f"got {shown(regex)}, which may match for ever; expected at most {MAX_REPEATS} of * + ? {{, none after "
                f"a group, and at most {MAX_REPEATS} groups"
            )
    return found
