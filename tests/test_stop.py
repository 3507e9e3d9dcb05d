"""Stop strings against `str.find` on the whole text."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxqwen import Conversation, Engine, stream_generate
from mlxqwen.engine.request import Request
from mlxqwen.errors import OptionError
from mlxqwen.model.qwen3 import Qwen3ForCausalLM
from mlxqwen.text.stop import MAX_STOP_LENGTH, MAX_STOPS, StopStrings
from mlxqwen.text.tokenizer import Tokenizer
from tests.command_line import run

USER = [{"role": "user", "content": "Hello"}]


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


def test_as_many_and_as_long_as_may_be() -> None:
    stops = [f"{n:04d}".rjust(MAX_STOP_LENGTH, "a") for n in range(MAX_STOPS)]
    assert shown(stops, ["so", stops[7], "more"]) == ("so", True)


@pytest.mark.parametrize(
    ("stops", "found"),
    [
        (["a"] * (MAX_STOPS + 1), "found 65 strings, expected at most 64"),
        (["a", "b" * (MAX_STOP_LENGTH + 1)], "found a string of 1,025 characters, expected at most 1,024"),
        ("b" * 10_000_000, "found a string of 10,000,000 characters"),
        (["b"] * 10_000_000, "found 10,000,000 strings"),
    ],
)
def test_more_is_refused(stops: list[str], found: str) -> None:
    with pytest.raises(OptionError, match=found) as caught:
        StopStrings(stops)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "door",
    [
        lambda engine, stop: engine.stream(USER, stop=stop),
        lambda engine, stop: engine.batch([USER], stop=stop),
        lambda engine, stop: engine.reply("Once", stop=stop),
        lambda engine, stop: Conversation(engine, stop=stop),
        lambda engine, stop: stream_generate(engine.model, engine.tokenizer, "Once", stop=stop),
        lambda engine, stop: Request((1,), tokenizer=engine.tokenizer, stop=stop),
    ],
)
@pytest.mark.parametrize(
    ("stop", "found"), [(["a"] * 65, "found 65 strings"), (["a" * 1025], "found a string of 1,025 characters")]
)
def test_every_door_refuses_more(
    demo: tuple[Qwen3ForCausalLM, Tokenizer], door: Callable[[Engine, Any], object], stop: list[str], found: str
) -> None:
    engine = Engine(*demo)
    with pytest.raises(OptionError, match=f"stop: {found}"):
        door(engine, stop)
    door(engine, ["a" * 1024] * 64)


def test_the_command_line_refuses_more(tmp_path: Path) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(json.dumps({"messages": USER}) + "\n")
    for arguments in (["hi"], ["--batch", str(source), "--output", str(output)]):
        result = run("generate", *arguments, *["--stop", "a"] * 65)
        assert (result.status, result.out) == (1, "")
        assert result.err.startswith("error: --stop: found 65 strings, expected at most 64\n")
        assert not output.exists()


@pytest.mark.parametrize(
    ("pieces", "stops", "match"),
    [
        (["a b", "c d"], ["x", "bc"], "bc"),
        (["abc"], ["bcd", "b"], "b"),
        (["ab"], ["ab", "abc"], "ab"),
        (["a"], ["b"], None),
    ],
)
def test_which_one_was_found_is_told(pieces: list[str], stops: list[str], match: str | None) -> None:
    found = StopStrings(stops)
    for piece in pieces:
        found.feed(piece)
    found.finish()
    assert found.match == match
