"""An HTML page with charts as inline SVG: text, tables, figures, style. It knows nothing of runs.

A page is one file and asks the network for nothing. JavaScript adds the values under the pointer;
all else shows without it. Curves differ in dashes, markers and labels, not in colour alone.
"""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

WIDTH, HEIGHT, LEFT, TOP, BOTTOM, GAP = 440, 250, 50, 10, 36, 13  # of a chart, in its own units
FLOOR = HEIGHT - BOTTOM
WIDE = 800  # of a chart that has a row to itself
DASHES = ("", "7 3", "2 3", "9 3 2 3", "14 4", "5 2 1 2 1 2")
SHAPES = (  # of markers; 6 dashes and 7 shapes make 42 kinds of lines
    "m-3 0a3 3 0 1 0 6 0a3 3 0 1 0-6 0",
    "m-3-3h6v6h-6z",
    "m0-4l3.6 6.6h-7.2z",
    "m0-4.2l4.2 4.2-4.2 4.2-4.2-4.2z",
    "m-3.5-3.5l7 7m0-7l-7 7",
    "m0 4l3.6-6.6h-7.2z",
    "m-4.2 0h8.4m-4.2-4.2v8.4",
)
COLOURS = 8
AXES = ("steps", "tokens", "hours")
Point = tuple[float, float, float, float]  # the position on each axis, and the value
Marks = dict[str, list[Point]] | None  # where a "restart", a "branch" or a "skipped" step was


def short(value: float | None, digits: int = 4) -> str:
    """A number as people of the field write it: 1.43, 20k, 3.2B, 3e-4."""
    if value is None:
        return "–"
    size = abs(value)
    if size and (size < 1e-3 or size >= 1e15):
        return re.sub(r"\.?0*e\+?(-?)0*", r"e\1", f"{value:.{digits - 1}e}")
    for limit, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if size >= limit:
            return f"{value / limit:.{digits}g}{suffix}"
    return f"{value:.{digits}g}"


def duration(hours: float) -> tuple[float, str]:
    """What to multiply hours by for a readable unit, and the unit."""
    return (1, "hours") if hours >= 2 else (60, "minutes") if hours >= 1 / 30 else (3600, "seconds")


def text(value: Any, limit: int = 400) -> str:
    """Anything as escaped text of an HTML page, cut in its middle to about `limit` characters."""
    plain = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    if len(plain) > limit:
        plain = f"{plain[: limit // 2]} … {plain[-limit // 2 :]}"
    shown = "".join(
        c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in plain
    )
    return html.escape(shown)


def date(value: Any) -> str:
    """A date in any form, which stays on one line."""
    return f"<time>{text(value, 40)}</time>"


def ticks(low: float, high: float, log: bool) -> list[float]:
    """Round numbers from low to high, about five."""
    if log:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        every = 1 + len(decades) // 7
        factors = (1, 2, 5) if high < 200 * low else (1,)
        marks = [factor * 10.0**power for power in decades[::every] for factor in factors]
        return [mark for mark in marks if low <= mark <= high]
    step = 10.0 ** math.floor(math.log10((high - low) / 5))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (factor * step) <= 7)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


# ---- charts


class Line(NamedTuple):
    """A curve to draw: its label, the number of its style, its points, whether they get markers."""

    label: str
    style: int
    points: list[Point]
    marked: bool

    def polyline(self, points: str, attributes: str = "", title: str = "") -> str:
        dashes = DASHES[self.style % len(DASHES)]
        return (
            f'<polyline class="s{self.style % COLOURS}" points="{points}"{attributes}'
            f' stroke-dasharray="{dashes}">{title}</polyline>'
        )

    def markers(self, spots: Iterable[tuple[float, float]]) -> str:
        shape = SHAPES[self.style % len(SHAPES)]
        drawn = "".join(f"M{left:.1f} {top:.1f}{shape}" for left, top in spots)
        return f'<path class="marker s{self.style % COLOURS}" d="{drawn}"/>'


class Scale(NamedTuple):
    """From values to coordinates."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        place = math.log10 if self.log else float
        low, high = place(self.low), place(self.high)
        return self.start + (place(value) - low) / (high - low) * (self.end - self.start)


def value_scale(values: list[float], from_zero: bool) -> Scale:
    """The vertical scale; logarithmic for positive values that span a factor of more than 30."""
    low, high = min(values), max(values)
    if low > 0 and high > 30 * low and not from_zero:
        return Scale(low / 1.1, high * 1.1, FLOOR, TOP, True)
    low = min(low, 0.0) if from_zero else low
    room = 0.05 * (high - low) or 0.1 * abs(high) or 1.0
    return Scale(low if from_zero and low == 0 else low - room, high + room, FLOOR, TOP)


def figure(title: str, unit: str, lines: list[Line], from_zero: bool, marks: Marks = None) -> str:
    """A chart for each axis, of which the page shows one at a time; "" if there are no points.

    Without marks the lines are labelled at their ends, else in a legend.
    """
    lines = [line for line in lines if line.points]
    if not lines:
        return ""
    scale = value_scale([point[3] for line in lines for point in line.points], from_zero)
    unit += ", log scale" * scale.log
    summary = "; ".join(
        f"{line.label or title}: first {short(line.points[0][3])}, last {short(line.points[-1][3])}"
        for line in lines[:8]
    )
    charts = (chart(title, summary, lines, marks, axis, scale) for axis in range(len(AXES)))
    legend = ""
    if marks is not None and len(lines) > 1:
        legend = "".join(f"<span>{swatch(line)}{text(line.label)}</span>" for line in lines)
    return (
        f"<figure><figcaption><b>{text(title)}</b> {text(unit.strip(', '))}{legend}</figcaption>"
        f'{"".join(charts)}<p class="readout"></p></figure>'
    )


def axes(x: Scale, y: Scale, unit: str) -> list[str]:
    """Grid and labels of two axes, as parts of an SVG."""
    parts = []
    for value in ticks(y.low, y.high, y.log):
        parts.append(f'<path class="grid" d="M{LEFT} {y(value):.1f}H{x.end:.0f}"/>')
        parts.append(f'<text class="y" x="{LEFT - 5}" y="{y(value) + 4:.1f}">{short(value)}</text>')
    for value in ticks(x.low, x.high, x.log):
        label = f"{value:.0e}" if x.log else short(value)
        parts.append(f'<path class="grid" d="M{x(value):.1f} {FLOOR}v4"/>')
        parts.append(f'<text class="x" x="{x(value):.1f}" y="{HEIGHT - 19}">{label}</text>')
    parts.append(f'<text class="x" x="{(LEFT + x.end) / 2:.0f}" y="{HEIGHT - 4}">{unit}</text>')
    return parts


def chart(title: str, summary: str, lines: list[Line], marks: Marks, axis: int, y: Scale) -> str:
    """Lines against one axis as an SVG."""
    right = WIDTH - 14.0
    if marks is None:  # room for labels in a wide typeface: the browser chooses it
        wide = (sum(11.5 if c in "mwMW@%" or c > "\u2e80" else 7.4 for c in n.label) for n in lines)
        right = WIDTH - 12 - max(wide)
    furthest = max(point[axis] for line in lines for point in line.points) or 1.0
    factor, unit = duration(furthest) if AXES[axis] == "hours" else (1, AXES[axis])
    x = Scale(0, furthest * factor, LEFT, right)
    parts = axes(x, y, unit)
    for kind, points in (marks or {}).items():  # one path per kind
        places = sorted({round(x(point[axis] * factor)) for point in points})
        shape = f"m-3 {FLOOR - TOP - 7}l6 6m0-6l-6 6" if kind == "skipped" else f"V{FLOOR}"
        path = "".join(f"M{place} {TOP}{shape}" for place in places if place <= x.end)
        parts.append(f'<path class="{kind}" d="{path}"/>' if path else "")
    ends = []
    for line in lines:
        spots = [(x(point[axis] * factor), y(point[3])) for point in line.points]
        drawn = " ".join(f"{left:.1f},{top:.1f}" for left, top in spots)
        name = f"<title>{text(line.label or title)}</title>"
        parts.append(line.polyline(drawn, f' data-label="{text(line.label)}"', name))
        every = 1 if line.marked and len(spots) <= 40 else 1 + len(spots) // 7
        if line.marked or len(spots) == 1:
            parts.append(line.markers(spots[line.style % every :: every]))
        ends.append((spots[-1], line))
    if marks is None:
        parts.append(end_labels(ends, right))
    named = f"{title} against {AXES[axis]}"
    return (
        f'<svg class="by-{AXES[axis]}" viewBox="0 0 {WIDTH} {HEIGHT}" role="img"'
        f' aria-label="{text(named)}. {text(summary)}" data-unit="{unit}"'
        f' data-x="0 {x.high:.6g} {LEFT} {right:.1f}"'
        f' data-y="{y.low:.6g} {y.high:.6g} {y.start} {y.end} {int(y.log)}">'
        f'<title>{text(named)}</title>{"".join(parts)}<path class="cursor"/></svg>'
    )


def log_figure(title: str, unit: str, x_unit: str, lines: list[Line]) -> str:
    """A chart against a logarithmic axis, labelled at the lines' ends; points are (x, value)."""
    lines = [line for line in lines if line.points]
    places = [point[0] for line in lines for point in line.points]
    y = value_scale([point[1] for line in lines for point in line.points], False)
    right = WIDE - 12 - max(8 * len(line.label) for line in lines)
    x = Scale(min(places) / 1.1, max(places) * 1.1, LEFT, right, True)
    parts = axes(x, y, x_unit)
    ends = []
    for line in lines:
        spots = [(x(place), y(value)) for place, value in line.points]
        drawn = " ".join(f"{left:.1f},{top:.1f}" for left, top in spots)
        parts.append(line.polyline(drawn, "", f"<title>{text(line.label)}</title>"))
        parts.append(line.markers(spots) if line.marked else "")
        ends.append((spots[-1], line))
    parts.append(end_labels(ends, right))
    return (
        f"<figure><figcaption><b>{text(title)}</b> {text(unit)}, log axis</figcaption>"
        f'<svg viewBox="0 0 {WIDE} {HEIGHT}" role="img" aria-label="{text(title)}">'
        f"{''.join(parts)}</svg></figure>"
    )


def swatch(line: Line) -> str:
    """A short sample of a line, for legends."""
    drawn = line.polyline("0,6 30,6") + (line.markers([(15, 6)]) if line.marked else "")
    return f'<svg class="swatch" viewBox="0 0 30 12" aria-hidden="true">{drawn}</svg>'


def end_labels(ends: list[tuple[tuple[float, float], Line]], right: float) -> str:
    """Labels at the ends of lines, moved apart; where there is no room for all, some."""
    ends = sorted(ends, key=lambda end: end[0][1])
    room = (FLOOR - TOP) // GAP
    if len(ends) > room:
        ends = [ends[index * (len(ends) - 1) // (room - 1)] for index in range(room)]
    parts, lowest = [], -math.inf
    for below, ((left, y), line) in zip(reversed(range(len(ends))), ends, strict=True):
        lowest = max(y, lowest + GAP)
        top = min(lowest, FLOOR - below * GAP)  # leaves room for those below
        parts.append(f'<path class="leader" d="M{left:.1f} {y:.1f}L{right + 8:.1f} {top:.1f}"/>')
        parts.append(
            f'<text class="end t{line.style % COLOURS}" x="{right + 10:.1f}" y="{top + 4:.1f}">'
            f"{text(line.label)}</text>"
        )
    return "".join(parts)


# ---- pages


def whole_page(title: str, body: str) -> bytes:
    """A page; its policy forbids it to load anything."""
    shown = text(title)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\';'
        " style-src 'unsafe-inline'; script-src 'unsafe-inline'\">"
        f'<meta name="color-scheme" content="light dark"><title>{shown}</title>'
        f"<style>{STYLE}</style></head>\n<body><main>{body}</main>\n"
        f"<script>{SCRIPT}</script></body></html>\n"
    ).encode("utf-8", "replace")


def charts(figures: list[str], legend: str = "") -> str:
    """Figures under radio buttons that choose their horizontal axis, by CSS alone."""
    buttons = "".join(
        f'<input type="radio" name="axis" id="by-{axis}"{" checked" * (axis == AXES[0])}>'
        f'<label for="by-{axis}">{axis}</label>'
        for axis in AXES
    )
    shown = "".join(figures) or "<p>There are no rows yet.</p>"
    return f'<span class="against">Against</span>{buttons}{legend}<div class="charts">{shown}</div>'


def details(summary: str, content: str, is_open: bool = False) -> str:
    """Content that can be unfolded."""
    return f"<details{' open' * is_open}><summary>{summary}</summary>{content}</details>"


def table(rows: list[dict[str, str]], caption: str) -> str:
    """A table that scrolls where it is too wide, of rows that map each column's title to a cell.

    Titles and cells are HTML. A row's first cell is its header. No rows make no table.
    """
    if not rows:
        return ""
    head = "".join(f'<th scope="col">{title}</th>' for title in rows[0])
    body = []
    for first, *rest in (row.values() for row in rows):
        cells = "".join(f"<td>{cell}</td>" for cell in rest)
        body.append(f'<tr><th scope="row">{first}</th>{cells}</tr>')
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{text(caption)}"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )


STYLE = """
:root{--bg:#fff;--fg:#1b1f24;--soft:#57606a;--line:#d5dae0;--card:#f4f6f8;--warn:#9a3412;
--s0:#0b5cad;--s1:#c2410c;--s2:#047857;--s3:#7c3aed;--s4:#a16207;--s5:#be185d;--s6:#0e7490;--s7:#475569}
@media (prefers-color-scheme:dark){:root{--bg:#14171b;--fg:#e6e9ed;--soft:#a3adb8;--line:#3a424c;
--card:#1e2329;--warn:#fdba74;--s0:#6cb2ff;--s1:#ff9a62;--s2:#4cd3a0;--s3:#b79cff;--s4:#e5c14e;
--s5:#ff8abf;--s6:#5fd3e8;--s7:#b4c0cd}}
@media print{:root{--bg:#fff;--fg:#000;--soft:#333;--line:#bbb;--card:#fff}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--fg);font:15px/1.45 system-ui,sans-serif}
main{max-width:1120px;margin:0 auto;padding:16px}
h1{font-size:1.6em;margin:0;overflow-wrap:anywhere}h2{font-size:1.2em;margin:1.6em 0 .5em}
header p,footer,.readout,small,figcaption{color:var(--soft)}
header p{margin:0 0 1em;overflow-wrap:anywhere}footer{margin-top:2em;font-size:.85em}
dl{display:grid;grid-template-columns:repeat(auto-fill,minmax(142px,1fr));gap:8px;margin:0 0 1.4em}
dl div{background:var(--card);border:1px solid var(--line);border-radius:6px;padding:7px 10px}
dt{color:var(--soft);font-size:.8em}dd{margin:0;font-size:1.15em;overflow-wrap:anywhere}
small{font-size:.7em;margin-left:.4em}
time{white-space:nowrap}h3{font-size:1em;margin:1.2em 0 .3em}
.against{margin-right:8px}input{margin:0 4px 0 0}label{margin-right:14px}
.marks span{margin-right:14px;white-space:nowrap}i{font-style:normal;font-weight:bold}
i.restart{color:var(--s3)}i.branch{color:var(--s2)}i.skipped,.warning{color:var(--warn)}
.charts{display:grid;gap:14px 26px;margin-top:12px}
.charts{grid-template-columns:repeat(auto-fit,minmax(min(100%,420px),1fr))}
figure{margin:0;min-width:0;break-inside:avoid}figcaption b{color:var(--fg);margin-right:.3em}
figcaption span{margin-left:14px;white-space:nowrap}
.charts figure>svg{display:none;width:100%;height:auto;touch-action:pan-y}
#by-steps:checked~.charts .by-steps,#by-tokens:checked~.charts .by-tokens,
#by-hours:checked~.charts .by-hours{display:block}
.readout{margin:0;min-height:1.5em;font-size:.85em;font-variant-numeric:tabular-nums}
svg text{font-size:11.5px;fill:var(--soft)}text.y{text-anchor:end}text.x{text-anchor:middle}
polyline{fill:none;stroke-width:1.4;stroke-linejoin:round}
.grid{stroke:var(--line);fill:none}.leader{stroke:var(--soft);stroke-width:.5;fill:none}
.marker{fill:var(--bg);stroke-width:1.3}.cursor{stroke:var(--soft);fill:none}
path.restart{stroke:var(--s3);stroke-width:1.2;stroke-dasharray:2 3;fill:none}
path.branch{stroke:var(--s2);stroke-width:1.6;fill:none}
path.skipped{stroke:var(--warn);stroke-width:1.6;fill:none}
.swatch{width:30px;height:12px;vertical-align:-1px;margin-right:5px}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-size:.9em;width:100%}
th,td{text-align:left;vertical-align:top;padding:4px 10px 4px 0;border-bottom:1px solid var(--line)}
th{white-space:nowrap;font-weight:600}
thead th{color:var(--soft);font-weight:normal;vertical-align:bottom}
pre{margin:0;white-space:pre-wrap;overflow-wrap:anywhere;font-size:.95em}
pre,code{font-family:ui-monospace,Menlo,Consolas,monospace}code{font-size:.92em}
details{margin:.4em 0}summary{cursor:pointer}
details>pre{background:var(--card);padding:8px;margin:6px 0}
@media (max-width:600px){svg text:not(.end){font-size:14px}main{padding:12px}.against{display:none}
label{margin-right:9px}.marks{display:block}}
""" + "".join(f".s{i}{{stroke:var(--s{i})}}text.t{i}{{fill:var(--s{i})}}" for i in range(COLOURS))

# Shows the values under the pointer, read from the curves; unfolds everything before printing.
SCRIPT = """
"use strict";
addEventListener("beforeprint", () => {
  for (const part of document.querySelectorAll("details")) part.open = true;
});
const round = v => !v ? "0" : Math.abs(v) < 1e-3 ? v.toExponential(2)
  : Math.abs(v) >= 1e4 ? Math.round(v).toLocaleString("en") : String(+v.toPrecision(4));
const nearest = (list, far) => list.reduce((a, b) => far(b) < far(a) ? b : a);
for (const svg of document.querySelectorAll(".charts figure > svg")) {
  const out = svg.parentNode.querySelector(".readout"), cursor = svg.querySelector(".cursor");
  const [, xHigh, left, right] = svg.dataset.x.split(" ").map(Number);
  const [low, high, start, end, log] = svg.dataset.y.split(" ").map(Number);
  const value = y => {
    const part = (y - start) / (end - start);
    return log ? low * (high / low) ** part : low + part * (high - low);
  };
  let lines = null;
  const leave = () => { out.textContent = ""; cursor.removeAttribute("d"); };
  svg.addEventListener("pointerleave", leave);
  svg.addEventListener("pointermove", event => {
    lines ??= [...svg.querySelectorAll(":scope > polyline")].map(line => ({
      label: line.dataset.label,
      points: line.getAttribute("points").split(" ").map(p => p.split(",").map(Number))}));
    const box = svg.getBoundingClientRect(), unit = svg.viewBox.baseVal.width / box.width;
    const x = (event.clientX - box.left) * unit, y = (event.clientY - box.top) * unit;
    if (x < left || x > right + 4) return leave();
    let found = lines.map(({label, points}) => {
      const near = nearest(points, p => Math.abs(p[0] - x));
      return {label, x: near[0], y: near[1]};
    });
    if (found.length > 8) found = [nearest(found, f => Math.hypot(f.x - x, f.y - y))];
    const at = nearest(found, f => Math.abs(f.x - x)).x;
    cursor.setAttribute("d", `M${at} ${end}V${start}`);
    out.textContent = `${svg.dataset.unit} ${round((at - left) / (right - left) * xHigh)}: `
      + found.map(f => `${f.label} ${round(value(f.y))}`.trim()).join(", ");
  });
}
"""
