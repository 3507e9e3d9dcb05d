"""Modules that count what is assigned to them, so that what was made of their children can be made anew."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

__all__ = ["RMSNorm", "WatchedModule"]


class WatchedModule(nn.Module):
    """A module that counts what is put into it or taken out, by attribute or by item: children and settings.

    An array in the place of another does not count: whatever is compiled is given the arrays of its moment. What is set
    in a module of another kind, such as an adapter's own scale, is not seen: put that module into its place again.
    """

    assignments = 0
    """To all watched modules together, since a module does not know its model; only differences mean something."""

    def __setattr__(self, name: str, value: Any) -> None:
        self._count(name, value)
        super().__setattr__(name, value)

    def __setitem__(self, name: str, value: Any) -> None:
        self._count(name, value)
        super().__setitem__(name, value)

    def __delitem__(self, name: str) -> None:
        super().__delitem__(name)
        WatchedModule.assignments += 1

    def _count(self, name: str, value: Any) -> None:
        if not (isinstance(value, mx.array) and isinstance(self.get(name), mx.array)):
            WatchedModule.assignments += 1


class RMSNorm(WatchedModule, nn.RMSNorm):
    """`mlx.nn.RMSNorm`, whose `eps` counts from when it is set, also in what was compiled before."""
