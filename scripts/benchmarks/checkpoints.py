"""Random weights in the true shapes of releases, converted, for both sides to read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.processes import ROOT, python, timed
from benchmarks.settings import Settings

__all__ = ["bits_name", "checkpoint", "small_checkpoint", "source_checkpoint"]


def checkpoint(
    settings: Settings,
    bits: int | None,
    *,
    shape: str | None = None,
    layers: int | None = None,
    vocabulary: int | None = None,
) -> Path:
    """A folder with a release's weights in so many bits (None for BF16), made once a run."""
    shape, layers = shape or settings.shape, layers or settings.layers
    plain = source_checkpoint(settings, "bf16", shape=shape, layers=layers, vocabulary=vocabulary)
    if bits is None:
        return plain
    folder = settings.work / f"{plain.name}-{bits}-bit"
    if not folder.exists():
        settings.tell(f"converting {plain.name} to {bits}-bit")
        with _unfinished(folder) as written:
            timed(python("-m", "mlxqwen", "convert", plain, written, "--bits", str(bits), "--no-verify"))
    return folder


def source_checkpoint(
    settings: Settings, form: str, *, shape: str, layers: int | None = None, vocabulary: int | None = None
) -> Path:
    """A folder with a release's weights in one of `make_checkpoint`'s forms, made once a run.

    Written in a process of its own: a child's peak memory counts what its parent held when it was started.
    """
    options = {"--layers": layers, "--vocabulary": vocabulary, "--format": None if form == "bf16" else form}
    given = [(name, str(value)) for name, value in options.items() if value is not None]
    size = "" if layers is None else f"-{layers}-layers"
    folder = settings.work / "-".join([f"{shape}{size}", *(value for name, value in given if name != "--layers")])
    if not folder.exists():
        settings.tell(f"writing {folder.name}")
        with _unfinished(folder) as written:
            some = [word for pair in given for word in pair]
            timed(python(ROOT / "scripts" / "make_checkpoint.py", "--shape", shape, *some, written))
    return folder


def small_checkpoint(settings: Settings, layers: int = 2) -> Path:
    """The folder that `small_model.py` writes: narrow layers, the real vocabulary and tokenizer."""
    folder = settings.work / f"small-{layers}-layers"
    if not folder.exists():
        with _unfinished(folder) as written:
            timed(python("-m", "benchmarks.small_model", written, "--layers", str(layers)))
    return folder


@contextmanager
def _unfinished(folder: Path) -> Iterator[Path]:
    """A name beside `folder` to write under, which it gets at the end: a part that is stopped leaves no half of it."""
    written = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(written, ignore_errors=True)
    yield written
    written.rename(folder)


def layers_of(folder: Path) -> int:
    """The number of layers that a folder's config names."""
    return int(json.loads((folder / "config.json").read_text())["num_hidden_layers"])


def bits_name(bits: int | None) -> str:
    """As tables have it."""
    return "BF16" if bits is None else f"{bits}-bit"
