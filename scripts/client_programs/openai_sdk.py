"""OpenAI's Python SDK: every API of the server that it has methods for."""

from __future__ import annotations

import json
import sys

from openai import BadRequestError, NotFoundError, OpenAI
from pydantic import BaseModel, Field

QUESTION = [{"role": "user", "content": "How many r's in strawberry?"}]
PRODUCT = [{"role": "user", "content": "What is 1234 * 567?"}]
CALCULATOR = {
    "name": "calculator",
    "description": "Evaluate an arithmetic expression.",
    "parameters": {
        "type": "object",
        "properties": {"expression": {"type": "string", "description": "The expression."}},
        "required": ["expression"],
        "additionalProperties": False,
    },
}
TOOLS = [{"type": "function", "function": CALCULATOR}]


class Count(BaseModel):
    """An answer with a form."""

    letter: str = Field(max_length=1)
    count: int = Field(ge=0, le=99)


def models(client: OpenAI, model: str) -> None:
    assert [one.id for one in client.models.list()] == [model]
    assert client.models.retrieve(model).id == model


def chat(client: OpenAI, model: str) -> None:
    reply = client.chat.completions.create(model=model, messages=QUESTION, temperature=0)
    assert "3 r's" in reply.choices[0].message.content, reply
    assert reply.choices[0].message.reasoning_content
    assert reply.usage.completion_tokens_details.reasoning_tokens > 0


def stream(client: OpenAI, model: str) -> None:
    whole = client.chat.completions.create(model=model, messages=QUESTION, seed=7)
    pieces = client.chat.completions.create(
        model=model, messages=QUESTION, seed=7, stream=True, stream_options={"include_usage": True}
    )
    text = ""
    for chunk in pieces:
        text += "".join(choice.delta.content or "" for choice in chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunk.usage.total_tokens == whole.usage.total_tokens
    with client.chat.completions.stream(model=model, messages=QUESTION, seed=7) as events:
        for _ in events:
            pass
        assert events.get_final_completion().choices[0].message.content == text


def tools(client: OpenAI, model: str) -> None:
    called = client.chat.completions.create(model=model, messages=PRODUCT, tools=TOOLS, temperature=0)
    message = called.choices[0].message
    (call,) = message.tool_calls
    assert (called.choices[0].finish_reason, call.function.name) == ("tool_calls", "calculator")
    assert json.loads(call.function.arguments) == {"expression": "1234 * 567"}
    history = [*PRODUCT, message, {"role": "tool", "tool_call_id": call.id, "content": "699678"}]
    told = client.chat.completions.create(model=model, messages=history, tools=TOOLS, temperature=0)
    assert "699678" in told.choices[0].message.content, told


def streamed_tools(client: OpenAI, model: str) -> None:
    with client.chat.completions.stream(model=model, messages=PRODUCT, tools=TOOLS, temperature=0) as events:
        kinds = {event.type for event in events}
        (call,) = events.get_final_completion().choices[0].message.tool_calls
    assert "tool_calls.function.arguments.done" in kinds, kinds
    assert json.loads(call.function.arguments) == {"expression": "1234 * 567"}


def structured(client: OpenAI, model: str) -> None:
    parsed = client.chat.completions.parse(model=model, messages=QUESTION, response_format=Count, temperature=0)
    assert isinstance(parsed.choices[0].message.parsed, Count), parsed
    reply = client.responses.parse(model=model, input="How many r's in strawberry?", text_format=Count, temperature=0)
    assert isinstance(reply.output_parsed, Count), reply


def completions(client: OpenAI, model: str) -> None:
    reply = client.completions.create(model=model, prompt="Hello", max_tokens=4, echo=True)
    assert reply.choices[0].text.startswith("Hello")


def responses(client: OpenAI, model: str) -> None:
    first = client.responses.create(model=model, input="How many r's in strawberry?", temperature=0)
    assert "3 r's" in first.output_text, first
    with client.responses.stream(model=model, input=PRODUCT, tools=[{"type": "function", **CALCULATOR}]) as events:
        for _ in events:
            pass
        (call,) = [item for item in events.get_final_response().output if item.type == "function_call"]
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "699678"}
    told = client.responses.create(
        model=model, previous_response_id=events.get_final_response().id, input=[output], temperature=0
    )
    assert "699678" in told.output_text, told
    assert client.responses.retrieve(first.id).output_text == first.output_text
    client.responses.delete(first.id)


def errors(client: OpenAI, model: str) -> None:
    for failure, fields in ((NotFoundError, {"model": "gpt-4"}), (BadRequestError, {"model": model, "top_p": 3})):
        try:
            client.chat.completions.create(messages=QUESTION, **fields)
        except failure as error:
            assert error.body["message"], error
        else:
            raise AssertionError(f"no {failure.__name__}")


def main() -> None:
    url, model = sys.argv[1:]
    client = OpenAI(base_url=url, api_key="EMPTY", max_retries=0)
    for step in (models, chat, stream, tools, streamed_tools, structured, completions, responses, errors):
        step(client, model)
        print(step.__name__, flush=True)


main()
