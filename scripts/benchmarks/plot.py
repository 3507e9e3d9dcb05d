"""The plot of docs/performance.md: tokens per second by rows and by context, ours and the peer's, from a report."""

from __future__ import annotations

import re
import statistics
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path

from benchmarks.comparison import Comparison
from mlxqwen.files.atomic import write_file

__all__ = ["FORMATS", "Curve", "curves_of", "missing_for_plot", "small_svg", "write_plot"]

FORMATS = (".svg", ".png", ".pdf")
_LABELS = {"rows": "replies at once", "context": "tokens of context"}
_IDS = re.compile(r'id="([mp][0-9a-f]{10})"')
_STYLES = ("o-", "s--", "^:", "v-.")


@dataclass(frozen=True)
class Curve:
    """One side's medians in one panel: places on its axis, tokens per second there."""

    side: str
    places: list[int]
    rates: list[float]


def curves_of(rows: Iterable[Comparison]) -> dict[tuple[str, str], list[Curve]]:
    """Lines that have a point → the curves of each panel, an axis and a model; mlxqwen's first."""
    panels: dict[tuple[str, str], dict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        if row.point is not None:
            panel = panels[row.point.axis, row.point.model]
            for side, numbers in (("mlxqwen", row.ours), (row.beside, row.theirs)):
                if numbers:
                    median = statistics.median(numbers)
                    panel[side][row.point.at] = median if row.more_is_better else 1e3 / median
    return {
        name: [Curve(side, sorted(rates), [rates[place] for place in sorted(rates)]) for side, rates in sides.items()]
        for name, sides in panels.items()
    }


def missing_for_plot(path: Path) -> str:
    """Why no plot can be written there, before anything is measured; nothing if it can."""
    if path.suffix.lower() not in FORMATS:
        return f"found {path.name}, expected a name that ends in {', '.join(FORMATS)}"
    if not path.parent.is_dir():
        return f"{path.parent} is no folder"
    return "" if find_spec("matplotlib") else "matplotlib is not installed: pip install -e '.[plot]'"


def write_plot(path: Path, panels: dict[tuple[str, str], list[Curve]], *, title: str, unit: str) -> None:
    """Draw a panel for each axis and model, whole or not at all. Raises `OSError`."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullLocator

    figure = Figure(figsize=(4.2 * len(panels), 3.8), layout="constrained")
    figure.suptitle(title.replace("$", r"\$"), fontsize=9)
    for axes, ((axis, model), curves) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
    ):
        for curve, style in zip(curves, _STYLES, strict=False):
            axes.plot(curve.places, curve.rates, style, markersize=4, label=curve.side)
        places = sorted({place for curve in curves for place in curve.places})
        axes.set_xscale("log", base=2)
        axes.set_xticks(places)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda place, _: f"{place:,.0f}"))
        axes.set_ylim(0, 1.1 * max(rate for curve in curves for rate in curve.rates))
        axes.set_xlabel(_LABELS[axis])
        axes.set_ylabel(unit)
        axes.set_title(model, fontsize=10)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    image = BytesIO()
    form = path.suffix[1:].lower()
    told = dict.fromkeys(("Creator", "Date", "Format", "Type")) if form == "svg" else None
    settings = {"svg.hashsalt": "mlxqwen", "svg.fonttype": "none", "font.sans-serif": ["DejaVu Sans", "Arial"]}
    with matplotlib.rc_context(settings):  # text stays text
        figure.savefig(image, dpi=150, format=form, metadata=told)
    write_file(path, small_svg(image.getvalue().decode()).encode() if form == "svg" else image.getvalue())


def small_svg(svg: str) -> str:
    """An SVG of matplotlib's with a hundredth of a point as its precision, and ids that are counted.

    So a file that is written anew differs only where the picture does.
    """
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"-?\d+\.\d+", lambda found: f"{float(found[0]):.2f}".rstrip("0").rstrip("."), svg)
    ids = {one: f"i{place}" for place, one in enumerate(dict.fromkeys(_IDS.findall(svg)))}
    svg = re.sub(r"(?<=[\"#])[mp][0-9a-f]{10}(?=[\")])", lambda found: ids[found[0]], svg)
    svg = re.sub(r"<!--.*?-->\s*|<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r' id="[a-z.]+[a-z0-9_.]*_\d+"', "", svg)  # of groups, which nothing refers to
    return '<?xml version="1.0" encoding="utf-8"?>\n' + re.sub(r"\s*\n\s*", "\n", svg)
