"""Anthropic's Python SDK: messages, thinking, tools, structured output, counts and errors."""

from __future__ import annotations

import sys
from typing import Literal

from anthropic import Anthropic, BadRequestError
from pydantic import BaseModel

QUESTION = [{"role": "user", "content": "How many r's in strawberry?"}]
PRODUCT = [{"role": "user", "content": "What is 1234 * 567?"}]
TOOLS = [
    {
        "name": "calculator",
        "description": "Evaluate an arithmetic expression.",
        "input_schema": {
            "type": "object",
            "properties": {"expression": {"type": "string", "description": "The expression."}},
            "required": ["expression"],
            "additionalProperties": False,
        },
    }
]
GREEDY = {"temperature": 0}
THINKING = {"type": "enabled", "budget_tokens": 1024}


class Count(BaseModel):
    """An answer with a form."""

    letter: Literal["r"]
    count: int


def chat(client: Anthropic, model: str) -> None:
    reply = client.messages.create(model=model, max_tokens=1000, messages=QUESTION, extra_body=GREEDY)
    assert [block.type for block in reply.content] == ["text"]
    assert reply.stop_reason == "end_turn"


def thinking(client: Anthropic, model: str) -> None:
    reply = client.messages.create(
        model=model, max_tokens=2000, messages=QUESTION, extra_body=GREEDY, thinking=THINKING
    )
    assert [block.type for block in reply.content] == ["thinking", "text"]
    assert "3 r's" in reply.content[1].text, reply


def stream(client: Anthropic, model: str) -> None:
    with client.messages.stream(model=model, max_tokens=2000, messages=QUESTION, thinking=THINKING) as events:
        text = "".join(events.text_stream)
        message = events.get_final_message()
    assert message.content[-1].text == text
    assert message.usage.output_tokens > 0


def tools(client: Anthropic, model: str) -> None:
    asked = {"model": model, "max_tokens": 1000, "tools": TOOLS, "extra_body": GREEDY, "thinking": THINKING}
    with client.messages.stream(**asked, messages=PRODUCT) as events:
        called = events.get_final_message()
    assert called.stop_reason == "tool_use", called
    (call,) = [block for block in called.content if block.type == "tool_use"]
    assert (call.name, call.input) == ("calculator", {"expression": "1234 * 567"})
    result = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "699678"}]}
    history = [*PRODUCT, {"role": "assistant", "content": called.content}, {"role": "user", "content": [result]}]
    told = client.messages.create(**asked, messages=history)
    assert "699678" in told.content[-1].text, told


def structured(client: Anthropic, model: str) -> None:
    parsed = client.messages.parse(model=model, max_tokens=1000, messages=QUESTION, output_format=Count)
    assert isinstance(parsed.parsed_output, Count), parsed


def count(client: Anthropic, model: str) -> None:
    counted = client.messages.count_tokens(model=model, messages=QUESTION, tools=TOOLS)
    assert counted.input_tokens > 50


def models(client: Anthropic, model: str) -> None:
    assert [one.id for one in client.models.list()] == [model]
    assert client.models.retrieve(model).id == model


def errors(client: Anthropic, model: str) -> None:
    try:
        client.messages.create(model=model, max_tokens=10, messages=QUESTION, extra_body={"temperature": 9})
    except BadRequestError as error:
        assert error.body["error"]["type"] == "invalid_request_error", error
    else:
        raise AssertionError("no BadRequestError")


def main() -> None:
    url, model = sys.argv[1:]
    client = Anthropic(base_url=url.removesuffix("/v1"), api_key="EMPTY", max_retries=0)
    for step in (chat, thinking, stream, tools, structured, count, models, errors):
        step(client, model)
        print(step.__name__, flush=True)


main()
