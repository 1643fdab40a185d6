"""One page that holds all it shows: no network, no script, light and dark, from a phone's width on.

What stands in files of runs is text: all of it is escaped, and the page's policy allows nothing but its own style.
"""

from collections.abc import Iterable, Mapping, Sequence

from zoo.evaluate import svg
from zoo.figures import Chart, Intervals, Table

# Of dark pages: those of `zoo.plots.COLOURS` in the same order, lighter.
_DARK = ("#9d8df1", "#f0919e", "#55c47e", "#6cc4f5", "#e573ad", "#cfcf62", "#63d6c2", "#dd8cd2", "#f4c05f")
_LONG = 32  # rows of a table, more than which are shown when asked for
_MOST_LINES = 64  # of a chart, that a legend can point at

_STYLE = """
:root { color-scheme: light dark; --bg: #ffffff; --fg: #1c1c1e; --muted: #5c5f66; --grid: #e4e4e8; --card: #f6f6f8;
  LIGHT }
@media (prefers-color-scheme: dark) {
  :root { --bg: #131316; --fg: #ececf0; --muted: #a5a8b0; --grid: #303038; --card: #1d1d22;
    DARK }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 16px clamp(12px, 3vw, 40px) 48px; max-width: 1720px; background: var(--bg);
  color: var(--fg); font: 15px/1.45 system-ui, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.5rem; margin: .3em 0; } h2 { font-size: 1.15rem; margin: 1.8em 0 .5em; }
p { margin: .3em 0; max-width: 75ch; } .muted { color: var(--muted); }
.flow { display: flex; flex-wrap: wrap; gap: 14px; align-items: flex-start; }
figure, .card { margin: 0; background: var(--card); border-radius: 8px; padding: 10px 12px; min-width: 0; }
figure { flex: 1 1 380px; max-width: 520px; } .card { max-width: 100%; } .scroll { overflow-x: auto; }
figcaption, summary, .title { font-weight: 600; margin-bottom: 4px; } summary { cursor: pointer; }
svg { display: block; width: 100%; height: auto; } svg text { font: 11px system-ui, sans-serif; fill: var(--muted); }
svg text.label { fill: var(--fg); } .grid { stroke: var(--grid); }
path.marked { stroke: var(--muted); stroke-dasharray: 2 3; }
ul.legend { list-style: none; margin: 6px 0 0; padding: 0; display: flex; flex-wrap: wrap; gap: 2px 14px;
  font-size: 13px; }
ul.legend li { display: flex; align-items: center; gap: 6px; min-width: 0; } svg.swatch { width: 36px; flex: none; }
table { border-collapse: separate; border-spacing: 0; font-size: 14px; font-variant-numeric: tabular-nums; }
th, td { padding: 3px 10px; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--grid); }
th { color: var(--muted); font-weight: 500; vertical-align: bottom; }
th:not(.text) { white-space: normal; min-width: 9ch; }
.text { text-align: left; } tr > :first-child { padding-left: 0; }
tr > .text:first-child { position: sticky; left: 0; background: var(--card); }
@media print { figure, .card { break-inside: avoid; } }
"""


class Section:
    """A heading, and tables and charts under it. `notes` are sentences."""

    def __init__(
        self,
        title: str,
        charts: Iterable[Chart | Intervals] = (),
        tables: Iterable[Table] = (),
        notes: Iterable[str] = (),
    ):
        self.title, self.charts, self.tables, self.notes = title, [*charts], [*tables], [*notes]


def page(title: str, about: Sequence[str], mixers: Mapping[str, str], sections: Sequence[Section]) -> str:
    """The page.

    Args:
      about: lines under the title.
      mixers: `model.mixer` of each run by its name, in the order of the runs; a run keeps its look in all charts.
    """
    looks = _looks(mixers)
    body = [f"<h1>{svg.escaped(title)}</h1>", *(f'<p class="muted">{svg.escaped(line)}</p>' for line in about)]
    for section in sections:
        body.append(f"<section><h2>{svg.escaped(section.title)}</h2>")
        body += [f"<p>{svg.escaped(note)}</p>" for note in section.notes]
        body.append('<div class="flow">')
        body += [_figure(chart, looks) for chart in section.charts]
        body += [_table(table) for table in section.tables]
        body.append("</div></section>")
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{svg.escaped(title)}</title><style>{_style()}</style></head>\n<body>"
        + "\n".join(body)
        + "</body></html>\n"
    )


def _style() -> str:
    from zoo import plots  # matplotlib, which few commands need

    light, dark = (
        " ".join(f"--c{i}: {colour};" for i, colour in enumerate([*colours, "var(--fg)"]))
        for colours in (plots.COLOURS, _DARK)
    )
    # Whoever points at a name sees its line alone.
    lines = "\n".join(
        f"figure:has(li.k{i}:hover, li.k{i}:focus) .l:not(.k{i}) {{ opacity: .12; }}" for i in range(_MOST_LINES)
    )
    return _STYLE.replace("LIGHT", light).replace("DARK", dark) + lines + "\nli .l { opacity: 1 !important; }\n"


def _looks(mixers: Mapping[str, str]) -> dict[str, svg.Look]:
    """As `zoo.plots` draws the runs: attention in the page's own colour, and thick. Markers are a page's own."""
    from zoo import plots

    found = {}
    for i, (run, style) in enumerate(zip(mixers, plots.styles([*mixers.values()]), strict=True)):
        is_attention = style.color not in plots.COLOURS
        colour = len(plots.COLOURS) if is_attention else plots.COLOURS.index(style.color)
        found[run] = svg.Look(colour, _dash(style.linestyle), i, 2.6 if is_attention else 1.6)
    return found


def _dash(linestyle: str | tuple) -> str:
    return "" if isinstance(linestyle, str) else " ".join(f"{1.5 * length:g}" for length in linestyle[1])


def _figure(chart: Chart | Intervals, looks: Mapping[str, svg.Look]) -> str:
    if isinstance(chart, Intervals):
        picture = svg.intervals(chart, [looks[name] for name, *_ in chart.rows])
        return f"<figure><figcaption>{svg.escaped(chart.title)}</figcaption>{picture}</figure>"
    if len(looks) == 1 or len({line.run for line in chart.lines}) < len(chart.lines):
        from zoo import plots

        own = []
        for i in range(len(chart.lines)):
            again, colour = divmod(i, len(plots.COLOURS))
            own.append(svg.Look(colour, _dash(plots.DASHES[again % len(plots.DASHES)]), i))
    else:
        own = [looks[line.run] for line in chart.lines]
    picture = svg.draw(chart, own)
    if not picture:
        return ""
    legend = "".join(
        f'<li class="k{i}" tabindex="0">{svg.swatch(look)}<span>{svg.escaped(line.name)}</span></li>'
        for i, (line, look) in enumerate(zip(chart.lines, own, strict=True))
    )
    legend = f'<ul class="legend">{legend}</ul>' if len(chart.lines) > 1 else ""
    return f"<figure><figcaption>{svg.escaped(chart.title)}</figcaption>{picture}{legend}</figure>"


def _table(table: Table) -> str:
    def cells(row: Sequence[str], tag: str) -> str:
        classes = [' class="text"' if i < table.texts else "" for i, _ in enumerate(row)]
        return "".join(f"<{tag}{of}>{svg.escaped(cell)}</{tag}>" for of, cell in zip(classes, row, strict=True))

    rows = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in table.rows)
    title, label = svg.escaped(table.title), f'aria-label="{svg.escaped(table.title)}"'
    body = f"<thead><tr>{cells(table.headings, 'th')}</tr></thead><tbody>{rows}</tbody>"
    body = f'<div class="scroll" tabindex="0"><table {label}>{body}</table></div>'
    if len(table.rows) > _LONG:
        return f'<details class="card"><summary>{title} ({len(table.rows)} rows)</summary>{body}</details>'
    title = f'<div class="title">{title}</div>' if title else ""
    return f'<div class="card">{title}{body}</div>'
