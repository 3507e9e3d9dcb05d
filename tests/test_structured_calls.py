"""Calls kept to their tools' schemas: required, named, strict, one at most, or none."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from mlxqwen import ChatRequest, Conversation, Done, Engine
from mlxqwen.chat.reply import Delta
from mlxqwen.chat.structured import trial
from mlxqwen.chat.structured.compiler import CompiledGrammar, GrammarCompiler
from mlxqwen.chat.structured.tool_choice import read_tool_choice
from mlxqwen.engine.events import assistant_message
from mlxqwen.errors import OptionError
from mlxqwen.model.qwen3 import Qwen3ForCausalLM
from mlxqwen.text.tokenizer import Tokenizer
from tests.structured_schemas import record

pytest.importorskip("llguidance")

QUESTION = [{"role": "user", "content": "What is 2 + 3?"}]
ADD = {"name": "add", "parameters": record(a={"type": "integer"}, b={"type": "integer"})}
FIND = {
    "name": "find",
    "parameters": {
        "$defs": {"kind": {"enum": ["dog", "Katze"]}},
        "type": "object",
        "properties": {"kind": {"$ref": "#/$defs/kind"}, "old": {"type": "boolean"}},
        "required": ["kind"],
    },
}
NOW = {"name": "now"}
TOOLS = [{"type": "function", "function": one} for one in (ADD, FIND, NOW)]
SCHEMAS: dict[str, Any] = {"add": ADD["parameters"], "find": FIND["parameters"], "now": {"maxProperties": 0}}
WILD = {"temperature": 2, "top_p": 1, "top_k": 0}


@pytest.fixture(scope="module")
def engine(demo: tuple[Qwen3ForCausalLM, Tokenizer]) -> Engine:
    return Engine(*demo)


@pytest.fixture(scope="module")
def babble(babbler: Qwen3ForCausalLM, tokenizer: Tokenizer) -> Engine:
    return Engine(babbler, tokenizer)


def answers(engine: Engine, asked: Sequence[dict[str, Any]], **options: Any) -> list[Done]:
    """The replies to the question with these options, all at once."""
    options = {"tools": TOOLS, "thinking": False, "max_tokens": 80, **options}
    found = dict(engine.batch([ChatRequest(QUESTION, one) for one in asked], batch_size=len(asked), **options))
    return [found[place] for place in range(len(asked))]


def answer(engine: Engine, **options: Any) -> Done:
    return answers(engine, [options])[0]


def check_calls(done: Done) -> None:
    assert done.finish_reason == "length" or done.reply.whole_calls == done.reply.tool_calls
    for call in done.reply.whole_calls:
        Draft202012Validator(SCHEMAS[call.name]).validate(json.loads(call.arguments))


def biased(engine: Engine, **tags: float) -> dict[str, Any]:
    """Draws that like or loathe the tags of calls."""
    names = {"call": "<tool_call>", "end": "<|im_end|>"}
    bias = {engine.tokenizer.token_to_id(names[name]): value for name, value in tags.items()}
    return {**WILD, "logit_bias": bias}


def test_required_calls_fit_their_schemas(babble: Engine) -> None:
    seeds = [{"seed": seed} for seed in range(16)]
    done = answers(babble, seeds, tool_choice="required", sampling=biased(babble, end=20))
    for one in done:
        assert one.finish_reason == "tool_calls"
        assert one.reply.content == ""
        check_calls(one)
    assert {call.name for one in done for call in one.reply.tool_calls} == {"add", "find", "now"}


def test_a_required_call_follows_the_thought(engine: Engine) -> None:
    done = answer(engine, tool_choice="required", thinking=True, seed=1)
    assert done.finish_reason == "tool_calls"
    assert done.reply.reasoning
    check_calls(done)


def test_a_named_function_is_called_once(babble: Engine) -> None:
    forms = ({"type": "function", "function": {"name": "find"}}, {"type": "function", "name": "find"})
    asked = [{"tool_choice": form, "seed": seed} for form in forms for seed in range(3)]
    for done in answers(babble, asked, sampling=biased(babble, call=20)):
        assert [call.name for call in done.reply.tool_calls] == ["find"]
        check_calls(done)


def allowed(mode: str, *names: str, nested: bool = True) -> dict[str, Any]:
    """A choice of some tools in the form of chat completions, or in that of responses."""
    if nested:
        tools: list[dict[str, Any]] = [{"type": "function", "function": {"name": name}} for name in names]
        return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}
    return {"type": "allowed_tools", "mode": mode, "tools": [{"type": "function", "name": name} for name in names]}


@pytest.mark.parametrize("mode", ["auto", "required"])
def test_only_tools_that_are_allowed_are_called(babble: Engine, mode: str) -> None:
    """By a model that would rather call than speak, whichever tool."""
    asked = [
        {"tool_choice": allowed(mode, "now", "find", nested=nested), "seed": seed}
        for nested in (True, False)
        for seed in range(6)
    ]
    done = answers(babble, asked, sampling=biased(babble, call=20, end=20))
    called = [call.name for one in done for call in one.reply.whole_calls]
    assert set(called) <= {"now", "find"}
    assert len(called) >= len(asked)
    for one in done:
        check_calls(one)


@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize(
    "choice",
    [None, "auto", "required", {"type": "function", "function": {"name": "add"}}, allowed("auto", "add")],
    ids=["none", "auto", "required", "named", "allowed"],
)
def test_of_several_tools_of_one_name_the_first_is_called(choice: Any, parallel: bool) -> None:
    second = {"type": "function", "function": {"name": "add", "parameters": record(c={"type": "null"})}}
    rules = read_tool_choice([*TOOLS, second, TOOLS[0]], choice, parallel)
    expected = read_tool_choice(TOOLS, choice, parallel)
    assert rules == expected
    assert rules.tools[0]["function"] is ADD


def test_where_some_tools_are_allowed_the_model_may_answer_unless_it_has_to_call(babble: Engine) -> None:
    unwilling = biased(babble, call=-50, end=-50)
    done = answer(babble, tool_choice=allowed("auto", "now"), sampling=unwilling, seed=1, max_tokens=9)
    assert done.reply.tool_calls == ()
    assert done.reply.content
    sampling = biased(babble, call=-50, end=20)
    done = answer(babble, tool_choice=allowed("required", "now"), sampling=sampling, seed=1)
    assert {call.name for call in done.reply.tool_calls} == {"now"}


def test_several_calls_unless_told_not_to(babble: Engine) -> None:
    """A model that would rather call than end."""
    sampling = biased(babble, end=-30)
    counts = {}
    for parallel in (True, False):
        done = answer(
            babble, tool_choice="required", parallel_tool_calls=parallel, sampling=sampling, seed=1, max_tokens=150
        )
        counts[parallel] = len(done.reply.tool_calls)
        check_calls(done)
    assert counts[True] > 1
    assert counts[False] == 1


def test_none_leaves_no_call(babble: Engine) -> None:
    call = babble.tokenizer.token_to_id("<tool_call>")
    done = answer(babble, sampling=biased(babble, call=50), seed=0)
    assert call in done.tokens
    done = answer(babble, tool_choice="none", sampling=biased(babble, call=50), seed=0)
    assert call not in done.tokens
    assert done.reply.tool_calls == ()


def test_the_choice_is_no_part_of_the_prompt(engine: Engine) -> None:
    """So what was read of tools is shared."""
    choices = ("auto", "none", allowed("auto", "add"))
    lengths = [answer(engine, tool_choice=choice, max_tokens=1).usage.prompt_tokens for choice in choices]
    assert len(set(lengths)) == 1


def test_strict_tools_are_called_as_their_schemas_say_and_text_stays_free(babble: Engine) -> None:
    strict = [{"type": "function", "function": {**one, "strict": True}} for one in (ADD, FIND, NOW)]
    opening = babble.tokenizer.token_to_id("<tool_call>")
    asked = [{"seed": seed, "parallel_tool_calls": parallel} for parallel in (True, False) for seed in range(6)]
    called = 0
    for options, done in zip(
        asked, answers(babble, asked, tools=strict, sampling=biased(babble, call=9, end=-30)), strict=True
    ):
        called += len(done.reply.tool_calls)
        begun = done.tokens.count(opening)
        assert begun - 1 <= len(done.reply.tool_calls) <= begun
        assert done.tokens[0] == opening or done.reply.content
        assert options["parallel_tool_calls"] or begun <= 1
        check_calls(done)
    assert called > 2


def test_an_answer_in_its_format_or_calls(babble: Engine) -> None:
    form = record(sure={"type": "boolean"})
    for bias, calls in ((30.0, True), (-30.0, False)):
        done = answer(babble, response_format=form, sampling=biased(babble, call=bias, end=30), seed=3)
        assert bool(done.reply.tool_calls) == calls
        check_calls(done)
        if not calls:
            Draft202012Validator(form).validate(json.loads(done.reply.content))


def test_a_schema_that_cannot_be_compiled(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    """A note and any arguments; for a strict tool an error."""
    odd = {"name": "odd", "parameters": {"type": "object", "not": {"required": ["x"]}}}
    tools = [{"type": "function", "function": one} for one in (ADD, odd)]
    named = {"type": "function", "function": {"name": "odd"}}
    assert engine.stream(QUESTION, tools=tools, tool_choice="required")
    assert "tool 'odd': calls are not kept to its parameters" in caplog.text
    tools[1]["function"] = {**odd, "strict": True}
    for choice in ("auto", "required", named):
        with pytest.raises(OptionError, match=r"tool 'odd': parameters|\"not\""):
            engine.stream(QUESTION, tools=tools, tool_choice=choice)
    assert engine.stream(QUESTION, tools=tools, tool_choice="none")


def test_a_costly_schema_does_not_condemn_its_neighbours(
    engine: Engine, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial, "MAX_SECONDS", 0)  # and what is left of the one that it began
    costly = {"name": "costly", "parameters": {"properties": {"a": {"type": "integer", "multipleOf": 999_983}}}}
    good = {"name": "good", "strict": True, "parameters": {"properties": {"a": {"type": "string", "pattern": "^x+$"}}}}
    tools = [{"type": "function", "function": one} for one in (costly, good)]
    for _ in range(2):
        assert engine.stream(QUESTION, tools=tools)
    assert "tool 'costly': calls are not kept to its parameters" in caplog.text
    assert "good" not in caplog.text


def test_schemas_that_cannot_be_compiled_together_are_left_open(
    engine: Engine, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_one = GrammarCompiler.compile

    def compile_few(self: GrammarCompiler, grammar: str, where: str, *, on_trial: str | None = None) -> CompiledGrammar:
        if "first" in grammar and "second" in grammar:
            raise OptionError("tools: found too much")
        return compile_one(self, grammar, where, on_trial=on_trial)

    monkeypatch.setattr(GrammarCompiler, "compile", compile_few)
    tools = [
        {"type": "function", "function": {"name": name, "parameters": {"properties": {key: {"type": "null"}}}}}
        for name, key in (("f", "first"), ("g", "second"))
    ]
    assert engine.stream(QUESTION, tools=tools, tool_choice="required")
    assert "tools: calls of 2 are not kept to their parameters" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tool_choice": "always"}, "tool_choice: found 'always'"),
        ({"tool_choice": 3}, "tool_choice: found a number"),
        (
            {"tool_choice": {"type": "function", "name": "other"}},
            "tool_choice: found 'other', expected one of the tools: add",
        ),
        ({"tool_choice": "required", "tools": None}, "without tools"),
        ({"tool_choice": allowed("auto", "other")}, "tool_choice: found 'other', expected one of the tools: add"),
        ({"tool_choice": allowed("auto")}, "tool_choice: tools: found none, expected a list of at least one"),
        ({"tool_choice": allowed("always", "add")}, "tool_choice: mode: found 'always'"),
        ({"tool_choice": {"type": "allowed_tools", "allowed_tools": [1]}}, "tool_choice: mode: found null"),
        ({"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": "add"}}, "tools: found text"),
        ({"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [3]}}, "tool_choice: found a number"),
        ({"parallel_tool_calls": 1}, "parallel_tool_calls: found 1"),
    ],
)
def test_bad_choices(engine: Engine, options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        engine.stream(QUESTION, **{"tools": TOOLS, **options})


def test_arguments_are_told_as_they_come(babble: Engine) -> None:
    """The name first, then pieces that add up to what the call of the same seed is.

    Where tokens are too few for any whole call, it ends anywhere.
    """
    parameters = record(text={"type": "string", "minLength": 30, "maxLength": 40}, count={"type": "integer"})
    tools = [{"type": "function", "function": {"name": "note", "parameters": parameters}}]
    common: dict[str, Any] = {"tools": tools, "tool_choice": "required", "thinking": False, "seed": 5}
    *deltas, done = babble.stream(QUESTION, sampling=biased(babble, end=30), max_tokens=150, **common)
    assert isinstance(done, Done)
    pieces = [delta.tool_call for delta in deltas if isinstance(delta, Delta) and delta.tool_call is not None]
    assert len(pieces) == len(deltas) > 10
    assert (pieces[0].name, pieces[0].id) == ("note", done.reply.tool_calls[0].id)
    assert all(piece.name is piece.id is None and piece.arguments for piece in pieces[1:])
    whole = "".join(piece.arguments for piece in pieces)
    assert whole == done.reply.tool_calls[0].arguments
    Draft202012Validator(parameters).validate(json.loads(whole))
    count = len(done.tokens)
    for most in (16, 17, 18, 19, 20, count - 5, count - 1):
        *_, cut = babble.stream(QUESTION, sampling=biased(babble, end=30), max_tokens=most, **common)
        assert isinstance(cut, Done)
        assert cut.finish_reason == "length"
        found = cut.reply.tool_calls[0].arguments
        assert cut.reply.content == ""
        if most > 20:
            Draft202012Validator(parameters).validate(json.loads(found))
        else:
            assert whole.startswith(found)
        assert (cut.reply.whole_calls == cut.reply.tool_calls) == (most > 20)
        assert bool(assistant_message(cut.reply).get("tool_calls")) == (most > 20)
    assert found == whole


def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


def test_a_run_with_tools_has_to_call_in_its_first_reply_alone(engine: Engine) -> None:
    conversation = Conversation(engine)
    for run in (
        engine.run_tools("Hello", [add], tool_choice="required", max_rounds=3, seed=1, max_tokens=100),
        conversation.run_tools("Hello", [add], tool_choice="required", max_rounds=3, seed=1, max_tokens=100),
    ):
        first, *later = run.rounds
        assert first.finish_reason == "tool_calls"
        assert later
        assert later[-1].finish_reason == "stop"
        call = first.reply.tool_calls[0]
        arguments = json.loads(call.arguments)
        assert run.messages[1]["content"] == str(arguments["a"] + arguments["b"])
