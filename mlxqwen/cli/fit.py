"""What a model's folder takes once it is loaded: in its own form, or in the one that loading converts it to."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from mlxqwen.errors import UnsupportedFormatError

if TYPE_CHECKING:
    from mlxqwen.model.footprint import Footprint

__all__ = ["measured"]


def measured(folder: Path) -> tuple[Footprint, Footprint | None]:
    """A model as it is stored, and as loading makes it, by its headers; None if it is in a form that is not run.

    What is refused for another reason is told as it is stored. Nothing is written.

    Raises:
        MlxqwenError: it is no sound checkpoint of Qwen3's.
    """
    from mlxqwen.model.footprint import measure

    stored = measure(folder, check=True)
    return stored, stored if stored.runs or stored.refusal else _converted(folder, stored)


def _converted(folder: Path, stored: Footprint) -> Footprint | None:
    """What loading would convert it to, in memory; None for a format that is not converted.

    Raises:
        MlxqwenError: the checkpoint is damaged, so that it cannot be converted.
    """
    from mlxqwen_convert.cached import planned

    try:
        (dtype, packed_bytes, numbers), notes = planned(folder)
    except UnsupportedFormatError:
        return None
    return replace(stored, dtype=dtype, packed_bytes=packed_bytes, numbers=numbers, notes=notes)
