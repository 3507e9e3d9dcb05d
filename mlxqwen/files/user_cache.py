"""Where this user's caches are."""

from __future__ import annotations

import os
import sys
from pathlib import Path

__all__ = ["user_cache_folder"]


def user_cache_folder() -> Path | None:
    """`$MLXQWEN_CACHE`, or `mlxqwen` in the folder for a user's caches: `$XDG_CACHE_HOME`, or the system's.

    None if the user has no home.
    """
    chosen, shared = os.environ.get("MLXQWEN_CACHE"), os.environ.get("XDG_CACHE_HOME", "")
    try:
        if chosen:
            return Path(chosen).expanduser().absolute()
        if os.path.isabs(shared):
            return Path(shared) / "mlxqwen"
        return Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache") / "mlxqwen"
    except RuntimeError:
        return None
