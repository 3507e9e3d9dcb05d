"""Qwen-Agent's Assistant with a function of its own and an MCP server's, by prompt and by the server's own tools."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from qwen_agent.agents import Assistant
from qwen_agent.tools.base import BaseTool, register_tool

MCP_SERVER = str(Path(__file__).with_name("mcp_clock.py"))
CLOCK = {"mcpServers": {"wall": {"command": sys.executable, "args": [MCP_SERVER]}}}


@register_tool("calculator")
class Calculator(BaseTool):
    """A function of Qwen-Agent's."""

    description = "Evaluate an arithmetic expression."
    parameters = {
        "type": "object",
        "properties": {"expression": {"type": "string", "description": "The expression."}},
        "required": ["expression"],
    }

    def call(self, params: str | dict[str, Any], **kwargs: Any) -> str:
        assert json.loads(str(params)) == {"expression": "1234 * 567"}, params
        return "699678"


def ask(bot: Assistant, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages that follow."""
    following: list[dict[str, Any]] = []
    for following in bot.run(messages=messages):
        pass
    return following


def main() -> None:
    url, model = sys.argv[1:]
    for way in ("prompt", "tools"):
        sampling = {"use_raw_api": way == "tools", "temperature": 0}
        config = {"model": model, "model_server": url, "api_key": "EMPTY", "generate_cfg": sampling}
        plain = ask(Assistant(llm=config), [{"role": "user", "content": "How many r's in strawberry?"}])
        assert "3 r's" in plain[-1]["content"], plain
        assert any(message.get("reasoning_content") for message in plain), plain
        print(f"{way} chat", flush=True)
        bot = Assistant(llm=config, function_list=["calculator"])
        told = ask(bot, [{"role": "user", "content": "What is 1234 * 567?"}])
        assert [message["name"] for message in told if message["role"] == "function"] == ["calculator"], told
        assert "699678" in told[-1]["content"], told
        print(f"{way} function", flush=True)
    called_over_mcp(url, model)
    print("MCP server", flush=True)


def called_over_mcp(url: str, model: str) -> None:
    """The demo knows no tool of such a name: it has to call it, and then must not."""
    config = {"model": model, "model_server": url, "api_key": "EMPTY"}
    sampling = {"use_raw_api": True, "temperature": 0}
    bot = Assistant(llm={**config, "generate_cfg": {**sampling, "tool_choice": "required"}}, function_list=[CLOCK])
    question = [{"role": "user", "content": "What time is it?"}]
    called: list[dict[str, Any]] = []
    for called in bot.run(messages=question):
        if called[-1]["role"] == "function":  # it would have to call it again and again
            break
    assert (called[-1]["name"], called[-1]["content"]) == ("wall-clock", "14:32"), called
    bot = Assistant(llm={**config, "generate_cfg": {**sampling, "tool_choice": "none"}}, function_list=[CLOCK])
    told = ask(bot, [*question, *called])
    assert "14:32" in told[-1]["content"], told


main()
