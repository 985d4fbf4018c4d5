"""Small figures, each readable on a phone: drawn by matplotlib, shown as SVG that takes the colours of the page."""

import io
import re
import textwrap
from collections.abc import Sequence
from typing import Any, NamedTuple
from xml.etree import ElementTree

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

# Okabe and Ito's colours, which the colour-blind tell apart, but for yellow; the page has lighter ones when it is dark.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#6b6b6b")
_DASHES = ("-", "--", ":", "-.")
_TEXT, _RULE = "#1c1c1e", "#d6d6da"
# What stands for these in the page, which knows whether it is light or dark.
_IN_PAGE = {_TEXT: "currentColor", _RULE: "var(--rule)"} | {c: f"var(--series-{n})" for n, c in enumerate(COLORS)}
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text
    "text.parse_math": False,  # a dollar in a name is a dollar
    "font.size": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "grid.color": _RULE,
    "grid.linewidth": 0.8,
    "axes.edgecolor": _RULE,
    "xtick.color": _RULE,
    "ytick.color": _RULE,
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), _TEXT),
    "legend.frameon": False,
    "savefig.transparent": True,
}
_WIDTH, _HEIGHT = 5.0, 3.1  # inches of 72 points, which are pixels on the page
_MAX_POINTS = 400
_COUNTS = FuncFormatter(lambda value, _: f"{value:,.0f}")
_SVG = "http://www.w3.org/2000/svg"
_LINK = "{http://www.w3.org/1999/xlink}href"


class Series(NamedTuple):
    """A line, or the points of a run, with the ends of its intervals where there are any.

    Attributes:
      label: of the run.
      color: its number, the same in all figures.
      x: [n].
      y: [n].
      low: [n] or None.
      high: [n] or None.
    """

    label: str
    color: int
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None


class Panel(NamedTuple):
    """A figure.

    Attributes:
      name: of its file.
      title: above it.
      description: for those who can't see it.
      figure: without a title.
    """

    name: str
    title: str
    description: str
    figure: Figure


def lines(series: Sequence[Series], x_name: str, from_zero: bool) -> Figure:
    """Curves over steps; intervals are bands. Long ones are thinned out to the extremes of each stretch."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _axes(series)
        for one in series:
            x, y = np.asarray(one.x, float), np.asarray(one.y, float)
            kept = _extremes(y)
            marker = "o" if len(kept) < 10 else None
            axes.plot(x[kept], y[kept], _DASHES[one.color // len(COLORS) % len(_DASHES)], color=_color(one), lw=1.6,
                      marker=marker, ms=3.5)  # fmt: skip
            if one.low is not None and one.high is not None:
                low, high = (np.asarray(end, float)[kept] for end in (one.low, one.high))
                axes.fill_between(x[kept], low, high, color=_color(one), alpha=0.15, lw=0)
        if from_zero:
            axes.set_ylim(0, 1.05 * max(max(one.y) for one in series) or 1)
        axes.set_xlabel(x_name)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.xaxis.set_major_formatter(_COUNTS)
        if axes.get_ylim()[1] > 1000:
            axes.yaxis.set_major_formatter(_COUNTS)
        return figure


def bars(rows: Sequence[tuple[str, int, str, float, float | None, float | None]]) -> Figure:
    """A bar a row, from the top: (label, colour, value as text, value, low or None, high or None)."""
    with matplotlib.rc_context(_STYLE | {"axes.grid.axis": "x"}):
        figure, axes = _axes([], height=0.55 + 0.47 * len(rows))
        end = max(high or value for _, _, _, value, _, high in rows) or 1
        for place, (label, color, text, value, low, high) in enumerate(rows):
            axes.barh(place, value, height=0.36, color=COLORS[color % len(COLORS)])
            if low is not None and high is not None:
                axes.plot([low, high], [place, place], color=_TEXT, lw=1.4, marker="|", ms=6)
            axes.text(0, place - 0.27, label, va="bottom")
            axes.text(end, place - 0.27, text, va="bottom", ha="right")
        axes.set_ylim(len(rows) - 0.6, -0.8)
        axes.set_xlim(0, end * 1.005)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        return figure


def points(series: Sequence[Series], parts: Sequence[str]) -> Figure:
    """Values with intervals by parts; x of a series is the place of a part."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _axes(series)
        for number, one in enumerate(series):
            x = np.asarray(one.x, float) + 0.5 * ((number + 0.5) / len(series) - 0.5)
            axes.plot(x, one.y, "o", color=_color(one), ms=4.5)
            if one.low is not None and one.high is not None:
                axes.vlines(x, one.low, one.high, color=_color(one), lw=1.6)
        axes.set_xticks(range(len(parts)), parts)
        axes.set_xlim(-0.5, len(parts) - 0.5)
        axes.set_ylim(bottom=0)
        return figure


def histogram(counts: np.ndarray, names: Sequence[str], x_name: str, y_name: str) -> Figure:
    """Bars side by side, one a bin."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _axes([])
        axes.bar(range(len(counts)), counts, width=0.85, color=COLORS[0])
        axes.set_xticks(range(len(names)), names, rotation=35 if len(names) > 7 else 0, fontsize=9)
        axes.set_xlabel(x_name)
        axes.set_ylabel(y_name)
        axes.yaxis.set_major_formatter(_COUNTS)
        return figure


def inline_svg(panel: Panel) -> str:
    """An SVG element for the page: no ids but those that it refers to, its text in the colours of the page."""
    root = ElementTree.fromstring(_svg(panel))
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{{{_SVG}}}metadata", f"{{{_SVG}}}style"):  # a style would be the whole page's
                parent.remove(child)
    for element in root.iter():
        if _LINK in element.attrib:
            element.set("href", element.attrib.pop(_LINK))
    used = set(re.findall(r"(?:url\(|\")#([\w-]+)", ElementTree.tostring(root, encoding="unicode")))
    for element in root.iter():
        if element.get("id") not in used:
            element.attrib.pop("id", None)
    for name in ("version", "width", "height"):
        root.attrib.pop(name, None)
    root.set("role", "img")
    root.set("aria-label", panel.description)
    ElementTree.register_namespace("", _SVG)
    text = ElementTree.tostring(root, encoding="unicode")
    return re.sub("|".join(_IN_PAGE), lambda found: _IN_PAGE[found[0]], text)


def files(panel: Panel) -> dict[str, bytes]:
    """The figure as NAME.svg and NAME.png on white, with its title."""
    title = textwrap.fill(panel.title, 50)
    panel.figure.axes[0].set_title(title, loc="left", fontsize=10.5, fontweight="bold", color=_TEXT)
    options: dict[str, Any] = {"facecolor": "white", "transparent": False}
    return {
        f"{panel.name}.svg": _svg(panel, **options),
        f"{panel.name}.png": _saved(panel, "png", dpi=160, metadata={"Software": None}, **options),
    }


def _svg(panel: Panel, **options: Any) -> bytes:
    return _saved(panel, "svg", metadata={"Date": None, "Creator": None}, **options)


def _saved(panel: Panel, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    # The salt makes the same ids every time, and others in other figures.
    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": panel.name}):
        panel.figure.savefig(buffer, format=kind, **options)
    return buffer.getvalue()


def _axes(series: Sequence[Series], height: float = _HEIGHT) -> tuple[Figure, Axes]:
    """A figure with one pair of axes, and above them a legend of the labels."""
    entries = dict.fromkeys((one.label, one.color) for one in series)
    rows = -(-len(entries) // 2)
    figure = Figure(figsize=(_WIDTH, height + 0.2 * rows), layout="constrained")
    axes = figure.subplots()
    if rows:
        handles = [
            axes.plot([], [], _DASHES[color // len(COLORS) % len(_DASHES)], color=COLORS[color % len(COLORS)], lw=2.5)[
                0
            ]
            for _, color in entries
        ]
        figure.legend(handles, [label for label, _ in entries], loc="outside upper left", ncols=2, fontsize=9.5)
    return figure, axes


def _color(one: Series) -> str:
    return COLORS[one.color % len(COLORS)]


def _extremes(y: np.ndarray) -> np.ndarray:
    """Which points to keep: all, or of each of some equal stretches the lowest and the highest, and the last."""
    if len(y) <= _MAX_POINTS:
        return np.arange(len(y))
    stretches = np.array_split(np.arange(len(y)), _MAX_POINTS // 2)
    kept = [n for stretch in stretches for n in (stretch[y[stretch].argmin()], stretch[y[stretch].argmax()])]
    return np.unique([*kept, len(y) - 1])
