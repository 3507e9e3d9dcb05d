"""One answer from its first token to its last, or to Ctrl-C."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass

from mlxqwen.cli.chat_interrupt import Interrupt, stop_on_interrupt
from mlxqwen.cli.chat_view import ChatView
from mlxqwen.cli.terminal import PrefillProgress
from mlxqwen.engine.events import Done, Event

__all__ = ["Answer", "OnPrefill", "show_answer"]

OnPrefill = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Answer:
    """How an answer ended. `done` is None if it was stopped, perhaps before it began."""

    done: Done | None
    has_begun: bool


def show_answer(begin: Callable[[OnPrefill], Generator[Event]], view: ChatView, *, stoppable: bool) -> Answer:
    """Show the events that `begin` makes.

    Args:
        begin: starts the answer, calling back as its prompt is read.
        stoppable: whether Ctrl-C ends the answer alone; else it raises KeyboardInterrupt.
    """
    progress = PrefillProgress(sys.stderr)
    has_begun = False
    done: Done | None = None
    with stop_on_interrupt(stoppable) as interrupt:

        def on_prefill(read: int, total: int) -> None:
            progress(read, total)
            if interrupt.is_pressed:
                raise KeyboardInterrupt
            interrupt.raises = read < total  # a chunk that is being read is as if it had not begun

        shown = view.reply()
        progress.begin()
        try:
            interrupt.raises = True  # nothing has begun while a prompt is turned into tokens
            events = begin(on_prefill)
            interrupt.raises = False
            with closing(events):
                for event in _until(interrupt, events):
                    if isinstance(event, Done):
                        done = event
                    else:
                        has_begun = True
                        shown.show(event)
        except KeyboardInterrupt:
            if not stoppable:
                raise
        finally:
            progress.wipe()
            shown.end(done)
    return Answer(done, has_begun)


def _until(interrupt: Interrupt, events: Iterator[Event]) -> Iterator[Event]:
    for event in events:
        interrupt.raises = False
        yield event
        if interrupt.is_pressed:
            return
