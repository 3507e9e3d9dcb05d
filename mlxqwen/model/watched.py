"""Modules that count what is assigned to them, so that what was made of their children can be made anew."""

from __future__ import annotations

from typing import Any

import mlx.nn as nn

__all__ = ["WatchedModule"]


class WatchedModule(nn.Module):
    """A module that counts what is put into it or taken out, by attribute or by item: children, arrays, settings."""

    assignments = 0
    """To all watched modules together; only differences mean something."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        WatchedModule.assignments += 1

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(name, value)
        WatchedModule.assignments += 1

    def __delitem__(self, name: str) -> None:
        super().__delitem__(name)
        WatchedModule.assignments += 1
