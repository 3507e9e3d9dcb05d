"""What agents send that other servers trip over: messages in any order, lines that differ with each request, forms."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.serving import Served, ask

FORM = {"type": "object", "properties": {"count": {"enum": [3]}}, "required": ["count"], "additionalProperties": False}
BILLING = "x-anthropic-billing-header: cc_version=2.1.100.7b4; cc_entrypoint=cli; cch={};"
LEFT = "<total_tokens>{} tokens left</total_tokens>"
RULES = "You are a careful assistant that counts letters and never guesses at all."


def shown(served: Served, messages: list[dict[str, Any]], **fields: Any) -> str:
    """The prompt that a talk becomes, as text."""
    tokens = served.post({"messages": messages, **fields}, "/tokenize")["tokens"]
    return served.engine.tokenizer.decode(tokens)


@pytest.mark.parametrize("role", ["system", "developer"])
def test_instructions_may_stand_anywhere_and_often(served: Served, role: str) -> None:
    talk = [
        {"role": "system", "content": "First."},
        {"role": role, "content": [{"type": "text", "text": "Second."}]},
        *ask()["messages"],
        {"role": "assistant", "content": "3"},
        {"role": role, "content": "Third."},
        {"role": "user", "content": "And now?"},
        {"role": role, "content": "Fourth."},
    ]
    prompt = shown(served, talk)
    places = [prompt.index(word) for word in ("First", "Second", "strawberry", "Third", "And now", "Fourth")]
    assert places == sorted(places)
    assert served.post({"messages": talk, "max_tokens": 1})["usage"]["prompt_tokens"] > 20
    items = [*talk[:3], {"type": "message", "role": role, "content": "Mid."}, *talk[4:]]
    served.post({"input": items, "max_output_tokens": 1}, "/v1/responses")
    if role == "system":
        messages = [{"role": "user", "content": "Hi"}, {"role": "system", "content": "Mid."}, talk[-2]]
        served.post({"messages": messages, "system": "First.", "max_tokens": 1}, "/v1/messages")


def system(content: Any) -> list[dict[str, Any]]:
    return [{"role": "system", "content": content}, *ask()["messages"]]


@pytest.mark.parametrize(
    "instructions",
    [
        f"{BILLING}\n{RULES}",
        f"{BILLING}\nx-anthropic-session: {{}}\n\n{RULES}",
        [{"type": "text", "text": f"{BILLING}\n"}, {"type": "text", "text": RULES}],
        f"{RULES}\n{LEFT}",
        f"{BILLING}\n{RULES}\n\n{LEFT}\n{LEFT}",
    ],
    ids=str,
)
def test_lines_that_differ_with_each_request_are_set_aside(served: Served, instructions: Any) -> None:
    def filled(number: str) -> list[dict[str, Any]]:
        return system(json.loads(json.dumps(instructions).replace("{}", number)))

    expected = shown(served, system(RULES))
    assert shown(served, filled("12345")) == shown(served, filled("99")) == expected
    served.post({"messages": filled("5"), "max_tokens": 1})
    usage = served.post({"messages": filled("6"), "max_tokens": 1})["usage"]
    known = usage["prompt_tokens_details"]["cached_tokens"]
    assert known == (usage["prompt_tokens"] - 1) // 16 * 16 > 0


def test_only_known_lines_of_instructions_are_set_aside(served: Served) -> None:
    header, left = BILLING.format("7"), LEFT.format("7")
    for text in (f"{RULES}\n{header}", f"Say {left}?", f"x-other: 5\n{RULES}", "<total_tokens>many</total_tokens>"):
        assert text in shown(served, system(text))
    asked = [{"role": "user", "content": f"{header}\n{left}"}]
    assert f"{header}\n{left}" in shown(served, asked)
    assert shown(served, system(header)) == shown(served, ask()["messages"])


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages"])
def test_rolling_cache_marks_change_no_prompt(served: Served, path: str) -> None:
    def talk(marked: int) -> dict[str, Any]:
        messages = []
        for place in range(4):
            mark = {"cache_control": {"type": "ephemeral"}} if place == marked else {}
            part = {"type": "text", "text": f"What is {place} + {place}, and what is {place} + 1?", **mark}
            messages.append({"role": ("user", "assistant")[place % 2], "content": [part]})
        return {"messages": [*messages, {"role": "user", "content": "Hi"}], "max_tokens": 1}

    def usage(body: dict[str, Any]) -> tuple[int, int]:
        told = served.post(body, path)["usage"]
        if path == "/v1/messages":
            return told["input_tokens"] + told["cache_read_input_tokens"], told["cache_read_input_tokens"]
        return told["prompt_tokens"], told["prompt_tokens_details"]["cached_tokens"]

    first = usage(talk(1))
    for marked in (2, 3, 9):
        tokens, known = usage(talk(marked))
        assert tokens == first[0]
        assert known == (tokens - 1) // 16 * 16 > 0


def test_a_response_has_a_form_by_both_its_names(served: Served) -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "count", "schema": FORM}}
    body: dict[str, Any] = {"input": "How many r's in strawberry?", "temperature": 0}
    response = served.post({**body, "response_format": schema}, "/v1/responses")
    assert json.loads(response["output"][-1]["content"][0]["text"]) == {"count": 3}
    assert served.post({**body, "response_format": {"type": "text"}}, "/v1/responses")["status"] == "completed"
    both = {**body, "response_format": schema, "text": {"format": {"type": "json_schema", "name": "c", "schema": FORM}}}
    assert served.refused(both, 400, "/v1/responses")["param"] == "response_format"
    wrong = {**body, "response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "nothing"}}}}
    assert served.refused(wrong, 400, "/v1/responses")["code"] == "invalid_value"
