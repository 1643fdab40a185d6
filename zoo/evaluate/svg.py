"""A chart as SVG in the text of a page: it takes the page's colours, so that light and dark are the page's matter.

A line is told by colour, dash and marker together. Colours are CSS variables --c0, --c1, ...; the rest is currentColor.
"""

import html
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from zoo.figures import Chart, Intervals
from zoo.terminal import one_line

# Units of the view box: about the pixels of the narrowest phone, where letters are to be as large as the page's.
_WIDTH, _HEIGHT = 316, 228
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 308, 24, 188
_NAMES, _NAME, _ROW = 122, 19, 17  # of intervals: the names' width, their letters at most, a row's height
_MARKED = 12  # points of a line that have a marker, at most

# Around (0, 0).
MARKERS = (
    "M-3 0a3 3 0 1 0 6 0a3 3 0 1 0-6 0Z",  # circle
    "M-2.7-2.7H2.7V2.7H-2.7Z",  # square
    "M0-3.6L3.4 2.6H-3.4Z",  # triangle
    "M0-3.8L3.8 0L0 3.8L-3.8 0Z",  # diamond
    "M0 3.6L3.4-2.6H-3.4Z",  # triangle, downwards
    "M-1.2-3.6H1.2V-1.2H3.6V1.2H1.2V3.6H-1.2V1.2H-3.6V-1.2H-1.2Z",  # plus
    "M0-4.2L1.1-1.2L4.2-1.2L1.7 .8L2.6 4L0 2.1L-2.6 4L-1.7 .8L-4.2-1.2L-1.1-1.2Z",  # star
    "M-3.4-1.6H3.4V1.6H-3.4Z",  # bar
)


def escaped(text: object) -> str:
    """Text for HTML, of one line; quotes too."""
    return html.escape(one_line(text))


class Look(NamedTuple):
    """Of a line. `colour`: the number of a CSS variable; `dash`: of stroke-dasharray; `marker`: of MARKERS."""

    colour: int
    dash: str
    marker: int
    width: float = 1.6


def draw(chart: Chart, looks: Sequence[Look]) -> str:
    """The chart, its i-th line of the class k<i>; empty where it has no point."""
    lines = chart.finite()
    points = [point for line in lines for point in line]
    if not points:
        return ""
    across = _Axis([x for x, _ in points], _LEFT + 6, _RIGHT - 6, 2 if chart.log_x else 0, most=6)
    up = _Axis([y for _, y in points], _BOTTOM - 4, _TOP + 4, 10 if chart.log_y else 0, most=5)
    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escaped(chart.title)}">']
    for value, text in up.ticks():
        y = up.at(value)
        parts.append(f'<path class="grid" d="M{_LEFT} {y:.1f}H{_RIGHT}"/>')
        parts.append(f'<text x="{_LEFT - 5}" y="{y + 3.5:.1f}" text-anchor="end">{text}</text>')
    for value, text in across.ticks():
        x = across.at(value)
        parts.append(f'<path class="grid" d="M{x:.1f} {_TOP}V{_BOTTOM}"/>')
        parts.append(f'<text x="{x:.1f}" y="{_BOTTOM + 14}" text-anchor="middle">{text}</text>')
    parts.append(f'<text class="label" x="2" y="11">{escaped(chart.y)}</text>')
    middle = (_LEFT + _RIGHT) / 2
    under = f'x="{middle}" y="{_BOTTOM + 32}" text-anchor="middle"'
    parts.append(f'<text class="label" {under}>{escaped(chart.x)}</text>')
    if chart.marked:
        value, what = chart.marked
        if across.holds(value):
            x = across.at(value)
            parts.append(f'<path class="marked" d="M{x:.1f} {_TOP}V{_BOTTOM}"/>')
            parts.append(f'<text class="marked" x="{x + 4:.1f}" y="{_TOP + 8}">{escaped(what)}</text>')
    for i, (line, own, look) in enumerate(zip(chart.lines, lines, looks, strict=True)):
        if own:
            parts.append(_line(f"l k{i}", line.name, own, [(across.at(x), up.at(y)) for x, y in own], look))
    return "".join([*parts, "</svg>"])


def intervals(figure: Intervals, looks: Sequence[Look]) -> str:
    """A row a name, with a line at 0."""
    across = _Axis([0.0, *(x for row in figure.rows for x in row[1:])], _NAMES, _WIDTH - 8, 0, most=4)
    bottom = 8 + _ROW * len(figure.rows)
    parts = [f'<svg viewBox="0 0 {_WIDTH} {bottom + 38}" role="img" aria-label="{escaped(figure.title)}">']
    for value, text in across.ticks():
        x = across.at(value)
        parts.append(f'<path class="{"marked" if value == 0 else "grid"}" d="M{x:.1f} 4V{bottom}"/>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 14}" text-anchor="middle">{text}</text>')
    parts.append(
        f'<text class="label" x="{_WIDTH / 2}" y="{bottom + 32}" text-anchor="middle">{escaped(figure.x)}</text>'
    )
    for i, ((name, low, value, high), look) in enumerate(zip(figure.rows, looks, strict=True)):
        y = 8 + _ROW * (i + 0.5)
        cut = name if len(name) <= _NAME else f"{name[: _NAME - 8]}...{name[-5:]}"
        parts.append(f'<text class="label" x="{_NAMES - 8}" y="{y + 3.5:.1f}" text-anchor="end">{escaped(cut)}</text>')
        title = escaped(f"{name}: {value:+.4f}, {low:+.4f} to {high:+.4f}")
        parts.append(
            f'<g style="color:var(--c{look.colour})"><title>{title}</title>'
            f'<path d="M{across.at(low):.1f} {y:.1f}H{across.at(high):.1f}" stroke="currentColor" stroke-width="2"/>'
            f'<path d="{MARKERS[look.marker % len(MARKERS)]}" transform="translate({across.at(value):.1f} {y:.1f})" '
            'fill="currentColor"/></g>'
        )
    return "".join([*parts, "</svg>"])


def swatch(look: Look) -> str:
    """A sample of a line, for a legend."""
    line = _line("l", "", [], [(3, 6), (18, 6), (33, 6)], look, [(18, 6)])
    return f'<svg class="swatch" viewBox="0 0 36 12" aria-hidden="true">{line}</svg>'


def _line(classes, name, values, places, look, marked=None):
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
    dash = f' stroke-dasharray="{look.dash}"' if look.dash else ""
    parts = [
        f'<g class="{classes}" style="color:var(--c{look.colour})">',
        f'<path d="{path}" fill="none" stroke="currentColor" stroke-width="{look.width}"{dash}/>',
    ]
    marker = MARKERS[look.marker % len(MARKERS)]
    step = -(-len(values) // _MARKED) or 1
    for i in range(0, len(values), step):
        x, y = places[i]
        at, value = values[i]
        title = escaped(f"{name}: {at:,.6g}, {value:,.5g}")
        where = f'd="{marker}" transform="translate({x:.1f} {y:.1f})"'
        parts.append(f'<path {where} fill="currentColor"><title>{title}</title></path>')
    for x, y in marked or ():
        parts.append(f'<path d="{marker}" transform="translate({x} {y})" fill="currentColor"/>')
    return "".join([*parts, "</g>"])


class _Axis:
    """From values to a stretch of the picture; to a base of logarithms, or linear (0)."""

    def __init__(self, values: Iterable[float], start: float, stop: float, base: int, most: int):
        values = [*values]
        self._base = base if base and min(values) > 0 else 0
        self._low, self._high = (self._scaled(value) for value in (min(values), max(values)))
        if self._high - self._low < 1e-12 * max(1.0, abs(self._high)):
            room = 0.5 if self._base else max(abs(self._high) * 0.05, 1e-6)
            self._low, self._high = self._low - room, self._high + room
        self._start, self._stop, self._most = start, stop, most

    def _scaled(self, value: float) -> float:
        return math.log(value, self._base) if self._base else value

    def at(self, value: float) -> float:
        return self._start + (self._scaled(value) - self._low) / (self._high - self._low) * (self._stop - self._start)

    def holds(self, value: float) -> bool:
        return not (self._base and value <= 0) and self._low - 1e-9 <= self._scaled(value) <= self._high + 1e-9

    def ticks(self) -> list[tuple[float, str]]:
        if self._base == 2:
            first, last = math.ceil(self._low - 1e-9), math.floor(self._high + 1e-9)
            powers = range(first, last + 1, max(1, -(-(last - first + 1) // self._most)))
            found = [2.0**power for power in powers]
        elif self._base:
            decades = range(math.floor(self._low), math.ceil(self._high) + 1)
            found = [m * 10.0**d for d in decades for m in (1, 2, 5) if self.holds(m * 10.0**d)]
            if len(found) > self._most:
                found = [value for value in found if math.log10(value) % 1 < 1e-9 or math.log10(value) % 1 > 1 - 1e-9]
                found = found[:: -(-len(found) // self._most)]
        else:
            found = _round_numbers(self._low, self._high, self._most)
        if len(found) < 2 and self._base:
            found = _round_numbers(self._base**self._low, self._base**self._high, self._most)
        return [(value, number(value)) for value in found if self.holds(value)]


def _round_numbers(low: float, high: float, most: int) -> list[float]:
    """1, 2 or 5 times a power of ten apart."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def number(value: float) -> str:
    """On an axis: 256, 4K of powers of two, 20k, 1.5M, 0.25."""
    if value >= 1024 and value == int(value) and int(value) & (int(value) - 1) == 0:
        power = int(value).bit_length() - 1
        return f"{1 << power % 10}{'KMGTPEZY'[min(power // 10, 8) - 1]}"
    for scale, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= max(scale, 1e4):
            return f"{value / scale:.4g}{unit}"
    return f"{value:.6g}"
