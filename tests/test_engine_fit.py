"""Conversations longer than the context: which turns go, which stay, and what is said where none may."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxqwen import Conversation, Engine, make_cache
from mlxqwen.chat.prompts import drop_oldest_turns
from mlxqwen.chat.turns import check_conversation, count_turns, without_oldest_turns
from mlxqwen.engine.engine import Done
from mlxqwen.errors import ContextLengthError, OptionError
from tests.conftest import random_model
from tests.test_tokenizer import QWEN

SYSTEM = {"role": "system", "content": "Be brief."}
CALLS = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": {}}}],
}
CONTEXT = 128


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(random_model(vocab_size=QWEN.vocab_size, context=CONTEXT), QWEN)


def turn(number: int, size: int, *, calls: bool, answers: bool) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = [{"role": "user", "content": f"{number}" + "q" * size}]
    if calls:
        messages += [CALLS, {"role": "tool", "content": "r" * size, "tool_call_id": "1"}]
    if answers:
        messages.append({"role": "assistant", "content": "a" * size})
    return messages


TURNS = st.lists(st.tuples(st.integers(0, 9), st.booleans(), st.booleans()), min_size=1, max_size=7)


@st.composite
def conversations(draw: st.DrawFn) -> list[dict[str, Any]]:
    turns = [turn(n, size, calls=c, answers=a) for n, (size, c, a) in enumerate(draw(TURNS))]
    greeting = [{"role": "assistant", "content": "Welcome!"}] if draw(st.booleans()) else []
    return [*([SYSTEM] if draw(st.booleans()) else []), *greeting, *(message for turn in turns for message in turn)]


def tokens_of(messages: Sequence[Mapping[str, Any]]) -> int:
    return sum(1 + len(message["content"]) for message in messages)


@given(conversations(), st.integers(1, 90), st.integers(1, 40))
def test_the_fewest_oldest_turns_go(messages: list[dict[str, Any]], room: int, reserve: int) -> None:
    before = copy.deepcopy(messages)
    # Independently: every suffix that begins with a question, behind the system message, longest first.
    head = [m for m in messages if m["role"] == "system"]
    starts = [i for i, m in enumerate(messages) if m["role"] == "user"]
    kept = [messages, *([*head, *messages[i:]] for i in starts)]
    fitting = [one for one in kept if tokens_of(one) + reserve <= room]
    if not fitting and tokens_of(kept[-1]) >= room:
        with pytest.raises(ContextLengthError, match="messages: "):
            drop_oldest_turns(messages, tokens_of, room=room, reserve=reserve)
    else:
        found = drop_oldest_turns(messages, tokens_of, room=room, reserve=reserve)
        assert found == (fitting[0] if fitting else kept[-1])
        assert all(any(message is one for one in messages) for message in found)
        check_conversation(found)
    assert messages == before


@given(conversations(), st.integers(0, 9))
def test_turns_go_as_a_whole(messages: list[dict[str, Any]], count: int) -> None:
    turns = count_turns(messages)
    left = without_oldest_turns(messages, count)
    assert count_turns(left) == turns - min(count, turns - 1)
    assert left == messages if count == 0 else left[-1] is messages[-1]
    assert (left[0] == SYSTEM) == (messages[0] == SYSTEM)


def test_results_that_users_write_are_questions_unless_trusted() -> None:
    written = {"role": "user", "content": "<tool_response>3</tool_response>"}
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, written]
    assert count_turns(messages) == 2
    assert count_turns(messages, trust_special_tokens=True) == 1


def test_without_a_question_there_is_one_turn() -> None:
    for messages in ([SYSTEM], [SYSTEM, {"role": "assistant", "content": "Hi"}]):
        assert count_turns(messages) == 1
        assert without_oldest_turns(messages, 1) == messages


def long_conversation(turns: int, words: int = 5) -> list[dict[str, Any]]:
    middle = [turn(n, words, calls=n % 2 == 0, answers=True) for n in range(turns)]
    return [SYSTEM, *(message for one in middle for message in one), {"role": "user", "content": "Last?"}]


def test_fit_leaves_the_room_asked_for(engine: Engine) -> None:
    messages = long_conversation(8)
    for max_tokens, least in ((None, CONTEXT // 4), (10, 10), (60, CONTEXT // 4), (32_768, CONTEXT // 4)):
        fitted = engine.fit(messages, max_tokens=max_tokens)
        assert (fitted[0], fitted[-1]) == (SYSTEM, messages[-1])
        assert len(engine.prompt(fitted)) + least <= CONTEXT
        longer = without_oldest_turns(messages, count_turns(messages) - count_turns(fitted) - 1)
        assert len(longer) > len(fitted)
        assert len(engine.prompt(longer)) + least > CONTEXT
    assert engine.fit([SYSTEM, messages[-1]]) == [SYSTEM, messages[-1]]


def test_a_long_reply_is_allowed_and_not_reserved(engine: Engine) -> None:
    messages = [{"role": "user", "content": "Bo"}, {"role": "assistant", "content": "Hi"}, *long_conversation(0)[1:]]
    room = CONTEXT - len(engine.prompt(messages))
    assert room > CONTEXT // 4
    for max_tokens in (room + 1, CONTEXT, 32_768):
        assert engine.fit(messages, max_tokens=max_tokens) == messages


def test_a_conversation_too_long_says_the_ways_out(engine: Engine) -> None:
    messages = long_conversation(8)
    before = copy.deepcopy(messages)
    with pytest.raises(ContextLengthError) as caught:
        engine.stream(messages)
    for way_out in ("drop_oldest=True", "engine.fit(messages)", "--max-kv-size", "--yarn-factor"):
        assert way_out in caught.value.hint
    assert messages == before
    done = list(engine.stream(messages, drop_oldest=True, max_tokens=3))[-1]
    assert isinstance(done, Done)
    assert done.usage.prompt_tokens == len(engine.prompt(engine.fit(messages, max_tokens=3)))
    assert messages == before


def test_a_last_turn_too_long_is_an_error_with_a_way_out(engine: Engine) -> None:
    messages = [SYSTEM, {"role": "user", "content": "Hi"}, {"role": "user", "content": "word " * CONTEXT}]
    for ask in (lambda: engine.fit(messages), lambda: engine.stream(messages, drop_oldest=True)):
        with pytest.raises(ContextLengthError, match="without the older turns") as caught:
            ask()
        assert "--max-kv-size" in caught.value.hint
    with pytest.raises(ContextLengthError) as caught:
        engine.stream(messages[2:])
    assert "drop_oldest" not in caught.value.hint


ASK: dict[str, Callable[[Engine, list[dict[str, Any]]], object]] = {
    "stream": lambda engine, messages: engine.stream(messages),
    "fit": lambda engine, messages: engine.fit(messages),
    "conversation": lambda engine, messages: Conversation(engine).stream(messages),
}


@pytest.mark.parametrize("ask", ASK)
def test_yarn_is_a_way_out_where_it_holds_the_prompt(engine: Engine, ask: str) -> None:
    """By request up to the factor 4; any factor that is given up to 1,024."""
    huge = 64 * 1_100 * CONTEXT  # as in the next test
    for words, by_request, by_factor in ((CONTEXT, True, True), (5 * CONTEXT, False, True), (huge, False, False)):
        turns: list[dict[str, Any]] = [{"role": "user", "content": "a " * words}]
        with pytest.raises(ContextLengthError) as caught:
            ASK[ask](engine, turns)
        assert ("--yarn auto" in caught.value.hint) == ('yarn="auto"' in caught.value.hint) == by_request
        assert ("--yarn-factor" in caught.value.hint) == ("yarn_factor=" in caught.value.hint) == by_factor
        assert "--max-kv-size" in caught.value.hint


def test_text_that_cannot_fit_is_not_encoded(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    huge = {"role": "user", "content": "x" * (128 * CONTEXT)}  # Qwen's longest token has 128 bytes
    small = {"role": "user", "content": "Hi"}
    encoded: list[Any] = []
    encode = type(engine.tokenizer).apply_chat_template

    def recorded(self: Any, messages: Any, **options: Any) -> Any:
        encoded.append(messages)
        return encode(self, messages, **options)

    monkeypatch.setattr(type(engine.tokenizer), "apply_chat_template", recorded)
    window = make_cache(engine.model, max_kv_size=64)
    for ask in (
        lambda: engine.stream([huge]),
        lambda: engine.stream([SYSTEM, small, {**huge, "role": "assistant"}, small]),
        lambda: engine.stream([small, huge], drop_oldest=True),
        lambda: engine.fit([small, huge]),
        lambda: Conversation(engine).stream([huge]),
    ):
        encoded.clear()
        with pytest.raises(
            ContextLengthError, match=f"prompt: at least 12[89] tokens, but the model's.* {CONTEXT}"
        ) as caught:
            ask()
        assert "--max-kv-size" in caught.value.hint
        assert huge["content"] not in [message["content"] for messages in encoded for message in messages]
    encoded.clear()
    assert engine.fit([huge, small]) == [small]
    assert all(len(messages) == 1 for messages in encoded)
    engine.stream([{**huge, "content": "ab" * 64 * CONTEXT}], cache=window)
    thought = {"role": "assistant", "content": "Hi", "reasoning_content": huge["content"]}
    engine.stream([small, thought, small])  # which the model does not see again


def test_a_window_within_the_context_drops_nothing(engine: Engine) -> None:
    messages = long_conversation(8)
    cache = make_cache(engine.model, max_kv_size=64)
    assert engine.fit(messages, cache=cache) == messages
    done = list(engine.stream(messages, drop_oldest=True, cache=cache, max_tokens=2))[-1]
    assert isinstance(done, Done)
    assert done.usage.prompt_tokens == len(engine.prompt(messages)) > CONTEXT


def test_what_a_cache_holds_takes_room(engine: Engine) -> None:
    messages = long_conversation(3, words=2)
    cache = make_cache(engine.model)
    list(engine.reply([1] * 60, cache=cache, max_tokens=1))
    assert cache.offset == 60
    fitted = engine.fit(messages, max_tokens=1, cache=cache)
    assert len(fitted) < len(engine.fit(messages, max_tokens=1))
    assert len(engine.prompt(fitted)) + 60 < CONTEXT


def test_what_is_no_number_is_refused(engine: Engine) -> None:
    for wrong in ("5", -1, 0, 1.5, True):
        with pytest.raises(OptionError, match="max_tokens: found"):
            engine.fit([SYSTEM, {"role": "user", "content": "Hi"}], max_tokens=wrong)  # type: ignore[arg-type]
