"""A conversation that runs tools: what each round reads, what is kept of it, and what is not."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from itertools import islice
from typing import Any

import pytest

from mlxqwen import Conversation, Engine, make_cache
from mlxqwen.cache.blocks import BLOCK
from mlxqwen.chat.tools import tool_schema
from mlxqwen.engine.events import Done
from mlxqwen.engine.tool_loop import ToolResult
from mlxqwen.errors import ContextLengthError, GenerationError, MessagesError, MlxqwenError, OptionError
from mlxqwen.model.qwen3 import Qwen3ForCausalLM
from mlxqwen.text.tokenizer import Tokenizer
from tests.scripted_model import ScriptedModel, scripted_engine
from tests.test_conversation_cache import CACHES, Turns, fresh
from tests.test_engine_tools import GREEDY, Calculator

PRODUCT = "1234 * 567"
QUESTION = f"What is {PRODUCT}?"
USER = {"role": "user", "content": QUESTION}


@pytest.fixture(params=[None, "off"], ids=["store", "pins"])
def scripted(demo: tuple[Qwen3ForCausalLM, Tokenizer], request: pytest.FixtureRequest) -> tuple[Engine, ScriptedModel]:
    """The demo, which calls functions: with a store for all, and with nothing kept but what open conversations pin."""
    return scripted_engine(*demo, prefix_cache=request.param)


def plain(messages: Any) -> list[Any]:
    """Without what no two runs share."""
    kept = copy.deepcopy(list(messages))
    for message in kept:
        message.pop("tool_call_id", None)
        for call in message.get("tool_calls", ()):
            call.pop("id")
    return kept


@pytest.mark.parametrize("cache", CACHES[:3], ids=str)
def test_each_round_reads_what_is_new_and_says_what_the_engine_says(
    scripted: tuple[Engine, ScriptedModel], cache: dict[str, Any]
) -> None:
    engine, model = scripted
    conversation = Conversation(engine, **cache)
    model.read = 0
    run = conversation.run_tools(QUESTION, {"calculator": Calculator()}, **GREEDY)
    first, second = (done.usage for done in run.rounds)
    assert first.cached_tokens == 0
    known = first.prompt_tokens + first.completion_tokens - 1
    assert known - BLOCK < second.cached_tokens <= known
    assert model.read == first.prompt_tokens + second.prompt_tokens - second.cached_tokens
    assert str(1234 * 567) in run.reply.content
    assert conversation.messages == [USER, *run.messages]
    if not cache:
        model.read = 0
        whole = engine.run_tools([USER], {"calculator": Calculator()}, **GREEDY)
        assert [done.tokens for done in whole.rounds] == [done.tokens for done in run.rounds]
        assert plain(whole.messages) == plain(run.messages)
    model.read = 0
    (done,) = conversation.run_tools("Thanks!", {"calculator": Calculator()}, seed=1, max_tokens=9).rounds
    # Thoughts are left out of the run before, back to its first header.
    assert done.usage.cached_tokens > first.prompt_tokens - 1 - BLOCK
    assert model.read == done.usage.prompt_tokens - done.usage.cached_tokens
    schemas = [tool_schema("calculator", Calculator())]
    again = fresh(engine, conversation.messages[:-1], cache, seed=1, max_tokens=9, tools=schemas)
    assert done.tokens == again.tokens


def test_options_are_those_of_turns(scripted: tuple[Engine, ScriptedModel]) -> None:
    engine, _ = scripted
    conversation = Conversation(engine, thinking=False, tools=[{"name": "clock"}], **GREEDY)
    calculator = Calculator()
    run = conversation.run_tools(QUESTION, {"calculator": calculator}, max_rounds=1)
    assert calculator.asked == ["1234 * 567"]
    assert (run.finish_reason, run.reply.reasoning) == ("tool_calls", None)
    assert conversation.messages == [USER, *run.messages]
    assert conversation.messages[-1]["role"] == "tool"
    assert "tools" in conversation.options
    assert len(conversation.run_tools("Well?", {}, max_tokens=2).rounds) == 1
    wrong: list[tuple[type[MlxqwenError], dict[str, Any]]] = [
        (OptionError, {"tools": {"calculator": 3}}),
        (OptionError, {"max_rounds": 0}),
        (OptionError, {"cache": make_cache(engine.model)}),
        (OptionError, {"max_tokens": 0}),
        (OptionError, {"stop": ""}),
        (MessagesError, {"message": {"role": "assistant", "content": "5"}}),
        (ContextLengthError, {"message": "9 " * 2000}),
    ]
    messages = copy.deepcopy(conversation.messages)
    for error, arguments in wrong:
        with pytest.raises(error):
            conversation.stream_tools(**{"message": QUESTION, "tools": {}, **arguments})
    assert conversation.messages == messages


def interrupted(expression: str) -> int:
    """Evaluate an arithmetic expression."""
    raise KeyboardInterrupt


CALLING = f'<tool_call>\n{{"name": "calculator", "arguments": {{"expression": "{PRODUCT}"}}}}\n</tool_call><|im_end|>'


@pytest.fixture(params=[None, "off"], ids=["store", "pins"])
def calling(small: tuple[Qwen3ForCausalLM, Tokenizer], request: pytest.FixtureRequest) -> tuple[Engine, ScriptedModel]:
    """As `scripted`, with a model that calls what its script says."""
    return scripted_engine(*small, prefix_cache=request.param)


@pytest.mark.parametrize("cache", [{}, {"max_kv_size": 64}], ids=str)
@pytest.mark.parametrize("ending", ["first reply", "tool", "results", "second reply", "interrupt", "NaN"])
def test_a_run_without_an_end_adds_nothing(
    calling: tuple[Engine, ScriptedModel], ending: str, cache: dict[str, Any]
) -> None:
    engine, model = calling
    conversation = Conversation(engine, **cache)
    turns = Turns(conversation, model)
    turns.check(conversation.stream("Hello", seed=1, max_tokens=9))
    before = copy.deepcopy(conversation.messages)
    kinds: Mapping[str, Any] = {"tool": Done, "results": ToolResult}
    model.say(engine.tokenizer.encode(f"<think>\nI multiply.\n</think>\n\n{CALLING}It is 699678.<|im_end|>"))
    if ending == "interrupt":
        with pytest.raises(KeyboardInterrupt):
            conversation.run_tools(QUESTION, {"calculator": interrupted}, **GREEDY)
    else:
        run = conversation.stream_tools(QUESTION, {"calculator": Calculator()}, **GREEDY)
        for event in run if ending != "first reply" else islice(run, 3):
            if isinstance(event, kinds.get(ending, ToolResult)):
                break
        if ending == "second reply":
            next(run)
        elif ending == "NaN":
            model.fail_after = 2
            with pytest.raises(GenerationError):
                list(run)
            model.fail_after = None
        if ending == "first reply":
            conversation.system = None  # any use of the conversation abandons it
            with pytest.raises(OptionError, match="conversation: found a stream whose reply was abandoned"):
                next(run)
        del run
    assert conversation.messages == before
    model.say([])
    done = turns.check(conversation.stream("And now?", seed=2, max_tokens=9), back=1)
    assert done.tokens == fresh(engine, conversation.messages[:-1], cache, seed=2, max_tokens=9).tokens


def test_tools_cannot_talk_in_the_conversation_that_calls_them(scripted: tuple[Engine, ScriptedModel]) -> None:
    engine, _ = scripted
    conversation = Conversation(engine)

    def calculator(expression: str) -> str:
        """Evaluate an arithmetic expression.

        Args:
            expression: The expression.
        """
        return conversation.chat(expression).content

    run = conversation.run_tools(QUESTION, {"calculator": calculator}, max_rounds=2, **GREEDY)
    assert "in use while it is answering" in run.messages[1]["content"]
    assert conversation.messages == [USER, *run.messages]
