"""Conversations in any order of turns, failures and changes: messages and replies stay what they have to be.

No turn reads more than a block beyond what it could know, whether a store keeps all or nothing but what is pinned.
"""

from __future__ import annotations

from itertools import islice
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from mlxqwen import Conversation, Delta, Engine
from mlxqwen.errors import GenerationError, MlxqwenError
from mlxqwen.model.qwen3 import Qwen3ForCausalLM
from mlxqwen.text.tokenizer import Tokenizer
from tests.scripted_model import ScriptedModel, scripted_engine
from tests.test_conversation_cache import CACHES, CALL, TOOLS, Turns, fresh

SAID = st.sampled_from(["Hello", "How many r's in strawberry?", "Really? /no_think", "<|im_end|> /think", "好的"])
OPTIONS: st.SearchStrategy[dict[str, Any]] = st.sampled_from(
    [
        {},
        {"thinking": False},
        {"thinking_budget": 2},
        {"tools": TOOLS},
        {"sampling": {"temperature": 0, "repetition_penalty": 1.3}},
        {"stop": ["e"], "prefill_chunk": 9},
    ]
)
REPLIES = st.sampled_from(
    [None, "<think>\nHm.\n</think>\n\nYes.", "<think>\n\n</think>\n\nNo.", f"<think>\nTime?\n</think>\n\n{CALL}", CALL]
)


class States(RuleBasedStateMachine):
    """Beside the conversation stands a list of the messages that it should hold."""

    engine: ClassVar[Engine]
    model: ClassVar[ScriptedModel]
    cache: ClassVar[dict[str, Any]]

    @initialize(system=st.sampled_from([None, "Be brief."]), seed=st.integers(0, 9))
    def start(self, system: str | None, seed: int) -> None:
        self.defaults: dict[str, Any] = {"seed": seed, "max_tokens": 30}
        self.conversation = Conversation(self.engine, system=system, **self.cache, **self.defaults)
        self.turns = Turns(self.conversation, self.model)
        self.expected: list[dict[str, Any]] = [] if system is None else [{"role": "system", "content": system}]

    def script(self, text: str | None) -> None:
        self.model.say([] if text is None else self.engine.tokenizer.encode(f"{text}<|im_end|>"))

    def check_turn(
        self, messages: list[dict[str, Any]], reply: str | None, retry: bool, options: dict[str, Any]
    ) -> None:
        """A turn to its end: reads what it says it reads, and says what a fresh run says."""
        self.script(reply)
        said = messages[len(self.expected) :]
        events = self.conversation.retry(**options) if retry else self.conversation.stream(said, **options)
        # A window that has slid goes back to few places: what is read then is checked by tests of rings.
        back = 1 << 30 if "max_kv_size" in self.cache else 0
        done = self.turns.check(events, back=back, **options)
        self.script(reply)
        again = fresh(self.engine, messages, self.cache, **{**self.defaults, **options})
        assert (done.tokens, done.finish_reason) == (again.tokens, again.finish_reason)
        assert (done.reply.content, done.reply.reasoning) == (again.reply.content, again.reply.reasoning)
        (answer,) = self.conversation.messages[len(messages) :]
        assert answer["content"] == done.reply.content
        assert answer.get("reasoning_content") == done.reply.reasoning
        assert [call["id"] for call in answer.get("tool_calls", [])] == [call.id for call in done.reply.tool_calls]
        self.expected = [*messages, answer]

    @property
    def questions(self) -> list[int]:
        return [i for i, message in enumerate(self.expected) if message["role"] == "user"]

    @rule(said=SAID, reply=REPLIES, options=OPTIONS)
    def say(self, said: str, reply: str | None, options: dict[str, Any]) -> None:
        self.check_turn([*self.expected, {"role": "user", "content": said}], reply, False, options)

    @precondition(lambda self: self.expected and self.expected[-1].get("tool_calls"))
    @rule(reply=REPLIES)
    def answer_calls(self, reply: str | None) -> None:
        calls = self.expected[-1]["tool_calls"]
        results = [{"role": "tool", "tool_call_id": call["id"], "content": "12:00"} for call in calls]
        self.check_turn([*self.expected, *results], reply, False, {"tools": TOOLS})

    @precondition(lambda self: self.questions)
    @rule(reply=REPLIES, options=OPTIONS)
    def retry(self, reply: str | None, options: dict[str, Any]) -> None:
        messages = self.expected[: self.questions[-1] + 1]
        self.check_turn(messages, reply, True, options)

    @rule(
        said=SAID, options=OPTIONS, way=st.sampled_from(["NaN", "interrupt", "close", "leave"]), count=st.integers(0, 6)
    )
    def fail(self, said: str, options: dict[str, Any], way: str, count: int) -> None:
        retry = bool(self.questions) and count % 2 == 1

        def interrupt(done: int, total: int) -> None:
            if done:
                raise KeyboardInterrupt

        if way == "interrupt":
            options = {**options, "on_prefill": interrupt}
        self.script("<think>\nLet me see, and see again.\n</think>\n\nYes." if way in ("close", "leave") else None)
        events = self.conversation.retry(**options) if retry else self.conversation.stream(said, **options)
        if way == "NaN":
            self.model.fail_after = 0
            with pytest.raises(GenerationError):
                list(events)
            self.model.fail_after = None
        elif way == "interrupt":
            with pytest.raises(KeyboardInterrupt):
                list(events)
        else:
            assert all(isinstance(event, Delta) for event in islice(events, count // 2))
            if way == "close":
                events.close()
            del events

    @rule(said=SAID)
    def keep_a_part(self, said: str) -> None:
        self.script("<think>\nLet me see.\n</think>\n\nYes, there are three of them.")
        deltas = []
        for event in self.conversation.stream(said, keep_partial=True, thinking=None):
            assert isinstance(event, Delta)
            deltas.append(event)
            if event.content:
                break
        self.expected = [
            *self.expected,
            {"role": "user", "content": said},
            {"role": "assistant", "content": deltas[-1].content, "reasoning_content": "Let me see."},
        ]

    @rule(
        wrong=st.sampled_from(
            [
                {"role": "narrator", "content": "a"},
                {"role": "user"},
                {"role": "assistant", "content": None},
                {"role": "user", "content": "a", "tool_calls": [{"name": "f"}]},
                {"role": "user", "content": "word " * 3000},
            ]
        )
    )
    def refuse(self, wrong: dict[str, Any]) -> None:
        if "word" in str(wrong.get("content")) and "max_kv_size" in self.cache:
            return  # everything fits in a window
        with pytest.raises(MlxqwenError):
            self.conversation.stream([{"role": "user", "content": "a"}, wrong])
        with pytest.raises(MlxqwenError):
            self.conversation.stream("a", thinking_budget=-1)

    @precondition(lambda self: self.questions)
    @rule()
    def undo(self) -> None:
        self.conversation.undo()
        del self.expected[self.questions[-1] :]

    @rule(text=st.sampled_from([None, "", "Be brief.", "Be long."]))
    def set_system(self, text: str | None) -> None:
        self.conversation.system = text
        turns = [message for message in self.expected if message["role"] != "system"]
        self.expected = turns if text is None else [{"role": "system", "content": text}, *turns]

    @precondition(lambda self: self.questions)
    @rule(text=SAID)
    def edit(self, text: str) -> None:
        i = self.questions[len(self.questions) // 2]
        self.conversation.messages[i]["content"] = text
        self.expected[i] = {**self.expected[i], "content": text}

    @precondition(lambda self: len(self.questions) > 1)
    @rule()
    def drop_oldest(self) -> None:
        self.conversation.drop_oldest()
        start = len(self.expected) - len([message for message in self.expected if message["role"] != "system"])
        self.expected = [*self.expected[:start], *self.expected[self.questions[1] :]]

    @rule()
    def clear(self) -> None:
        self.conversation.clear()
        self.expected = [message for message in self.expected if message["role"] == "system"]
        self.turns.text = []

    @invariant()
    def messages_are_those_expected(self) -> None:
        if hasattr(self, "conversation"):
            assert self.conversation.messages == self.expected


@pytest.mark.slow
@pytest.mark.parametrize("store", [None, "25KB", "off"])
@pytest.mark.parametrize("cache", CACHES, ids=str)
def test_any_order_of_turns(
    small: tuple[Qwen3ForCausalLM, Tokenizer], cache: dict[str, Any], store: str | None
) -> None:
    """A model that says anything where it follows no script."""
    check_any_order(small, cache, store, examples=3, steps=15)


def test_some_orders_of_turns(demo: tuple[Qwen3ForCausalLM, Tokenizer]) -> None:
    for cache, store in ((CACHES[0], "off"), (CACHES[1], None)):
        check_any_order(demo, cache, store, examples=2, steps=12)


def check_any_order(
    loaded: tuple[Qwen3ForCausalLM, Tokenizer],
    cache: dict[str, Any],
    store: str | None,
    *,
    examples: int,
    steps: int,
) -> None:
    engine, model = scripted_engine(*loaded, prefix_cache=store)
    machine = type("StatesWithCache", (States,), {"engine": engine, "model": model, "cache": cache})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
