"""Folders whose files of weights are headers alone: previews of models that are not downloaded yet."""

from __future__ import annotations

from pathlib import Path

__all__ = ["PREVIEW", "has_weights"]

PREVIEW = "mlxqwen-preview-"
"""What the names of folders with previews begin with; in it stand organisation/model."""


def has_weights(folder: Path) -> bool:
    """Whether the numbers of a model's tensors can be read; in a preview only names, shapes and dtypes can."""
    return not folder.parent.parent.name.startswith(PREVIEW)
