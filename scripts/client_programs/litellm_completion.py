"""LiteLLM: as a server of OpenAI's form, of vLLM's, and of Anthropic's."""

from __future__ import annotations

import json
import sys
from typing import Any

import litellm
from pydantic import BaseModel, Field

QUESTION = [{"role": "user", "content": "How many r's in strawberry?"}]
PRODUCT = [{"role": "user", "content": "What is 1234 * 567?"}]
PARAMETERS = {
    "type": "object",
    "properties": {"expression": {"type": "string", "description": "The expression."}},
    "required": ["expression"],
    "additionalProperties": False,
}
CALCULATOR = {"name": "calculator", "description": "Evaluate an arithmetic expression.", "parameters": PARAMETERS}
TOOLS = [{"type": "function", "function": CALCULATOR}]


class Count(BaseModel):
    """An answer with a form."""

    letter: str = Field(max_length=1)
    count: int = Field(ge=0, le=99)


def chat(asked: dict[str, Any]) -> None:
    reply = litellm.completion(**asked, messages=QUESTION)
    assert "3 r's" in reply.choices[0].message.content, reply
    assert reply.choices[0].message.reasoning_content


def stream(asked: dict[str, Any]) -> None:
    chunks = list(litellm.completion(**asked, messages=QUESTION, stream=True, stream_options={"include_usage": True}))
    whole = litellm.stream_chunk_builder(chunks)
    assert "3 r's" in whole.choices[0].message.content, whole
    assert whole.choices[0].message.reasoning_content
    assert whole.usage.completion_tokens > 0


def tools(asked: dict[str, Any]) -> None:
    called = litellm.completion(**asked, messages=PRODUCT, tools=TOOLS)
    message = called.choices[0].message
    (call,) = message.tool_calls
    assert json.loads(call.function.arguments) == {"expression": "1234 * 567"}
    history = [*PRODUCT, message, {"role": "tool", "tool_call_id": call.id, "content": "699678"}]
    told = litellm.completion(**asked, messages=history, tools=TOOLS)
    assert "699678" in told.choices[0].message.content, told


def structured(asked: dict[str, Any]) -> None:
    reply = litellm.completion(**asked, messages=QUESTION, response_format=Count)
    Count.model_validate_json(reply.choices[0].message.content)


def main() -> None:
    url, model = sys.argv[1:]
    for provider in ("openai", "hosted_vllm"):
        asked = {"model": f"{provider}/{model}", "api_base": url, "api_key": "EMPTY", "temperature": 0}
        for step in (chat, stream, tools, structured):
            step(asked)
            print(f"{provider} {step.__name__}", flush=True)
    root = url.removesuffix("/v1")
    asked = {"model": f"anthropic/{model}", "api_base": root, "api_key": "EMPTY", "temperature": 0, "max_tokens": 900}
    asked["thinking"] = {"type": "enabled", "budget_tokens": 1024}
    asked["allowed_openai_params"] = ["thinking"]  # whose models it knows by name
    for step in (chat, stream, tools):
        step(asked)
        print(f"anthropic {step.__name__}", flush=True)


main()
