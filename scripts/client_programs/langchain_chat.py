"""LangChain's ChatOpenAI: invoke, stream, a bound tool, structured output."""

from __future__ import annotations

import sys

from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, Field

QUESTION = "How many r's in strawberry?"


class Count(BaseModel):
    """An answer with a form."""

    letter: str = Field(max_length=1)
    count: int = Field(ge=0, le=99)


@tool(parse_docstring=True)
def calculator(expression: str) -> str:
    """Evaluate an arithmetic expression.

    Args:
        expression: The expression.
    """
    assert expression == "1234 * 567", expression
    return "699678"


def chat(model: ChatOpenAI) -> None:
    reply = model.invoke(QUESTION)
    assert "3 r's" in reply.content, reply
    assert reply.usage_metadata["output_token_details"]["reasoning"] > 0


def stream(model: ChatOpenAI) -> None:
    first, *rest = model.stream(QUESTION)
    whole = first
    for piece in rest:
        whole += piece
    assert "3 r's" in whole.content, whole
    assert whole.usage_metadata["total_tokens"] > 0


def tools(model: ChatOpenAI) -> None:
    bound = model.bind_tools([calculator])
    asked = HumanMessage("What is 1234 * 567?")
    called = bound.invoke([asked])
    (call,) = called.tool_calls
    result = calculator.invoke(call)
    assert isinstance(result, ToolMessage)
    assert "699678" in bound.invoke([asked, called, result]).content


def structured(model: ChatOpenAI) -> None:
    for method in ("json_schema", "function_calling"):
        assert isinstance(model.with_structured_output(Count, method=method).invoke(QUESTION), Count), method


def main() -> None:
    url, name = sys.argv[1:]
    model = ChatOpenAI(model=name, base_url=url, api_key="EMPTY", temperature=0, max_retries=0, stream_usage=True)
    for step in (chat, stream, tools, structured):
        step(model)
        print(step.__name__, flush=True)


main()
