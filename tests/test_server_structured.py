"""Replies kept to a form, by all the names that clients have for it."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections.abc import Sequence
from typing import Any

import pytest
from jsonschema import validate

from mlxqwen.chat.structured import compiler
from mlxqwen.chat.structured.constraint import GrammarConstraint
from mlxqwen.engine.engine import Engine
from mlxqwen.errors import GenerationError
from mlxqwen.model.qwen3 import Qwen3ForCausalLM
from mlxqwen.text.tokenizer import Tokenizer
from tests.asgi_calls import Call, until
from tests.serving import CHAT, Served, ask, serving
from tests.test_server_chat import CALCULATOR, PRODUCT, summed, whole

pytest.importorskip("llguidance")

SCHEMA = {
    "type": "object",
    "properties": {"count": {"type": "integer", "minimum": 0, "maximum": 9}, "word": {"enum": ["strawberry", "other"]}},
    "required": ["count", "word"],
    "additionalProperties": False,
}
OPENAI = {"type": "json_schema", "json_schema": {"name": "count", "strict": True, "schema": SCHEMA}}
PLAIN: dict[str, Any] = {"seed": 1, "max_tokens": 200, "chat_template_kwargs": {"enable_thinking": False}}
# A text without an end of its own may outlast max_tokens where a model is made to call something that it would not.
SHORT_EXPRESSION = {
    "type": "object",
    "properties": {"expression": {"type": "string", "maxLength": 30}},
    "required": ["expression"],
}
SHORT_CALCULATOR = {"type": "function", "function": {"name": "calculator", "parameters": SHORT_EXPRESSION}}
OTHER = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}}}
SOME = {"type": "allowed_tools"}


def content(reply: Any, index: int = 0) -> str:
    text: str = reply["choices"][index]["message"]["content"]
    return text


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": OPENAI},
        {"structured_outputs": {"json": SCHEMA}},
        {"guided_json": SCHEMA},
        {"json_schema": json.dumps(SCHEMA)},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_a_schema_is_kept_to_by_every_name(served: Served, fields: dict[str, Any]) -> None:
    reply = served.post(ask(**PLAIN, temperature=1.5, n=2, **fields))
    for index in range(2):
        validate(json.loads(content(reply, index)), SCHEMA)


def test_thought_is_free_and_streams_are_the_same(served: Served) -> None:
    body = ask(seed=1, response_format=OPENAI)
    reply = served.post(body)
    validate(json.loads(content(reply)), SCHEMA)
    assert reply["choices"][0]["message"]["reasoning_content"]
    assert summed(served.stream(body)) == whole(reply)


@pytest.mark.parametrize(
    ("fields", "form"),
    [
        ({"structured_outputs": {"choice": ["three", "four"]}}, "three|four"),
        ({"guided_choice": ["three", "four"]}, "three|four"),
        ({"structured_outputs": {"regex": "[0-9]{2}"}}, "[0-9]{2}"),
        ({"regex": "[0-9]{2}"}, "[0-9]{2}"),
        ({"guided_regex": "[0-9]{2}"}, "[0-9]{2}"),
        ({"structured_outputs": {"grammar": 'start: "a" "b"+'}}, "ab+"),
        ({"response_format": {"type": "json_object"}}, r"\{.*\}"),
    ],
    ids=str,
)
def test_other_forms(served: Served, fields: dict[str, Any], form: str) -> None:
    assert re.fullmatch(form, content(served.post(ask(**PLAIN, **fields))), re.DOTALL)


def test_texts_that_are_gone_on_with_have_forms_too(served: Served) -> None:
    body = {"prompt": "Numbers: ", "seed": 1, "structured_outputs": {"regex": "[0-9]{3}"}}
    assert re.fullmatch("[0-9]{3}", served.post(body, "/v1/completions")["choices"][0]["text"])


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "calculator"}}], ids=str)
def test_calls_that_have_to_be_made(served: Served, choice: Any) -> None:
    body = ask("Hello!", tools=[SHORT_CALCULATOR], tool_choice=choice, seed=1, max_tokens=300)
    reply = served.post(body)
    (call, *_) = whole(reply)["tool_calls"]
    assert call["name"] == "calculator"
    validate(json.loads(call["arguments"]), SHORT_EXPRESSION)
    assert summed(served.stream(body)) == whole(reply)
    assert reply["choices"][0]["finish_reason"] == "tool_calls"


def test_the_function_that_is_named_is_called(served: Served) -> None:
    named = {"type": "function", "function": {"name": "clock"}}
    reply = served.post(ask(PRODUCT, tools=[CALCULATOR, OTHER], tool_choice=named, seed=1, max_tokens=300))
    assert [call["name"] for call in whole(reply)["tool_calls"]] == ["clock"]


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        (
            CHAT,
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "x"}}}},
            "response_format",
        ),
        (CHAT, {"structured_outputs": {"regex": "("}}, "structured_outputs"),
        (CHAT, {"guided_regex": "("}, "guided_regex"),
        ("/v1/completions", {"prompt": "a", "regex": "("}, "regex"),
        ("/v1/responses", {"input": "a", "text": {"format": {"type": "x"}}}, "text.format"),
        (
            "/v1/responses",
            {"input": "a", "text": {"format": {"type": "json_schema", "name": "a", "schema": {"type": "x"}}}},
            "text.format",
        ),
        (CHAT, {"logit_bias": {"5": 101}}, "logit_bias"),
        (CHAT, {"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        (CHAT, {"cache_salt": "a" * 2000}, "cache_salt"),
    ],
    ids=str,
)
def test_errors_name_the_field_as_the_request_did(
    served: Served, path: str, fields: dict[str, Any], param: str
) -> None:
    error = served.refused({**(ask() if path == CHAT else {}), **fields}, path=path)
    assert error["param"] == param
    assert error["message"].startswith(param)


def test_tools_that_are_allowed(served: Served) -> None:
    """In both of OpenAI's forms; what is no function is left out, as from the tools."""
    search = {"type": "web_search"}
    tools: list[Any] = [CALCULATOR, OTHER, search]
    some = {"mode": "required", "tools": [{"type": "function", "function": {"name": "clock"}}, search]}
    reply = served.post(
        ask(PRODUCT, tools=tools, tool_choice={"type": "allowed_tools", "allowed_tools": some}, seed=1, max_tokens=300)
    )
    assert {call["name"] for call in whole(reply)["tool_calls"]} == {"clock"}
    none = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [search]}}
    reply = served.post(ask(PRODUCT, tools=tools, tool_choice=none, seed=1, max_tokens=300))
    assert "tool_calls" not in reply["choices"][0]["message"]
    flat = [{**one["function"], "type": "function"} for one in tools if one != search]
    choice = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "clock"}]}
    body = {"input": PRODUCT, "tools": flat, "tool_choice": choice, "seed": 1, "max_output_tokens": 300}
    response = served.post(body, "/v1/responses")
    assert {one["name"] for one in response["output"] if one["type"] == "function_call"} == {"clock"}
    assert response["tool_choice"] == choice


def test_in_the_other_apis(served: Served) -> None:
    question = "How many r's in strawberry?"
    text = {"format": {"type": "json_schema", "name": "count", "strict": True, "schema": SCHEMA}}
    response = served.post({"input": question, "text": text}, "/v1/responses")
    validate(json.loads(response["output"][-1]["content"][0]["text"]), SCHEMA)
    assert response["text"]["format"] == text["format"]
    tool = {"name": "calculator", "input_schema": SHORT_EXPRESSION}
    asked = {"max_tokens": 300, "messages": [{"role": "user", "content": "Hi"}], "tools": [tool]}
    for choice in ({"type": "any", "disable_parallel_tool_use": True}, {"type": "tool", "name": "calculator"}):
        message = served.post({**asked, "tool_choice": choice}, "/v1/messages")
        assert message["content"][-1]["name"] == "calculator"
        assert message["stop_reason"] == "tool_use"
    formed = {**asked, "tools": None, "output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}}
    validate(json.loads(served.post(formed, "/v1/messages")["content"][-1]["text"]), SCHEMA)


DEEP: Any = {"type": "string"}
for _ in range(40):
    DEEP = {"type": "array", "items": DEEP, "minItems": 9, "maxItems": 9999}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "object"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "nothing"}}}},
            "response_format",
        ),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"not": {}}}}}, "response_format"),
        ({"structured_outputs": {"json": SCHEMA, "regex": "a"}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs"),
        ({"guided_choice": ["a"], "regex": "a"}, "regex"),
        ({"ebnf": "root ::= 'a'"}, "ebnf"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": "sometimes"}, "tool_choice"),
        ({"tools": [CALCULATOR], "tool_choice": SOME}, "tool_choice"),
        (
            {
                "tools": [CALCULATOR],
                "tool_choice": {
                    "type": "allowed_tools",
                    "allowed_tools": {"mode": "required", "tools": [{"type": "mcp"}]},
                },
            },
            "tool_choice",
        ),
        ({"tools": [CALCULATOR], "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice"),
    ],
    ids=str,
)
def test_forms_that_cannot_be_kept_to_are_refused(served: Served, fields: dict[str, Any], param: str) -> None:
    assert served.refused(ask(**PLAIN, **fields))["param"] == param


@pytest.mark.parametrize(
    "form",
    [{"json": DEEP}, {"regex": "((((a{1,999}){1,999}){1,999}){1,999})"}, {"choice": ["a" * 60] * 1024}],
    ids=repr,
)
def test_bombs_are_refused_or_kept_to_soon(served: Served, form: dict[str, Any]) -> None:
    response = served.client.post("/v1/chat/completions", json=ask(max_tokens=5, structured_outputs=form))
    assert response.status_code in (200, 400)
    assert served.client.get("/health").status_code == 200


def test_schemas_that_take_long_keep_no_other_request_waiting(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """By whichever API they come, and more of them than there are threads."""
    go, tried = threading.Event(), []

    def slow(grammars: Sequence[str]) -> list[str | None]:
        tried.append(threading.current_thread())
        go.wait(60)
        return ["too costly"] * len(grammars)

    monkeypatch.setattr(compiler, "compile_in_bounds", slow)

    def costly(number: int) -> dict[str, Any]:
        pattern = {"type": "string", "pattern": f"^costly {number}$"}
        return {"type": "object", "properties": {"a": pattern}, "required": ["a"], "additionalProperties": False}

    def tool(number: int, **more: Any) -> dict[str, Any]:
        return {"type": "function", "function": {"name": "f", "parameters": costly(number), **more}}

    def formatted(number: int) -> dict[str, Any]:
        return {"type": "json_schema", "name": "f", "schema": costly(number)}

    hi = {"model": "demo", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
    given: list[tuple[str, dict[str, Any]]] = [
        (CHAT, {**hi, "response_format": {"type": "json_schema", "json_schema": {"name": "f", "schema": costly(0)}}}),
        (CHAT, {**hi, "tools": [tool(1, strict=True)]}),
        (CHAT, {**hi, "tools": [tool(2)], "tool_choice": "required"}),
        ("/v1/completions", {"model": "demo", "prompt": "a", "guided_json": costly(3)}),
        ("/v1/messages", {**hi, "output_config": {"format": formatted(4)}}),
        (
            "/v1/messages",
            {
                **hi,
                "tools": [{"name": "f", "input_schema": costly(5)}],
                "tool_choice": {"type": "any"},
            },
        ),
        ("/v1/responses", {"model": "demo", "input": "Hi", "text": {"format": formatted(6)}}),
    ]

    async def work() -> None:
        try:
            for path, body in given:
                slow_ones = [Call(served.app, path, body) for _ in range(5)]
                await until(lambda: len(tried) >= 4)
                ordinary = [
                    Call(served.app, CHAT, ask(max_tokens=1)),
                    Call(served.app, CHAT, ask(max_tokens=1, tools=[OTHER])),
                    Call(served.app, "/tokenize", {"model": "demo", "prompt": "a"}),
                ]
                for call in ordinary:
                    assert (await asyncio.wait_for(call.end(), 20)).status == 200
                go.set()
                for call in slow_ones:
                    assert (await call.end()).status in (200, 400)
                go.clear()
                tried.clear()
        finally:
            go.set()

    asyncio.run(work())


def test_white_space_is_bounded(babbler: Qwen3ForCausalLM, tokenizer: Tokenizer) -> None:
    """Where blanks are all that a model wants to say, JSON ends all the same, before its tokens are used up."""
    blanks = [n for n in range(tokenizer.vocab_size) if not tokenizer.token_bytes(n).strip()]
    bias = {str(token): 100.0 for token in blanks}
    flags = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
    form = {"type": "json_schema", "json_schema": {"name": "flags", "schema": {**flags, "additionalProperties": False}}}
    tool = {"type": "function", "function": {"name": "f", "parameters": {**flags, "additionalProperties": False}}}
    asked = ask(max_tokens=60, temperature=0.0, logit_bias=bias, chat_template_kwargs={"enable_thinking": False})
    with serving(Engine(babbler, tokenizer)) as blank:
        reply = blank.post({**asked, "response_format": form})
        assert reply["choices"][0]["finish_reason"] == "stop"
        validate(json.loads(content(reply)), flags)
        called = blank.post({**asked, "tools": [tool], "tool_choice": "required", "parallel_tool_calls": False})
        (call,) = called["choices"][0]["message"]["tool_calls"]
        validate(json.loads(call["function"]["arguments"]), flags)


@pytest.mark.parametrize("problem", [GenerationError("constraint: it fails"), RuntimeError("inside")])
def test_a_constraint_that_fails_is_an_error_and_no_free_text(
    served: Served, monkeypatch: pytest.MonkeyPatch, problem: Exception
) -> None:
    seen = 0

    def fails(self: GrammarConstraint) -> None:
        nonlocal seen
        seen += 1
        if seen > 5:
            raise problem

    monkeypatch.setattr(GrammarConstraint, "mask", fails)
    body = ask(response_format=OPENAI, **PLAIN)
    whole_reply = served.client.post(CHAT, json=body)
    assert whole_reply.status_code == 500, whole_reply.text
    assert "choices" not in whole_reply.json()
    seen = 0
    events = served.stream(body)
    assert events[-1]["error"]["code"] == "internal_error"
    assert all(choice["finish_reason"] is None for event in events[:-1] for choice in event["choices"])
    monkeypatch.undo()
    assert content(served.post(ask(seed=1)))


def test_long_arguments_of_calls_that_have_to_be_made_come_in_pieces(served: Served) -> None:
    words = {"type": "array", "items": {"enum": ["strawberry"]}, "minItems": 12, "maxItems": 12}
    parameters = {
        "type": "object",
        "properties": {"words": words},
        "required": ["words"],
        "additionalProperties": False,
    }
    tool = {"type": "function", "function": {"name": "note", "parameters": parameters}}
    body = ask("Hi", tools=[tool], tool_choice="required", parallel_tool_calls=False, **{**PLAIN, "max_tokens": 400})
    events = served.stream(body)
    calls = [call for event in events for call in event["choices"][0]["delta"].get("tool_calls", ())]
    pieces = [call["function"]["arguments"] for call in calls]
    assert json.loads("".join(pieces)) == {"words": ["strawberry"] * 12}
    assert len(pieces) > 24
    assert max(map(len, pieces)) < 30


MISSING = "is missing, expected"
OPENAIS = '{"type": "json_schema", "json_schema": {"name": …, "schema": {…}}}'


@pytest.mark.parametrize("given", [{}, {"json_schema": SCHEMA}, {"json_schema": "a"}, {"json_schema": {"name": "a"}}])
def test_a_schema_that_is_not_in_its_place_is_told(served: Served, given: dict[str, Any]) -> None:
    error = served.refused(ask(response_format={"type": "json_schema", **given}))
    assert error["message"] == f"response_format.json_schema.schema: {MISSING} {OPENAIS}"
    assert error["param"] == "response_format.json_schema.schema"


def test_forms_of_python_are_not_told(served: Served) -> None:
    text = {"format": {"type": "json_schema", "name": "a"}}
    message = served.refused({"input": "a", "text": text}, path="/v1/responses")["message"]
    assert message == f'text.format.schema: {MISSING} {{"type": "json_schema", "name": …, "schema": {{…}}}}'
    message = served.refused(ask(structured_outputs={"json_object": None, "json": 1}))["message"]
    assert message == "structured_outputs: found a number, expected a JSON schema"
    message = served.refused(ask(structured_outputs={"json_object": "yes"}))["message"]
    assert message == 'structured_outputs: json_object: found "yes", expected true or false'
