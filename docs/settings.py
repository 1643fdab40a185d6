"""Writes docs/settings.md, the table of every setting, from their declarations:

python docs/settings.py
"""

import pathlib
import sys

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from zoo.config import Config  # noqa: E402
from zoo.settings import Setting, declarations  # noqa: E402

HEAD = """\
# Settings

Every setting, as `python train.py --list` shows it: `--config.NAME=VALUE` on a command line, an object of sections in a
run's `config.json`. Written by `python docs/settings.py` from the declarations (`zoo/config/sections.py`,
`zoo/sharding/mesh.py`, and a family's own in `zoo/mixers/<family>.py`); `tests/zoo/test_settings.py` holds it to them.

Whole numbers are at most 2^31 - 1. Other numbers are finite, and within their range in float32 too. What relates two
settings (heads that divide a width, a batch that splits into microbatches) is checked besides, and a size that does not
fit into the memory is refused before it is allocated (`zoo/memory.py`).
"""


def render() -> str:
    """The page."""
    lines, last = [HEAD], None
    for name, declared in declarations(Config):
        section, _, field = name.rpartition(".")
        if section != last:
            lines += [""] if last is not None else []
            lines += [f"## {section}\n", "| setting | default | what it is | values |", "|---|---|---|---|"]
        lines.append(_row(field, declared))
        last = section
    return "\n".join(lines) + "\n"


def _row(field: str, declared: Setting) -> str:
    default = "" if declared.default == "" else f"`{declared.default}`"
    values = declared.values.replace("|", "/")
    return f"| `{field}` | {default} | {declared.text.replace('|', '/')} | {values} |"


if __name__ == "__main__":
    (ROOT / "docs" / "settings.md").write_text(render())
