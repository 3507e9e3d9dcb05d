"""Conversations: turns that count, turns that do not, and what is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import pytest

from mlxqwen import Conversation, Delta, Done, Engine, make_cache
from mlxqwen.cache.blocks import BLOCK
from mlxqwen.chat.reply import join_deltas
from mlxqwen.engine.events import Event
from mlxqwen.errors import ContextLengthError, GenerationError, MessagesError, MlxqwenError, OptionError
from mlxqwen.model.qwen3 import Qwen3ForCausalLM
from mlxqwen.sampling.params import NON_THINKING, THINKING
from mlxqwen.text.tokenizer import Tokenizer
from tests.scripted_model import ScriptedModel
from tests.test_conversation_cache import CALL, PLAIN_TEMPLATE, TOOLS, Turns, done_of, fresh, say, scripted

__all__ = ["scripted"]  # a fixture

SYSTEM = {"role": "system", "content": "Be brief."}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


@pytest.fixture
def conversation(scripted: tuple[Engine, ScriptedModel]) -> Conversation:
    """One turn old: a thought and an answer."""
    engine, model = scripted
    conversation = Conversation(engine, system="Be brief.")
    say(engine, model, "<think>\nThree r's.\n</think>\n\nThree.")
    conversation.chat("How many?")
    return conversation


def check_next_turn(conversation: Conversation, text: list[int]) -> None:
    """The next turn reads what a conversation with this text before it reads, and says what a fresh run says."""
    turns = Turns(conversation, scripted_of(conversation))
    turns.text = text
    scripted_of(conversation).say([])
    done = turns.check(conversation.stream("And now?", seed=1, max_tokens=8))
    assert done.usage.cached_tokens > 0
    again = fresh(conversation.engine, conversation.messages[:-1], {}, seed=1, max_tokens=8)
    assert done.tokens == again.tokens


def text_of(conversation: Conversation) -> list[int]:
    """What was read of a conversation's last turn, up to where the next one goes on: its thought is left out there."""
    return conversation.engine.prompt(conversation.messages[: conversation._last_question() + 1])


def scripted_of(conversation: Conversation) -> ScriptedModel:
    model: Any = conversation.engine.model
    assert isinstance(model, ScriptedModel)
    return model


def answer_with(conversation: Conversation, text: str) -> None:
    say(conversation.engine, scripted_of(conversation), text)


def test_system_messages_stand_where_they_are_said(conversation: Conversation) -> None:
    later = [{"role": "developer", "content": "Be brief."}, user("So?"), {"role": "system", "content": "Answer now."}]
    answer_with(conversation, "<think>\n\n</think>\n\nYes.")
    conversation.chat(later)
    said = [*conversation.messages[:3], *later]
    assert conversation.messages == [*said, assistant("Yes.")]
    answer_with(conversation, "<think>\n\n</think>\n\nNo.")
    assert done_of(conversation.retry()).reply.content == "No."
    assert conversation.messages == [*said, assistant("No.")]
    conversation.drop_oldest()
    assert conversation.messages == [SYSTEM, *later, assistant("No.")]
    conversation.clear()
    assert conversation.messages == [SYSTEM, later[0]]


def test_messages_are_those_of_the_api(conversation: Conversation) -> None:
    first = {**assistant("Three."), "reasoning_content": "Three r's."}
    assert conversation.messages == [SYSTEM, user("How many?"), first]
    answer_with(conversation, f"<think>\n\n</think>\n\nLet me see.\n{CALL}")
    reply = conversation.chat({"role": "user", "content": [{"type": "text", "text": "What time is it?"}]}, tools=TOOLS)
    assert reply.content == "Let me see."
    (call,) = reply.tool_calls
    assert conversation.messages[-1] == {
        **assistant("Let me see."),
        "tool_calls": [
            {"id": call.id, "type": "function", "function": {"name": "clock", "arguments": '{"zone": "UTC"}'}}
        ],
    }
    assert conversation.messages[-2]["content"] == [{"type": "text", "text": "What time is it?"}]
    answer_with(conversation, "<think>\n\n</think>\n\nNoon.")
    result = {"role": "tool", "tool_call_id": call.id, "content": "12:00"}
    assert conversation.chat([result, user("So?")], tools=TOOLS).content == "Noon."
    assert conversation.messages[-3:] == [result, user("So?"), assistant("Noon.")]


def test_what_the_caller_gave_is_never_touched(scripted: tuple[Engine, ScriptedModel]) -> None:
    engine, model = scripted
    history = [user("Hello"), assistant("Hello.")]
    conversation = Conversation(engine, messages=history, system="Be brief.")
    assert conversation.messages == [SYSTEM, *history]
    said = user("And now?")
    say(engine, model, "<think>\n\n</think>\n\nNow.")
    conversation.chat(said)
    conversation.messages[1]["content"] = conversation.messages[3]["content"] = "changed"
    assert (history, said) == ([user("Hello"), assistant("Hello.")], user("And now?"))


def test_events_are_those_of_the_engine(conversation: Conversation) -> None:
    answer_with(conversation, "<think>\nOnce more.\n</think>\n\nStill three.")
    *deltas, done = conversation.stream("Sure?")
    assert isinstance(done, Done)
    assert join_deltas(delta for delta in deltas if isinstance(delta, Delta)) == done.reply
    assert conversation.messages[-1] == {**assistant("Still three."), "reasoning_content": "Once more."}


def test_options_of_a_turn_go_over_those_of_the_conversation(scripted: tuple[Engine, ScriptedModel]) -> None:
    engine, _ = scripted
    conversation = Conversation(engine, max_tokens=3, thinking=False, sampling={"temperature": 0})
    assert done_of(conversation.stream("Hello")).usage.completion_tokens == 3
    assert done_of(conversation.stream("Hello", max_tokens=2)).usage.completion_tokens == 2
    conversation.options["max_tokens"] = 1
    assert done_of(conversation.stream("Hello")).usage.completion_tokens == 1
    assert done_of(conversation.retry(max_tokens=2)).usage.completion_tokens == 2
    progress: list[tuple[int, int]] = []
    for window in (None, 64):
        conversation = Conversation(engine, max_kv_size=window, max_tokens=3, prefill_chunk=8)
        done = done_of(conversation.stream("Hello there", on_prefill=lambda *told: progress.append(told)))
        unread = done.usage.prompt_tokens - done.usage.cached_tokens
        assert (progress[0], progress[-1]) == ((0, unread), (unread, unread))
        progress.clear()


@pytest.mark.parametrize(
    ("history", "options", "thinks"),
    [
        ([], {}, True),
        ([user("a"), assistant("b")], {}, True),
        ([user("a /no_think"), assistant("b")], {}, False),
        ([user("a /no_think"), assistant("b")], {"thinking": True}, False),
        ([user("a"), assistant("b")], {"thinking": False}, False),
        ([user("a"), assistant("b")], {"thinking_budget": 0}, False),
        ([user("word " * 400 + "/no_think"), assistant("b")], {"drop_oldest": True}, True),
        ([user("word " * 600 + "/no_think"), assistant("b")], {}, False),
    ],
)
def test_what_the_next_answer_is_drawn_with(
    demo: tuple[Qwen3ForCausalLM, Tokenizer], history: list[Any], options: dict[str, Any], thinks: bool
) -> None:
    conversation = Conversation(Engine(*demo), messages=history, seed=4, sampling={"min_p": 0.1}, **options)
    expected = THINKING if thinks else NON_THINKING
    assert conversation.next_sampling() == dataclasses.replace(expected, seed=4, min_p=0.1)
    assert conversation.messages == history


# Back and forth


def test_undo_and_retry(conversation: Conversation) -> None:
    turn = list(conversation.messages)
    answer_with(conversation, "<think>\n\n</think>\n\nFour.")
    conversation.chat("Sure?")
    answer_with(conversation, "<think>\n\n</think>\n\nFive.")
    events = conversation.retry()
    assert conversation.messages == [*turn, user("Sure?"), assistant("Four.")]
    assert done_of(events).reply.content == "Five."
    assert conversation.messages == [*turn, user("Sure?"), assistant("Five.")]
    conversation.undo()
    assert conversation.messages == turn
    conversation.undo()
    assert conversation.messages == [SYSTEM]
    for action in (conversation.undo, conversation.retry):
        with pytest.raises(MessagesError, match="found no message of a user, expected one"):
            action()
    assert conversation.messages == [SYSTEM]


def test_undo_and_retry_take_a_whole_tool_loop(conversation: Conversation) -> None:
    turn = list(conversation.messages)

    def loop(begin: Callable[[], Iterator[Event]]) -> None:
        answer_with(conversation, f"<think>\n\n</think>\n\n{CALL}")
        (call,) = done_of(begin()).reply.tool_calls
        answer_with(conversation, "<think>\n\n</think>\n\nNoon.")
        conversation.chat({"role": "tool", "tool_call_id": call.id, "content": "12:00"}, tools=TOOLS)

    loop(lambda: conversation.stream("What time is it?", tools=TOOLS))
    assert [message["role"] for message in conversation.messages[len(turn) :]] == [
        "user",
        "assistant",
        "tool",
        "assistant",
    ]
    loop(lambda: conversation.retry(tools=TOOLS))
    assert [message["role"] for message in conversation.messages[len(turn) :]] == [
        "user",
        "assistant",
        "tool",
        "assistant",
    ]
    conversation.undo()
    assert conversation.messages == turn


def test_the_system_message(conversation: Conversation) -> None:
    turn = conversation.messages[1:]
    assert conversation.system == "Be brief."
    conversation.system = "Be long."
    assert conversation.messages == [{"role": "system", "content": "Be long."}, *turn]
    conversation.system = None
    assert (conversation.system, conversation.messages) == (None, turn)
    conversation.system = ""
    assert conversation.system == ""
    for wrong in (7, ["a"], b"a", "\ud800"):
        with pytest.raises(MessagesError):
            conversation.system = wrong  # type: ignore[assignment]
        assert conversation.system == ""
    conversation.messages[0]["content"] = [{"type": "text", "text": "In "}, {"type": "text", "text": "parts."}]
    assert conversation.system == "In parts."


def test_clearing_keeps_the_system_message(conversation: Conversation) -> None:
    conversation.clear()
    assert conversation.messages == [SYSTEM]
    conversation.system = None
    conversation.clear()
    assert conversation.messages == []


def test_dropping_the_oldest_turns(scripted: tuple[Engine, ScriptedModel]) -> None:
    engine, _ = scripted
    calls = [{"id": "1", "type": "function", "function": {"name": "clock", "arguments": "{}"}}]
    loop = [user("b"), {"role": "assistant", "tool_calls": calls}, {"role": "tool", "content": "12"}, assistant("2")]
    conversation = Conversation(engine, messages=[SYSTEM, user("a"), assistant("1"), *loop, user("c"), assistant("3")])
    conversation.drop_oldest()
    assert conversation.messages == [SYSTEM, *loop, user("c"), assistant("3")]
    conversation.drop_oldest()
    assert conversation.messages == [SYSTEM, user("c"), assistant("3")]
    for _ in range(2):
        with pytest.raises(MessagesError, match="no turn but the last"):
            conversation.drop_oldest()
        conversation.clear()


# Turns that do not count


def interrupt(done: int, total: int) -> None:
    if done:
        raise KeyboardInterrupt


FAILURES: dict[str, tuple[type[BaseException], Callable[[Conversation], Any]]] = {
    "interrupted while reading": (KeyboardInterrupt, lambda c: list(c.stream("So?", on_prefill=interrupt))),
    "interrupted in a retry": (KeyboardInterrupt, lambda c: list(c.retry(on_prefill=interrupt))),
    "interrupted with other tools": (
        KeyboardInterrupt,
        lambda c: list(c.stream("So?", tools=TOOLS, on_prefill=interrupt)),
    ),
    "too long": (ContextLengthError, lambda c: c.stream("word " * 2000)),
    "an unknown role": (MessagesError, lambda c: c.stream({"role": "narrator", "content": "So?"})),
    "no role": (MessagesError, lambda c: c.stream({"content": "So?"})),
    "no content": (MessagesError, lambda c: c.stream({"role": "user"})),
    "null content": (MessagesError, lambda c: c.stream({"role": "user", "content": None})),
    "a call of a user": (MessagesError, lambda c: c.stream({**user("So?"), "tool_calls": [{"name": "f"}]})),
    "an assistant at the end": (MessagesError, lambda c: c.stream([user("So?"), assistant("<think>\n\n</think>\n\n")])),
    "no messages": (MessagesError, lambda c: c.stream([])),
    "no message": (MessagesError, lambda c: c.stream(7)),  # type: ignore[arg-type]
    "no dicts": (MessagesError, lambda c: c.stream(["So?"])),  # type: ignore[list-item]
    "no Unicode": (MessagesError, lambda c: c.stream("\ud800")),
    "a broken schema": (MlxqwenError, lambda c: c.stream("So?", tools=[{"type": "function"}])),
    "a negative budget": (OptionError, lambda c: c.stream("So?", thinking_budget=-1)),
    "no switch": (OptionError, lambda c: c.stream("So?", thinking="yes")),
    "no tokens": (OptionError, lambda c: c.stream("So?", max_tokens=0)),
    "no chunk": (OptionError, lambda c: c.stream("So?", prefill_chunk=0)),
    "an unknown option": (OptionError, lambda c: c.stream("So?", temperature=0)),
    "a cache": (OptionError, lambda c: c.stream("So?", cache=make_cache(c.engine.model))),
    "an unknown sampling option": (OptionError, lambda c: c.stream("So?", sampling={"temprature": 0})),
    "an empty stop": (OptionError, lambda c: c.stream("So?", stop="")),
    "NaN": (GenerationError, lambda c: list(c.stream("So?"))),
    "NaN in a retry": (GenerationError, lambda c: list(c.retry(keep_partial=False))),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_failed_turn_leaves_all_as_it_was(conversation: Conversation, name: str) -> None:
    expected, turn = FAILURES[name]
    messages, text = [dict(message) for message in conversation.messages], text_of(conversation)
    model = scripted_of(conversation)
    model.fail_after = 2
    with pytest.raises(expected) as caught:
        turn(conversation)
    model.fail_after = None
    if isinstance(caught.value, MlxqwenError):
        assert caught.value.problem
    assert conversation.messages == messages
    check_next_turn(conversation, text)


@pytest.mark.parametrize("retry", [False, True])
@pytest.mark.parametrize("events", [0, 1, 5])
def test_an_abandoned_turn_leaves_all_as_it_was(conversation: Conversation, events: int, retry: bool) -> None:
    messages, text = [dict(message) for message in conversation.messages], text_of(conversation)

    def turn() -> Iterator[Event]:
        answer_with(conversation, "<think>\nLet me count them.\n</think>\n\nThere are three.")
        return conversation.retry() if retry else conversation.stream("Sure?")

    for end in ("closed", "deleted", "left"):
        stream: Any = turn()
        assert len(list(islice(stream, events))) == events
        assert conversation.messages == messages
        if end == "closed":
            stream.close()
        elif end == "deleted":
            del stream
        else:  # until the conversation is used again
            conversation.system = conversation.system
            with pytest.raises(OptionError, match="conversation: found a stream whose reply was abandoned"):
                list(stream)
            assert list(stream) == []
        assert conversation.messages == messages
    assert len(list(turn())) > 6
    assert len(conversation.messages) == len(messages) + (0 if retry else 2)
    check_next_turn(conversation, text)


def test_messages_that_are_none_are_told_by_what_looks_at_them(conversation: Conversation) -> None:
    conversation.messages.append(5)  # type: ignore[arg-type]
    for change in (conversation.undo, conversation.retry, conversation.drop_oldest):
        with pytest.raises(MessagesError, match=r"messages\[3\]: found a number"):
            change()
    conversation.messages[:] = [5]  # type: ignore[list-item]
    uses: list[Callable[[], object]] = [conversation.clear, lambda: conversation.system]
    for use in uses:
        with pytest.raises(MessagesError, match=r"messages\[0\]: found a number"):
            use()


def test_an_answer_counts_as_soon_as_it_is_done(conversation: Conversation) -> None:
    answer_with(conversation, "<think>\n\n</think>\n\nYes.")
    events = conversation.stream("Sure?")
    next(event for event in events if isinstance(event, Done))
    assert conversation.messages[-2:] == [user("Sure?"), assistant("Yes.")]
    conversation.undo()
    assert list(events) == []


@pytest.mark.parametrize("window", [None, 24])
@pytest.mark.parametrize("retry", [False, True])
def test_a_part_can_be_kept(scripted: tuple[Engine, ScriptedModel], window: int | None, retry: bool) -> None:
    engine, model = scripted
    question = "How many r's are there in the word strawberry?"
    conversation = Conversation(engine, max_kv_size=window)
    say(engine, model, "<think>\n\n</think>\n\nThree.")
    conversation.chat(question)
    say(engine, model, "<think>\nLet me count them.\n</think>\n\nThere are three of them, I think.")
    stream = conversation.retry(keep_partial=True) if retry else conversation.stream("Sure?", keep_partial=True)
    deltas = []
    for event in stream:
        assert isinstance(event, Delta)
        deltas.append(event)
        if event.content is not None and "are" in event.content:
            break
    del stream
    kept = conversation.messages[-1]
    assert kept == {**assistant("There are"), "reasoning_content": "Let me count them."}
    assert "".join(delta.content or "" for delta in deltas) == "There are"
    assert conversation.messages[-2] == user(question if retry else "Sure?")
    assert len(conversation.messages) == (2 if retry else 4)
    model.say([])
    turns = Turns(conversation, model)
    turns.text = text_of(conversation)
    done = turns.check(conversation.stream("Go on.", seed=1, max_tokens=8), back=1)
    assert done.usage.cached_tokens > 0
    assert len(conversation.messages) == (4 if retry else 6)


@pytest.mark.parametrize("window", [None, 24])
def test_of_a_part_without_a_thought_nothing_is_read_again(
    scripted: tuple[Engine, ScriptedModel], window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, model = scripted
    monkeypatch.setitem(engine.tokenizer.chat_templates, "default", PLAIN_TEMPLATE)
    conversation = Conversation(engine, max_kv_size=window)
    say(engine, model, "There are three of them, if you count with care and look at each one of them.")
    stream = conversation.stream("How many?", keep_partial=True)
    said = "".join(delta.content or "" for delta in islice(stream, 15) if isinstance(delta, Delta))
    stream.close()
    assert conversation.messages[-1] == assistant(said)
    turns = Turns(conversation, model)
    turns.text = [*engine.prompt(conversation.messages[:1]), *engine.tokenizer.encode(said)]
    assert len(turns.text) > 24
    model.say([])
    turns.check(conversation.stream("Go on.", max_tokens=3), back=1)


def test_a_part_of_nothing_is_nothing(conversation: Conversation) -> None:
    messages, text = list(conversation.messages), text_of(conversation)
    with pytest.raises(KeyboardInterrupt):
        list(conversation.stream("Sure?", keep_partial=True, on_prefill=interrupt))
    conversation.stream("Sure?", keep_partial=True).close()
    assert conversation.messages == messages
    check_next_turn(conversation, text)


def test_a_part_is_kept_when_the_model_fails(conversation: Conversation) -> None:
    answer_with(conversation, "<think>\nLet me count them.\n</think>\n\nThere are three.")
    scripted_of(conversation).fail_after = 6
    with pytest.raises(GenerationError):
        list(conversation.stream("Sure?", keep_partial=True))
    assert conversation.messages[-2] == user("Sure?")
    assert conversation.messages[-1]["reasoning_content"]


def test_what_is_said_while_a_stream_is_open_ends_it(conversation: Conversation) -> None:
    answer_with(conversation, "<think>\nLet me count them.\n</think>\n\nThere are three.")
    first = conversation.stream("Sure?", keep_partial=True)
    next(first)
    answer_with(conversation, "<think>\n\n</think>\n\nYes.")
    conversation.chat("Really?")
    said = [message["content"] for message in conversation.messages if message["role"] == "user"]
    assert said == ["How many?", "Sure?", "Really?"]
    with pytest.raises(OptionError, match="conversation: found a stream whose reply was abandoned"):
        list(first)


def test_a_conversation_is_not_to_be_used_while_it_answers(conversation: Conversation) -> None:
    messages, text = list(conversation.messages), text_of(conversation)

    def again(done: int, total: int) -> None:
        conversation.undo()

    with pytest.raises(OptionError, match="in use while it is answering"):
        list(conversation.stream("Sure?", on_prefill=again))
    assert conversation.messages == messages
    check_next_turn(conversation, text)


# What does not fit


def test_the_way_out_of_a_context_that_is_too_short(small: tuple[Qwen3ForCausalLM, Tokenizer]) -> None:
    engine = Engine(*small)
    context = engine.model.config.context_length
    turns = [message for n in range(16) for message in (user(f"{n}. {'word ' * 30}"), assistant("Yes."))]
    conversation = Conversation(engine, system="Be brief.", messages=turns, max_tokens=2, thinking=False)
    assert len(engine.prompt(conversation.messages[:-1])) > context
    with pytest.raises(ContextLengthError) as caught:
        conversation.stream("So?")
    for way in ("drop_oldest=True", "conversation.drop_oldest()", "--max-kv-size", "max_kv_size=", "--yarn-factor"):
        assert way in caught.value.hint
    assert conversation.messages == [SYSTEM, *turns]

    done = done_of(conversation.stream("So?", drop_oldest=True))
    assert done.usage.prompt_tokens < context
    assert conversation.messages[:-2] == [SYSTEM, *turns]
    # The next turn goes on with what was left.
    again = done_of(conversation.stream("And?", drop_oldest=True))
    front = len(engine.tokenizer.encode("<|im_start|>system\nBe brief.<|im_end|>\n"))
    assert again.usage.cached_tokens > front - BLOCK
    whole = engine.fit(conversation.messages[:-1], max_tokens=2, thinking=False)
    assert again.usage.prompt_tokens == len(engine.prompt(whole, thinking=False))

    while True:
        try:
            conversation.stream("So?")
            break
        except ContextLengthError:
            conversation.drop_oldest()
    assert conversation.messages[0] == SYSTEM
    window = Conversation(engine, messages=turns, max_tokens=2, max_kv_size=64)
    assert done_of(window.stream("So?")).usage.prompt_tokens > context


def test_what_cannot_be_is_refused_at_the_start(demo: tuple[Qwen3ForCausalLM, Tokenizer]) -> None:
    engine = Engine(*demo)
    wrong: list[dict[str, Any]] = [
        {"thinking_budget": -1},
        {"thinking": "yes"},
        {"temperature": 1},
        {"cache": None},
        {"tools": [{}]},
        {"system": 7},
        {"system": "a", "messages": [SYSTEM]},
        {"messages": [user("a"), {"role": "narrator", "content": "a"}]},
        {"messages": [user("a"), {"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}]},
        {"messages": [{"role": "user", "content": None}]},
        {"messages": "Hello"},
        {"messages": None},
        {"max_kv_size": 2},
        {"kv_bits": 3},
        {"keep": -1},
    ]
    for arguments in wrong:
        with pytest.raises(OptionError):
            Conversation(engine, **arguments)
