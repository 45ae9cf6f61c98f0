"""Figures as SVG and PNG, drawn by matplotlib without a screen and without changing its settings for others.

Colours are those of Okabe and Ito, told apart by colour-blind people; each series also has a marker and dashes of its
own, for print. A picture is drawn once: in the page its colours become CSS variables, which follow dark mode.
"""

from __future__ import annotations

import hashlib
import io
import math
import re
import textwrap
from typing import TYPE_CHECKING, Any

from fastlth.errors import RecipeError
from fastlth.report.figure import Axis, Curves, Figure, Look, Matrices, Panel, Series, Square

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

# (light, dark): black last, yellow left out, since it cannot be read on white
PALETTE = (
    ("#0072b2", "#56b0ea"), ("#d55e00", "#f08c4a"), ("#009e73", "#3ccba2"), ("#cc79a7", "#e6a3c9"),
    ("#e69f00", "#f2bd4b"), ("#56b4e9", "#a9dcfa"), ("#5b5b5b", "#bdbdbd"),
)  # fmt: skip
# viridis, its dark end for light paper, its light end for dark
SEQUENCE = (
    ("#440154", "#2f6c8e"), ("#482979", "#26828e"), ("#3e4c8a", "#1f998a"), ("#306a8e", "#28ae80"),
    ("#24868e", "#4ec36b"), ("#1fa187", "#84d44b"), ("#3dbc74", "#c2df23"), ("#7ad151", "#fde725"),
)  # fmt: skip
INK, MUTED, GRID, PAPER = ("#1f2329", "#e8eaed"), ("#6a7078", "#9aa2ad"), ("#e4e7ea", "#31363d"), ("#ffffff", "#15181c")
DASHES: tuple[Any, ...] = ("solid", (0, (5, 1.8)), (0, (1.2, 1.4)), (0, (5, 1.6, 1.2, 1.6)), (0, (8, 2)),
                           (0, (3, 1.2, 1, 1.2, 1, 1.2)))  # fmt: skip
MARKERS = "os^DvPX"
WIDTH, HEIGHT = 5.4, 3.7  # inches of one panel
TICKS, STEPS = 7, (1, 2, 5, 10)  # at most so many labels on a linear axis, at round distances
MANY_POINTS = 60  # from here on markers would touch
ACROSS = 3  # panels in a row
STYLE: dict[Any, Any] = {
    "font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans"], "font.size": 9, "axes.labelsize": 9.5,
    "axes.labelcolor": INK[0], "text.color": INK[0], "xtick.color": MUTED[0], "ytick.color": MUTED[0],
    "xtick.labelcolor": INK[0], "ytick.labelcolor": INK[0], "axes.edgecolor": MUTED[0], "axes.linewidth": 0.7,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": GRID[0],
    "grid.linewidth": 0.7, "axes.axisbelow": True, "legend.frameon": False, "legend.fontsize": 8.5,
    "legend.handlelength": 2.8, "lines.linewidth": 1.6, "lines.markersize": 4.5, "axes.titlesize": 9.5,
    "xtick.major.size": 3, "ytick.major.size": 0, "svg.fonttype": "path", "figure.facecolor": PAPER[0],
    "axes.facecolor": "none", "savefig.facecolor": PAPER[0], "text.parse_math": False,
}  # fmt: skip


def css() -> str:
    """The variables that inline pictures use: light, and dark where the reader's system is."""
    light, dark = ("".join(f"{name}:{pair[i]};" for name, pair in _variables().items()) for i in (0, 1))
    return f":root{{{light}}}@media (prefers-color-scheme:dark){{:root{{{dark}}}}}@media print{{:root{{{light}}}}}"


def inline(svg: str) -> str:
    """An SVG file's text as part of an HTML page: no preamble, no metadata, colours as variables."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\s+xmlns(:\w+)?="[^"]*"', "", svg).replace("xlink:href", "href")
    names = {light: name for name, (light, _) in _variables().items()}
    svg = re.sub("|".join(names), lambda m: f"var({names[m[0]]})", svg)
    salt = hashlib.sha256(svg.encode()).hexdigest()[:8]  # the ids of two pictures in one page must not be the same
    svg = re.sub(r'\bid="([^"]+)"', rf'id="\1-{salt}"', svg)
    return re.sub(r'(href="#|url\(#)([^")]+)', rf"\1\2-{salt}", svg)


def _variables() -> dict[str, tuple[str, str]]:
    """CSS variable -> (light, dark)"""
    named = {"--ink": INK, "--muted": MUTED, "--grid": GRID, "--paper": PAPER}
    return {**named, **{f"--c{i}": pair for i, pair in enumerate(PALETTE)},
            **{f"--s{i}": pair for i, pair in enumerate(SEQUENCE)}}  # fmt: skip


def draw(figure: Figure) -> tuple[str, bytes]:
    """(SVG text, PNG bytes at 200 dots per inch). Raises RecipeError without matplotlib."""
    try:
        import matplotlib
        from matplotlib.figure import Figure as Canvas
    except ImportError:
        raise RecipeError("pictures need matplotlib; install fastlth[report]") from None
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": figure.name}):
        columns = across(len(figure.panels))
        lines = -(-len(figure.panels) // columns) or 1
        width = WIDTH if columns == 1 else 4.0 * columns
        canvas = Canvas(figsize=(width, HEIGHT * lines if columns == 1 else 3.5 * lines), layout="constrained")
        axes = list(canvas.subplots(lines, columns, squeeze=False, sharey=isinstance(figure, Curves)).flat)
        for spare in axes[len(figure.panels) :]:
            spare.set_visible(False)
        if isinstance(figure, Curves):
            _curves(canvas, axes, figure)
        else:
            _matrices(canvas, axes, figure)
        svg, png = io.StringIO(), io.BytesIO()
        canvas.savefig(svg, format="svg", metadata={"Date": None, "Creator": "fastlth"})
        canvas.savefig(png, format="png", dpi=200)
    return svg.getvalue(), png.getvalue()


def across(panels: int) -> int:
    """Panels in a row: at most three, and four as a square."""
    return 2 if panels == 4 else max(1, min(panels, ACROSS))


def _curves(canvas: Canvas, axes: list[Axes], figure: Curves) -> None:
    for ax, panel in zip(axes, figure.panels, strict=False):
        _panel(ax, panel)
        _axis(ax, "x", figure.x, [p.x for s in panel.series for p in s.points])
        points = [p for s in figure.panels for line in s.series for p in line.points]  # the panels share this axis
        _axis(ax, "y", figure.y, [y for p in points for y in (p.y, p.low, p.high) if y is not None])
        if panel.title:
            ax.set_title(textwrap.fill(panel.title, 44), loc="left")
    for i, ax in enumerate(axes):
        if i % across(len(figure.panels)):
            ax.set_ylabel("")
    _legend(canvas, axes, figure)


def _panel(ax: Axes, panel: Panel) -> None:
    alpha = 0.16 if sum(len(s.points) > 1 and s.look.line for s in panel.series) < 5 else 0.08
    for s in panel.series:
        if not s.points:
            continue
        x, y, colour = [p.x for p in s.points], [p.y for p in s.points], _colour(s.look)
        ax.plot(x, y, color=colour, label=s.label if s.legend else "_", **_style(s))
        banded = [p for p in s.points if p.low is not None and p.high is not None]
        if len(banded) > 1 and s.look.line and not s.look.thin and not s.look.bars:
            ax.fill_between([p.x for p in banded], [float(p.low or 0) for p in banded],
                            [float(p.high or 0) for p in banded], color=colour, alpha=alpha, linewidth=0)  # fmt: skip
        elif banded and not s.look.ring and not s.look.thin:
            below = [p.y - (p.low or 0.0) for p in banded]
            above = [(p.high or 0.0) - p.y for p in banded]
            ax.errorbar([p.x for p in banded], [p.y for p in banded], [below, above], fmt="none", color=colour,
                        elinewidth=1, capsize=2)  # fmt: skip


def _style(s: Series) -> dict[str, Any]:
    look = s.look
    if look.ring:
        return {"linestyle": "none", "marker": "o", "markersize": 11, "markerfacecolor": "none",
                "markeredgecolor": _colour(look), "markeredgewidth": 1.3, "zorder": 5}  # fmt: skip
    if look.marker == -1:
        return {"linestyle": "none", "marker": "*", "markersize": 11, "markeredgecolor": PAPER[0],
                "markeredgewidth": 0.6, "zorder": 6}  # fmt: skip
    again = max(look.colour, 0) // len(PALETTE)  # a colour's second series has other dashes and another marker
    marker = None if look.marker is None else MARKERS[(look.marker + again) % len(MARKERS)]
    if len(s.points) > MANY_POINTS:
        marker = None
    elif len(s.points) == 1:  # a line of one point is not seen
        marker = marker or MARKERS[0]
    return {"linestyle": DASHES[(look.dash + again) % len(DASHES)] if look.line else "none", "marker": marker,
            "markeredgecolor": PAPER[0], "markeredgewidth": 0.6, "linewidth": 1.0 if look.thin else 1.6}  # fmt: skip


def _colour(look: Look) -> str:
    if look.depth is not None:
        return SEQUENCE[round(look.depth * (len(SEQUENCE) - 1))][0]
    return INK[0] if look.colour < 0 else PALETTE[look.colour % len(PALETTE)][0]


def _axis(ax: Axes, which: str, axis: Axis, values: list[float]) -> None:
    """Scale, limits, ticks and label of one axis."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

    one = ax.xaxis if which == "x" else ax.yaxis
    low, high = (min(values), max(values)) if values else (0.1, 1.0)
    log = axis.log and low > 0
    if log:
        ax.set(**{f"{which}scale": "log"})
        span = math.log(high / low) or 0.2
        limits = (low * math.exp(-0.04 * span), high * math.exp(0.04 * span))
        one.set_minor_locator(NullLocator())
        one.set_major_locator(FixedLocator(axis.ticks) if axis.ticks else LogLocator(subs=(1.0, 2.0, 5.0), numticks=8))
    else:
        low = 0.0 if axis.zero and low >= 0 else low
        if low == high:
            pad = 0.005 if axis.percent else 0.05 * abs(high) or 0.5
            low, high = low - pad, high + pad
        span = high - low
        top = high + 0.06 * span
        if axis.percent and high <= 1:
            top = min(top, 1 + 0.03 * span)
        limits = (low if axis.zero and low == 0 else low - 0.05 * span, top)
        one.set_major_locator(MaxNLocator(nbins=TICKS, steps=list(STEPS), integer=axis.whole))
    if axis.low is not None:
        limits = (axis.low, limits[1])
    ax.set(**{f"{which}lim": limits[::-1] if axis.inverted else limits, f"{which}label": axis.label})
    if axis.percent:
        decimals = 1 if log else _decimals(100 * (limits[1] - limits[0]) / TICKS)
        one.set_major_formatter(FuncFormatter(lambda v, _: _percent(v, decimals, short=log)))
        one.set_label_text(f"{axis.label} (%)")
    elif axis.names:
        one.set_ticks(axis.ticks, axis.names, fontsize=7)
    elif axis.whole:
        one.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.0f}"))
    else:
        one.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.6g}"))


def _decimals(least: float) -> int:
    """Digits behind the point that tell ticks apart, whose distance is the first round number from ``least`` on."""
    power = math.floor(math.log10(least))
    step = next(s for s in STEPS if s * 10.0**power >= least) * 10.0**power
    return max(0, -math.floor(math.log10(step) + 1e-9))


def _percent(value: float, decimals: int, short: bool) -> str:
    """51.3 for 0.513; ``short``: 50 for 0.5. Very small shares keep two digits."""
    text = f"{100 * value:.{decimals}f}" if value >= 0.001 or value <= 0 else f"{100 * value:.2g}"
    return text.removesuffix(".0") if short or value >= 0.99995 else text


def _legend(canvas: Canvas, axes: list[Axes], figure: Curves) -> None:
    """Above the panels, where it covers nothing; in each panel's own where their series differ."""
    named = [[s.label for s in p.series if s.legend and s.points] for p in figure.panels]
    if all(labels == named[0] for labels in named):
        if len(named[0]) > 1:
            handles, labels = axes[0].get_legend_handles_labels()
            labels = [textwrap.fill(label, 60) for label in labels]
            for columns in range(len(labels), 0, -1):  # as wide as fits
                legend = canvas.legend(handles, labels, loc="outside upper left", ncols=columns, columnspacing=1.4)
                if columns == 1 or legend.get_window_extent().width < 0.97 * canvas.bbox.width:
                    break
                legend.remove()
        return
    for ax, labels in zip(axes, named, strict=False):
        if labels:
            ax.legend(loc="best", frameon=True, facecolor=PAPER[0], edgecolor="none", framealpha=0.75)


def _matrices(canvas: Canvas, axes: list[Axes], figure: Matrices) -> None:
    for ax, square in zip(axes, figure.panels, strict=False):
        _square(ax, square, figure.label)
    shades = axes[0].collections[0] if axes[0].collections else None
    if shades is not None:
        from matplotlib.ticker import FuncFormatter

        whole = FuncFormatter(lambda v, _: f"{100 * v:.0f}")
        bar = canvas.colorbar(shades, ax=axes, shrink=0.8, aspect=28, pad=0.02, format=whole)
        bar.outline.set_visible(False)
        bar.set_label(f"{figure.column} (%)")


def _square(ax: Axes, square: Square, label: str) -> None:
    from matplotlib import colormaps

    count = len(square.labels)
    ax.grid(False)
    for side in ("left", "bottom"):
        ax.spines[side].set_visible(False)
    if not count:
        ax.set_visible(False)
        return
    # twenty shades: more would make the colour bar a raster image, which neither scales nor passes the page's policy
    shades = colormaps["cividis"].resampled(20)
    ax.pcolormesh(square.values, cmap=shades, vmin=0, vmax=1, edgecolors=PAPER[0], linewidth=1)
    middles = [i + 0.5 for i in range(count)]
    ax.set(xticks=middles, xticklabels=square.labels, yticks=middles, yticklabels=square.labels, xlabel=label,
           ylabel=label, aspect="equal")  # fmt: skip
    ax.tick_params(length=0)
    ax.invert_yaxis()
    if square.title:
        ax.set_title(textwrap.fill(square.title, 40), loc="left")
    if count <= 10:
        for i, line in enumerate(square.values):
            for j, value in enumerate(line):
                colour = "#121212" if value > 0.55 else "#f4f4f4"
                ax.text(j + 0.5, i + 0.5, f"{100 * value:.0f}", ha="center", va="center", fontsize=7, color=colour)
