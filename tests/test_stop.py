"""Stop strings against `str.find` on the whole text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxqwen.errors import OptionError
from mlxqwen.text.stop import StopStrings


def shown(stops: list[str], pieces: list[str]) -> tuple[str, bool]:
    watcher = StopStrings(stops)
    text = "".join(watcher.feed(piece)[0] for piece in pieces) + watcher.finish()
    return text, watcher.found


def expected(stops: list[str], text: str) -> tuple[str, bool]:
    starts = [start for stop in stops if (start := text.find(stop)) >= 0]
    return (text[: min(starts)], True) if starts else (text, False)


@given(st.lists(st.text("ab\n", min_size=1, max_size=5), max_size=3), st.lists(st.text("ab\n", max_size=4)))
def test_any_cut_gives_what_find_gives_on_the_whole(stops: list[str], pieces: list[str]) -> None:
    assert shown(stops, pieces) == expected(stops, "".join(pieces))


@given(st.text("ab", min_size=1, max_size=5), st.text("ab", max_size=20))
def test_holds_back_only_what_could_become_the_stop(stop: str, text: str) -> None:
    watcher = StopStrings([stop])
    before = text.partition(stop)[0]
    out = ""
    for seen, character in enumerate(before, start=1):
        out += watcher.feed(character)[0]
        longest = max(n for n in range(len(stop)) if before[:seen].endswith(stop[:n]))
        assert len(out) == seen - longest


def test_stop_inside_of_a_token() -> None:
    assert shown(["\n\n"], ["Yes", ".\n\n", "More"]) == ("Yes.", True)


def test_stop_across_tokens_and_nothing_after_it() -> None:
    watcher = StopStrings(["END"])
    assert watcher.feed("a E") == ("a ", False)
    assert watcher.feed("ND b") == ("", True)
    assert watcher.feed("c") == ("", True)
    assert watcher.finish() == ""


def test_the_stop_that_begins_first_wins_even_if_it_ends_later() -> None:
    assert shown(["c", "bcd"], ["a", "b", "c", "d"]) == ("a", True)
    assert shown(["c", "bcd"], ["a", "b", "c", "e"]) == ("ab", True)
    assert shown(["c", "bcd"], ["a", "b", "c"]) == ("ab", True)


@pytest.mark.parametrize("stops", [[""], ["a", ""], [None], [3]])
def test_empty_stops_are_refused(stops: list[str]) -> None:
    with pytest.raises(OptionError, match="at least one character"):
        StopStrings(stops)
