"""Options of a source: what stands behind `?` in data.source, as in `mqar?vocab_size=256&pairs=8`."""

import urllib.parse
from collections.abc import Mapping
from typing import Any

from zoo.errors import UsageError
from zoo.settings import Setting, nearest, shown


def read(name: str, query: str, known: Mapping[str, Setting]) -> dict[str, Any]:
    """What `query` sets, by name. Their ranges are left to whoever knows what else was set.

    Args:
      name: of the source, for messages.
      query: `a=1&b=2`; `%26` is an & in a value. Empty: nothing.

    Raises:
      UsageError: an unknown option, one without a value or twice, or a value of another type.
    """
    found = {}
    for entry in query.split("&") if query else ():
        option, equals, text = entry.partition("=")
        if option not in known:
            near = nearest(option, known) or "none"
            raise UsageError(f"{name}: unknown option {shown(option)}; known, nearest first: {near}")
        if not equals or option in found:
            default = known[option].default
            example = f"{name}?{option}={'...' if default == '' else default}"
            raise UsageError(f"{name}: got {shown(entry)}, expected each option once, as in {example}")
        try:
            found[option] = known[option].read(urllib.parse.unquote(text))
        except ValueError as error:
            raise UsageError(f"{name}: {option}: {error}") from None
    return found
