"""Pydantic AI's agents: with a tool, streamed, and with typed results in all three ways."""

from __future__ import annotations

import asyncio
import sys

from pydantic import BaseModel, Field
from pydantic_ai import Agent, NativeOutput, ToolOutput
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider
from pydantic_ai.settings import ModelSettings

QUESTION = "How many r's in strawberry?"


class Count(BaseModel):
    """An answer with a form."""

    letter: str = Field(max_length=1)
    count: int = Field(ge=0, le=99)


def calculator(expression: str) -> str:
    """Evaluate an arithmetic expression.

    Args:
        expression: The expression.
    """
    assert expression == "1234 * 567", expression
    return "699678"


async def main() -> None:
    url, name = sys.argv[1:]
    provider = OpenAIProvider(base_url=url, api_key="EMPTY")
    settings = ModelSettings(temperature=0.0)
    for kind in (OpenAIChatModel, OpenAIResponsesModel):
        model = kind(name, provider=provider, settings=settings)
        agent = Agent(model)
        assert "3 r's" in (await agent.run(QUESTION)).output
        print(f"{kind.__name__} chat", flush=True)
        async with agent.run_stream(QUESTION) as streamed:
            assert "3 r's" in await streamed.get_output()
        print("stream", flush=True)
        told = await Agent(model, tools=[calculator]).run("What is 1234 * 567?")
        assert "699678" in told.output, told
        assert len(told.all_messages()) == 4
        print("tools", flush=True)
        for form in (ToolOutput(Count), NativeOutput(Count)):
            answer = await Agent(model, output_type=form).run(QUESTION)
            assert isinstance(answer.output, Count)
            print(type(form).__name__, flush=True)


asyncio.run(main())
