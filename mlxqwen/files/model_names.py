"""A model's folder → the name that people know it by."""

from __future__ import annotations

from pathlib import Path

from mlxqwen.files.headers_only import has_weights
from mlxqwen.files.hub import DEMO_FOLDER

__all__ = ["DEMO_NAME", "hub_id_of_folder", "model_name"]

DEMO_NAME = "the demo model"


def model_name(folder: Path) -> str:
    """The id of a model that the hub's client downloaded, `the demo model`, or the folder's path."""
    if folder == DEMO_FOLDER:
        return DEMO_NAME
    return hub_id_of_folder(folder) or str(folder)


def hub_id_of_folder(folder: Path) -> str | None:
    """The id of a folder in the hub's cache, `models--NAME/snapshots/COMMIT`, or of a preview; None for another."""
    if not has_weights(folder):
        return f"{folder.parent.name}/{folder.name}"
    repository, snapshots = folder.parent.parent.name, folder.parent.name
    if snapshots != "snapshots" or not repository.startswith("models--"):
        return None
    return repository.removeprefix("models--").replace("--", "/", 1)
