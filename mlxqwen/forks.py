"""Whether MLX works in this process: its threads do not survive a fork, and what waits for them waits for ever."""

from __future__ import annotations

import os

from mlxqwen.errors import OptionError

__all__ = ["check_process"]

_is_used = False
_is_lost = False


def check_process() -> None:
    """To be called before MLX computes anything. Raises `OptionError` in a fork of a process that has called it."""
    global _is_used
    if _is_lost:
        raise OptionError(
            "engine: found in a forked process, expected one of its own: MLX's threads do not survive a fork",
            hint='Load the model in the child, and start it with multiprocessing.get_context("spawn").',
        )
    _is_used = True


def _behind_a_fork() -> None:
    global _is_lost
    _is_lost = _is_used


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_behind_a_fork)
