"""Numbers as drawings: SVG that takes its colours from the page, so that it is readable on light, dark and paper."""

from __future__ import annotations

import io
import re
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from markupsafe import Markup, escape
from matplotlib import rc_context, style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

# Stand-ins that `_svg` exchanges for the page's own variables.
INK, LINE, KEPT, FLAGGED = "#010203", "#040506", "#070809", "#0a0b0c"
SERIES = ("#0d0e0f", "#101112", "#131415", "#161718", "#191a1b", "#1c1d1e")
VARIABLES = {INK: "currentColor", LINE: "var(--line)", KEPT: "var(--kept)", FLAGGED: "var(--flagged)"} | {
    colour: f"var(--series-{i})" for i, colour in enumerate(SERIES)
}
SIZE = (4.6, 2.5)  # inches: 330 points, which stay legible when a phone shows them 340 pixels wide
STYLE: Any = {
    "svg.fonttype": "none",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": LINE,
    "axes.labelcolor": INK,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
}
ONE_AT_A_TIME = threading.RLock()
MARKERS = "osD^vPX"  # tell the series apart without colour; one more than colours, so that pairs come late again


def histogram(kept: NDArray, flagged: NDArray, threshold: float, name: str) -> Markup:
    """Scores of one class, kept and flagged, with the line between them.

    Args:
        kept: (A,) scores of samples that were kept.
        flagged: (B,) scores of those that were flagged.
        threshold: where flagging begins; not finite where nothing is flagged.
        name: of the class, for the title and for those who cannot see the drawing.
    """
    marks = np.concatenate([kept, flagged, [threshold] if np.isfinite(threshold) else []])
    low, high = (float(marks.min()), float(marks.max())) if len(marks) else (0.0, 1.0)
    bins = np.linspace(low, max(high, low + 1e-6), 41)
    with _styled():
        figure, axes = _axes()
        for scores, colour, what in ((kept, KEPT, "kept"), (flagged, FLAGGED, "flagged")):
            if len(scores):
                counts = np.histogram(scores, bins)[0]
                axes.stairs(counts, bins, fill=True, color=colour, label=f"{what} ({len(scores):,})")
        if np.isfinite(threshold):
            axes.axvline(threshold, color=INK, linestyle="--", linewidth=1, label="threshold")
        axes.set_yscale("symlog", linthresh=1)
        axes.set_ylim(0)
        axes.set(xlabel="score (higher is more suspicious)", ylabel="samples", title=_title(name))
        figure.legend(loc="outside lower center", ncols=3, fontsize=8)
        text = f"Histogram of scores, {name}: {len(kept):,} kept, {len(flagged):,} flagged"
        return _svg(figure, f"{text}, threshold {threshold:.3g}" if np.isfinite(threshold) else text)


def curves(
    x: Sequence[float],
    lines: Mapping[str, Sequence[float]],
    *,
    xlabel: str,
    title: str,
    stages: Sequence[str] = (),
    top: float | None = 1.0,
) -> Markup:
    """Figures over steps, such as shares; NaN leaves a gap.

    Args:
        x: (T,) the steps.
        lines: by name, (T,) values each.
        xlabel: what a step is.
        title: of the drawing.
        stages: (T,) names; a thin line and a label mark where the name changes.
        top: of the vertical axis, which begins at 0; None for what the values need.
    """
    with _styled():
        figure, axes = _axes()
        for i, (name, values) in enumerate(lines.items()):
            colour, marker = SERIES[i % len(SERIES)], MARKERS[i % len(MARKERS)]
            axes.plot(x, values, label=name, linewidth=1.4, color=colour, marker=marker, markersize=3.5)
        for i, stage in enumerate(stages):
            if i and stage != stages[i - 1]:
                axes.axvline((x[i] + x[i - 1]) / 2, color=LINE, linewidth=0.8)
            if not i or stage != stages[i - 1]:
                axes.text(x[i], 1.03, _title(stage, 16), fontsize=7.5, transform=axes.get_xaxis_transform())
        axes.set_ylim(*((-0.02 * top, 1.02 * top) if top is not None else (0, None)))
        axes.set(xlabel=xlabel)
        axes.set_title(_title(title), pad=16 if len(stages) else 6)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        figure.legend(loc="outside lower center", ncols=3, fontsize=8)
        last = "; ".join(f"{name} ends at {_last(values):.3g}" for name, values in lines.items())
        return _svg(figure, f"{title}: {last}")


def scatter(points: NDArray, flagged: NDArray[np.bool_], title: str) -> Markup:
    """A map of samples in the plane, (M, 2), flagged ones drawn as crosses over kept ones."""
    with _styled():
        figure, axes = _axes((4.6, 3.6))
        kept = points[~flagged]
        axes.scatter(kept[:, 0], kept[:, 1], s=7, color=KEPT, alpha=0.45, linewidths=0, label=f"kept ({len(kept):,})")
        if flagged.any():
            x, y, label = points[flagged, 0], points[flagged, 1], f"flagged ({flagged.sum():,})"
            axes.scatter(x, y, s=16, color=FLAGGED, marker="x", linewidths=0.9, label=label)
        axes.set(xticks=[], yticks=[], title=_title(title))
        figure.legend(loc="outside lower center", ncols=2, fontsize=8)
        return _svg(figure, f"{title}: {(~flagged).sum():,} kept and {flagged.sum():,} flagged samples")


def trade(points: Sequence[tuple[str, float, float]], *, xlabel: str, ylabel: str, title: str) -> Markup:
    """Named points in the unit square: (name, x, y); one colour and marker for each name."""
    names = list(dict.fromkeys(name for name, *_ in points))
    with _styled():
        figure, axes = _axes((4.6, 3.4))
        for i, name in enumerate(names):
            mine = np.array([(x, y) for other, x, y in points if other == name])
            colour, marker = SERIES[i % len(SERIES)], MARKERS[i % len(MARKERS)]
            axes.scatter(mine[:, 0], mine[:, 1], s=26, label=name, color=colour, marker=marker)
        axes.set_xlim(-0.03, 1.03)
        axes.set(xlabel=xlabel, ylabel=ylabel, title=_title(title))
        figure.legend(loc="outside lower center", ncols=3, fontsize=8)
        return _svg(figure, f"{title}: {len(points)} points of {', '.join(names)}")


@contextmanager
def _styled() -> Iterator[None]:
    """Our style and nothing of the user's, one drawing at a time: matplotlib has one style for all threads."""
    with ONE_AT_A_TIME, style.context(["default", STYLE]):
        yield


def _axes(size: tuple[float, float] = SIZE) -> tuple[Figure, Axes]:
    figure = Figure(figsize=size)
    figure.patch.set_alpha(0)
    axes = figure.add_subplot()
    axes.patch.set_alpha(0)
    axes.title.set_fontsize(9.5)
    return figure, axes


def _title(text: str, most: int = 48) -> str:
    """Names come from the data: shortened, and never read as mathematics."""
    text = text.encode("utf-8", "backslashreplace").decode()  # a folder's name may be no text
    short = text if len(text) <= most else text[: most - 1] + "\N{HORIZONTAL ELLIPSIS}"
    return short.replace("$", r"\$")


def _last(values: Sequence[float]) -> float:
    known = [value for value in values if np.isfinite(value)]
    return known[-1] if known else float("nan")


def _in_variables(style: re.Match[str]) -> str:
    text = style[0]
    for stand_in, variable in VARIABLES.items():
        text = text.replace(stand_in, variable)
    return text


def _svg(figure: Figure, text: str) -> Markup:
    """The drawing as an `<svg>` element that carries `text` for a screen reader."""
    buffer = io.StringIO()
    salted = rc_context({"svg.hashsalt": text.encode("utf-8", "backslashreplace").decode()})
    with salted, warnings.catch_warnings():  # several drawings share a page: their ids must not meet
        warnings.filterwarnings("ignore", "Glyph")  # the browser has the letters that our font has not
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<(metadata|style)\b.*?</\1>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg)
    svg = re.sub(r"font-family: [^;]*; ", "", svg)
    svg = re.sub(r"\s*\n\s*", " ", svg)
    svg = re.sub(r'style="[^"]*"', _in_variables, svg)  # in styles alone: words come from the data
    size = re.search(r'viewBox="[^"]*"', svg)
    opening = f'<svg xmlns:xlink="http://www.w3.org/1999/xlink" {size[0] if size else ""} role="img"'
    return Markup(re.sub(r"<svg[^>]*>", lambda _: f'{opening} aria-label="{escape(text)}">', svg, count=1))
