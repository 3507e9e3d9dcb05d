"""Regular expressions for names of modules, from configs of strangers: matched in time that is linear in the name.

Python's `re` tries every way to match, which for `(a+)+$` takes longer than anyone waits. Here an expression becomes a
nondeterministic automaton whose states are followed all at once. It knows what lists of modules are written with:
characters, `.`, classes, groups, `|`, `*`, `+`, `?`, `{m,n}`, `^` and `$`. No look-around, no back-references.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

__all__ = ["NamePattern", "Work"]

MOST_CHARACTERS = 512
MOST_STATES = 1_024
MOST_DEPTH = 32
MOST_TRANSITIONS = 4_096

Matches = Callable[[str], bool]
States = frozenset[int]

_CLASSES: dict[str, Matches] = {
    "d": str.isdecimal,
    "w": lambda letter: letter.isalnum() or letter == "_",
    "s": str.isspace,
}
_SPECIAL = frozenset("()[]{}*+?|^$.\\")


class Work:
    """Steps that all expressions of one list may take together."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def spend(self, steps: int) -> None:
        """Raises `ValueError` when all steps are taken."""
        self.left -= steps
        if self.left < 0:
            raise ValueError("the expressions take too many steps")


@dataclass(slots=True)
class _State:
    """A state: where one character leads if it `matches`, or where none is needed (`jumps`)."""

    matches: Matches | None = None
    target: int = -1
    jumps: list[int] = field(default_factory=list)
    only_at_start: bool = False
    only_at_end: bool = False


class NamePattern:
    """One expression, which a name matches from its start up to the end or a dot, as in transformers.

    Args:
        text: the expression.
        work: what its matching costs is taken from.

    Raises:
        ValueError: it is none, is too long, or needs what is not known here.
    """

    def __init__(self, text: str, work: Work) -> None:
        if len(text) > MOST_CHARACTERS:
            raise ValueError(f"an expression of {len(text):,} characters, expected at most {MOST_CHARACTERS}")
        self._work = work
        self._states: list[_State] = []
        self._text, self._at = text, 0
        start, self._end = self._alternatives(0)
        if self._at < len(text):
            raise ValueError(f"found {text[self._at]!r}")
        self._begin = self._closure({start}, at_start=True, at_end=False)
        self._cached: dict[tuple[States, str], States] = {}

    def matches(self, name: str) -> bool:
        """Whether `name` begins with a match that ends with it, before a dot or behind one."""
        self._work.spend(len(name) // 4 + 1)
        states = self._begin
        for at in range(len(name) + 1):
            at_end = at == len(name)
            if at_end or name[at] == "." or (at > 0 and name[at - 1] == "."):
                ends = self._closure(states, at_start=at == 0, at_end=True) if at_end else states
                if self._end in ends:
                    return True
            if at_end or not states:
                break
            states = self._step(states, name[at])
        return False

    def _step(self, states: States, letter: str) -> States:
        key = (states, letter)
        found = self._cached.get(key)
        if found is None:
            self._work.spend(len(states) + 1)
            reached = {
                state.target
                for state in (self._states[number] for number in states)
                if state.matches is not None and state.matches(letter)
            }
            found = self._closure(reached, at_start=False, at_end=False)
            if len(self._cached) >= MOST_TRANSITIONS:
                self._cached.clear()
            self._cached[key] = found
        return found

    def _closure(self, states: States | set[int], *, at_start: bool, at_end: bool) -> States:
        """The states, and those that no character leads to from them."""
        reached, waiting = set(states), list(states)
        while waiting:
            state = self._states[waiting.pop()]
            if (state.only_at_start and not at_start) or (state.only_at_end and not at_end):
                continue
            new = [number for number in state.jumps if number not in reached]
            reached.update(new)
            waiting += new
        self._work.spend(len(reached))
        return frozenset(reached)

    # The expression's parts: each method reads one and gives its first and last state.

    def _new(self) -> int:
        if len(self._states) >= MOST_STATES:
            raise ValueError(f"an expression of more than {MOST_STATES:,} states")
        self._states.append(_State())
        return len(self._states) - 1

    def _peek(self) -> str:
        return self._text[self._at : self._at + 1]

    def _alternatives(self, depth: int) -> tuple[int, int]:
        if depth > MOST_DEPTH:
            raise ValueError(f"groups deeper than {MOST_DEPTH}")
        start, end = self._new(), self._new()
        while True:
            first, last = self._sequence(depth)
            self._states[start].jumps.append(first)
            self._states[last].jumps.append(end)
            if self._peek() != "|":
                return start, end
            self._at += 1

    def _sequence(self, depth: int) -> tuple[int, int]:
        first = last = self._new()
        while self._peek() not in ("", "|", ")"):
            begin = self._at
            start, end = self._atom(depth)
            start, end = self._repeated(begin, start, end, depth)
            self._states[last].jumps.append(start)
            last = end
        return first, last

    def _repeated(self, begin: int, start: int, end: int, depth: int) -> tuple[int, int]:
        """The atom that was read from `begin` on, as often as the quantifier behind it says."""
        least, most = self._quantifier()
        if (least, most) == (1, 1):
            return start, end
        behind = self._at
        first = last = self._new()
        copies = max(least, 1) if most is None else most
        for turn in range(copies):
            if turn:
                self._at = begin
                start, end = self._atom(depth)
            gate = self._new()
            self._states[last].jumps += [start, gate] if turn >= least else [start]
            self._states[end].jumps += [gate, start] if most is None and turn == copies - 1 else [gate]
            last = gate
        self._at = behind
        return first, last

    def _quantifier(self) -> tuple[int, int | None]:
        """How often at least and at most; None is any number of times."""
        sign = self._peek()
        known: dict[str, tuple[int, int | None]] = {"*": (0, None), "+": (1, None), "?": (0, 1)}
        if sign in known:
            self._at += 1
            found = known[sign]
        elif sign == "{":
            close = self._text.find("}", self._at)
            low, comma, high = self._text[self._at + 1 : close].partition(",")
            if close < 0 or not (low + high).isdecimal() or len(low) > 3 or len(high) > 3:
                raise ValueError("a quantifier that is none")
            self._at = close + 1
            found = (int(low or 0), int(high) if high else None if comma else int(low))
            if found[1] is not None and found[1] < max(found[0], 1):
                raise ValueError("a quantifier of no times")
        else:
            return 1, 1
        if self._peek() == "?":  # as few as possible: the same names
            self._at += 1
        if self._peek() in ("*", "+", "?", "{") and self._peek():
            raise ValueError("a quantifier of a quantifier")
        return found

    def _atom(self, depth: int) -> tuple[int, int]:
        letter = self._peek()
        self._at += 1
        if letter == "(":
            return self._group(depth)
        start, end = self._new(), self._new()
        if letter in ("^", "$"):
            self._states[start].only_at_start, self._states[start].only_at_end = letter == "^", letter == "$"
            self._states[start].jumps.append(end)
            return start, end
        if letter == ".":
            matches: Matches = "\n".__ne__
        elif letter == "[":
            matches = self._class()
        elif letter == "\\":
            matches = self._escape()
        elif letter in _SPECIAL:
            raise ValueError(f"found {letter!r}")
        else:
            matches = letter.__eq__
        self._states[start].matches, self._states[start].target = matches, end
        return start, end

    def _group(self, depth: int) -> tuple[int, int]:
        if self._peek() == "?":
            if self._text[self._at + 1 : self._at + 2] == ":":
                self._at += 2
            elif self._text[self._at + 1 : self._at + 3] == "P<" and ">" in self._text[self._at :]:
                self._at = self._text.index(">", self._at) + 1
            else:
                raise ValueError("a group that looks around or sets flags")
        start, end = self._alternatives(depth + 1)
        if self._peek() != ")":
            raise ValueError("a group without an end")
        self._at += 1
        return start, end

    def _escape(self) -> Matches:
        letter = self._peek()
        self._at += 1
        if letter.lower() in _CLASSES:
            known = _CLASSES[letter.lower()]
            return known if letter.islower() else lambda found: not known(found)
        if not letter or letter.isalnum():
            raise ValueError(f"found \\{letter}")
        return letter.__eq__

    def _class(self) -> Matches:
        negated = self._peek() == "^"
        self._at += negated
        tests: list[Matches] = []
        first = True
        while self._peek() != "]" or first:
            letter, first = self._peek(), False
            self._at += 1
            if not letter:
                raise ValueError("a class without an end")
            if letter == "\\":
                tests.append(self._escape())
            elif self._peek() == "-" and self._text[self._at + 1 : self._at + 2] not in ("]", "", "\\"):
                low, high = letter, self._text[self._at + 1]
                self._at += 2
                tests.append(lambda found, low=low, high=high: low <= found <= high)  # type: ignore[misc]
            else:
                tests.append(letter.__eq__)
        self._at += 1
        return lambda found: any(test(found) for test in tests) != negated
