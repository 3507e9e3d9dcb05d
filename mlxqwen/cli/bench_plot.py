"""The picture of `mlxqwen bench --plot`, by matplotlib, which is an extra."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from mlxqwen.errors import OptionError, one_line
from mlxqwen.files.atomic import write_file
from mlxqwen.installation import install_command

if TYPE_CHECKING:
    from mlxqwen.engine.benchmark import Speed

__all__ = ["check_plot", "write_plot"]

_FORMATS = (".png", ".svg", ".pdf")
# The program's name and version, and the date: the same speeds are the same file.
_LEFT_OUT = {
    ".png": ("Software",),
    ".svg": ("Creator", "Date", "Format", "Type"),
    ".pdf": ("Creator", "Producer", "CreationDate"),
}


def check_plot(path: Path) -> None:
    """Check that the plot can be written, before anything is measured. Raises `OptionError`."""
    if path.suffix.lower() not in _FORMATS:
        raise OptionError(f"--plot: found {str(path)!r}, expected a name that ends in {', '.join(_FORMATS)}")
    if path.is_dir():
        raise OptionError(f"--plot: {path} is a folder, expected a file")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise OptionError(f"--plot: {path} cannot be written", hint="Its folder is not there, or is write-protected.")
    if find_spec("matplotlib") is None:
        raise OptionError("--plot: matplotlib is not installed", hint=f"Install it: {install_command('plot')}")


def write_plot(path: Path, speeds: Sequence[Speed], *, title: str) -> None:
    """Write both speeds by length of context, whole or not at all. Raises `OptionError` if it cannot be written."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullLocator

    figure = Figure(figsize=(8, 3.6), layout="constrained")
    figure.suptitle(one_line(title).replace("$", r"\$"))
    contexts = [speed.context for speed in speeds]
    panels = (
        ("prefill", [speed.prefill_tokens_per_second for speed in speeds]),
        ("decode", [speed.decode_tokens_per_second for speed in speeds]),
    )
    for axes, (name, values) in zip(figure.subplots(1, 2), panels, strict=True):
        axes.plot(contexts, values, marker="o")
        axes.set_xscale("log", base=2)
        axes.set_xticks(contexts)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda tokens, _: f"{tokens:,.0f}"))
        axes.set_ylim(0, 1.1 * max(values))
        axes.set_xlabel("tokens of the prompt")
        axes.set_ylabel("tokens/s")
        axes.set_title(name)
        axes.grid(alpha=0.3)
    image, form = BytesIO(), path.suffix.lower()
    with matplotlib.rc_context({"svg.hashsalt": "mlxqwen"}):
        figure.savefig(image, dpi=150, format=form[1:], metadata=dict.fromkeys(_LEFT_OUT[form]))
    try:
        write_file(path, image.getvalue())
    except OSError as error:
        raise OptionError(f"--plot: {path} cannot be written: {error.strerror}") from None
