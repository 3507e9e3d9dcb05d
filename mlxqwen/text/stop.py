"""Stop strings: texts that end a reply."""

from __future__ import annotations

from collections.abc import Sequence

from mlxqwen.errors import OptionError

__all__ = ["MAX_STOPS", "MAX_STOP_LENGTH", "StopStrings"]

# Each string is looked for at every token: so many took 0.1 ms a token, sixteen times as many 1.8 ms.
MAX_STOPS = 64
MAX_STOP_LENGTH = 1024  # characters


class StopStrings:
    """Finds the first of several stop strings in a stream of text.

    A stop string may begin in one piece of text and end in another. Only text that may still become a stop string is
    held back. The one that begins first wins; it and what follows are not shown.

    Args:
        stops: the strings to stop at, or one such string; none lets all text pass.

    Raises:
        OptionError: a stop is empty, longer than 1,024 characters or not a string, or there are more than 64.

    Attributes:
        found: whether one of them was found.
        match: which one.
    """

    def __init__(self, stops: Sequence[str] = ()) -> None:
        if isinstance(stops, str):
            stops = [stops]
        if not isinstance(stops, Sequence):
            raise OptionError(f"stop: found {stops!r:.80}, expected a string or a list of strings")
        if len(stops) > MAX_STOPS:
            raise OptionError(
                f"stop: found {len(stops):,} strings, expected at most {MAX_STOPS}",
                hint="Each of them is looked for at every token: give those that the reply is likely to hold.",
            )
        for stop in stops:
            if not isinstance(stop, str) or not stop:
                raise OptionError(
                    f"stop: found {stop!r:.80}, expected a string of at least one character",
                    hint="Without a stop string, generation ends where the model ends its reply.",
                )
            if len(stop) > MAX_STOP_LENGTH:
                raise OptionError(
                    f"stop: found a string of {len(stop):,} characters, expected at most {MAX_STOP_LENGTH:,}",
                    hint="Its beginning is enough: the reply ends before it.",
                )
        self._stops = tuple(stops)
        self._held = ""
        self.found = False
        self.match: str | None = None

    def feed(self, text: str) -> tuple[str, bool]:
        """Take the next piece of text.

        Returns:
            The text that is now safe to show, and whether a stop was found. What follows a stop is dropped.
        """
        if self.found:
            return "", True
        buffer = self._held + text
        match = self._first_match(buffer)
        unfinished = self._first_unfinished(buffer)
        # A stop that began earlier may still be completed: which of the two came first is not known yet.
        self.found = match is not None and match <= unfinished
        shown = unfinished if match is None or not self.found else match
        if self.found:
            self.match = self._at(buffer, shown)
        self._held = "" if self.found else buffer[shown:]
        return buffer[:shown], self.found

    def finish(self) -> str:
        """End the text → what was held back; `found` tells whether it contained a stop."""
        held, self._held = self._held, ""
        match = self._first_match(held)
        if match is None:
            return held
        self.found = True
        self.match = self._at(held, match)
        return held[:match]

    def _at(self, text: str, start: int) -> str:
        """The first of the stops that stand in `text` at `start`."""
        return next(stop for stop in self._stops if text.startswith(stop, start))

    def _first_match(self, text: str) -> int | None:
        return min((start for stop in self._stops if (start := text.find(stop)) >= 0), default=None)

    def _first_unfinished(self, text: str) -> int:
        """Where the longest end of `text` begins that is the beginning of a stop; the length of `text` if none is."""
        first = len(text)
        for stop in self._stops:
            start = text.find(stop[0], max(0, len(text) - len(stop) + 1))
            while 0 <= start < first:
                if stop.startswith(text[start:]):
                    first = start
                else:
                    start = text.find(stop[0], start + 1)
        return first
