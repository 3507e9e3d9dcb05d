"""The progress of a conversion at load time."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from mlxqwen.cli.interrupts import tell_interrupted
from mlxqwen.cli.terminal import ConversionProgress

__all__ = ["conversion_progress"]


@contextmanager
def conversion_progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar on a terminal, wiped at the end; an interrupted conversion says that it will go on."""
    bar, unfinished = ConversionProgress(sys.stderr), False

    def show(stage: str, done: int, total: int) -> None:
        nonlocal unfinished
        unfinished = stage != "verifying" or done < total
        bar(stage, done, total)

    try:
        yield show
    except KeyboardInterrupt:
        bar.close()
        if unfinished:
            tell_interrupted("; the same command goes on from here")
        raise
    finally:
        bar.close()
