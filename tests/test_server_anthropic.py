"""Anthropic's messages, by its official client: blocks, events in their order, counts and errors."""

from __future__ import annotations

from typing import Any

import pytest

from mlxqwen.chat.structured.compiler import GrammarCompiler
from mlxqwen.model.qwen3 import Qwen3ForCausalLM
from mlxqwen.server.anthropic_request import MessagesFields, as_chat
from mlxqwen.server.bodies import form_of
from mlxqwen.server.chat_request import thinking_of
from mlxqwen.text.tokenizer import Tokenizer
from tests.scripted_model import scripted_engine
from tests.serving import Served, serving

anthropic = pytest.importorskip("anthropic")

PATH = "/v1/messages"
QUESTION = [{"role": "user", "content": "How many r's in strawberry?"}]
PRODUCT = [{"role": "user", "content": "What is 1234 * 567?"}]
GREEDY: dict[str, Any] = {"extra_body": {"temperature": 0.0}}  # which the client has no argument for
CALCULATOR = {
    "name": "calculator",
    "description": "Evaluate an arithmetic expression.",
    "input_schema": {
        "type": "object",
        "properties": {"expression": {"type": "string", "description": "The expression."}},
        "required": ["expression"],
    },
}


@pytest.fixture
def client(served: Served) -> Any:
    return anthropic.Anthropic(
        base_url="http://127.0.0.1:8000", api_key="none", http_client=served.client, max_retries=0
    )


def test_a_message(served: Served, client: Any) -> None:
    message = client.messages.create(model="demo", max_tokens=200, messages=QUESTION, **GREEDY)
    (block,) = message.content
    expected = served.engine.chat(QUESTION, thinking=False, sampling={"temperature": 0.0})
    assert (block.type, block.text) == ("text", expected.content)
    assert (message.stop_reason, message.stop_sequence, message.role) == ("end_turn", None, "assistant")
    prompt = len(served.engine.prompt(QUESTION, thinking=False))
    usage = message.usage
    assert usage.input_tokens + usage.cache_read_input_tokens == prompt
    again = client.messages.create(model="demo", max_tokens=1, messages=QUESTION).usage
    assert again.cache_read_input_tokens >= 16
    assert again.input_tokens + again.cache_read_input_tokens == prompt


def test_thought_is_a_block_of_its_own_and_streams_add_up(served: Served, client: Any) -> None:
    asked: dict[str, Any] = {
        "model": "demo",
        "max_tokens": 400,
        "messages": QUESTION,
        **GREEDY,
        "thinking": {"type": "enabled", "budget_tokens": 300},
    }
    message = client.messages.create(**asked)
    assert [block.type for block in message.content] == ["thinking", "text"]
    expected = served.engine.chat(QUESTION, thinking=True, sampling={"temperature": 0.0})
    assert [message.content[0].thinking, message.content[1].text] == [expected.reasoning, expected.content]
    with client.messages.stream(**asked) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_message()
    assert [final.content[0].thinking, final.content[1].text] == [expected.reasoning, expected.content]
    assert final.stop_reason == message.stop_reason
    assert final.usage.output_tokens == message.usage.output_tokens
    assert final.usage.input_tokens + final.usage.cache_read_input_tokens == message.usage.input_tokens + (
        message.usage.cache_read_input_tokens
    )
    raw = [
        kind for kind in kinds if kind in {"message_start", "message_stop", "content_block_start", "content_block_stop"}
    ]
    block = ["content_block_start", "content_block_stop"]
    assert raw == ["message_start", *block, *block, "message_stop"]


@pytest.mark.parametrize(
    ("thinking", "effort", "budget"),
    [
        ({"type": "adaptive"}, "low", 1024),
        ({"type": "adaptive"}, "max", None),
        ({"type": "enabled", "budget_tokens": 7}, "low", 7),
        ({"type": "disabled"}, "low", None),
        (None, "low", None),
        ({"type": "adaptive"}, "huge", None),
    ],
)
def test_effort_is_a_budget_where_the_model_thinks(thinking: Any, effort: str, budget: int | None) -> None:
    given = {"messages": QUESTION, "max_tokens": 5, "thinking": thinking, "output_config": {"effort": effort}}
    notes: list[str] = []
    chat = as_chat(form_of(given, MessagesFields), notes)
    switch, found = thinking_of(chat)
    assert (switch, found) == (thinking is not None and thinking["type"] != "disabled", budget)
    assert notes == (["output_config.effort"] if effort == "huge" else [])


def test_calls_and_their_results(client: Any) -> None:
    asked: dict[str, Any] = {"model": "demo", "max_tokens": 300, "tools": [CALCULATOR], **GREEDY}
    message = client.messages.create(messages=PRODUCT, **asked)
    call = message.content[-1]
    assert (message.stop_reason, call.type, call.name) == ("tool_use", "tool_use", "calculator")
    assert call.input == {"expression": "1234 * 567"}
    with client.messages.stream(messages=PRODUCT, **asked) as stream:
        assert stream.get_final_message().content[-1].input == call.input
    result = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "699678"}]}
    talk = [*PRODUCT, {"role": "assistant", "content": message.content}, {"role": "user", "content": [result]}]
    answer = client.messages.create(messages=talk, **asked)
    assert "699678" in answer.content[-1].text


def test_one_call_where_only_one_is_wanted(demo: tuple[Qwen3ForCausalLM, Tokenizer]) -> None:
    engine, model = scripted_engine(*demo)
    call = '<tool_call>\n{"name": "calculator", "arguments": {"expression": "1"}}\n</tool_call>\n'
    choice = {"type": "auto", "disable_parallel_tool_use": True}
    body = {"max_tokens": 200, "messages": PRODUCT, "tools": [CALCULATOR], "tool_choice": choice, "temperature": 0.0}
    with serving(engine) as calling:
        for stream in (False, True):
            model.say(engine.tokenizer.encode(call * 2))
            if stream:
                events = calling.stream(body, PATH)
                assert [event["type"] for event in events].count("content_block_start") == 1
                assert events[-2]["delta"]["stop_reason"] == "tool_use"
            else:
                reply = calling.post(body, PATH)
                assert [block["type"] for block in reply["content"]] == ["tool_use"]
                assert reply["stop_reason"] == "tool_use"


def test_stop_sequences_and_lengths(client: Any) -> None:
    asked: dict[str, Any] = {"model": "demo", "messages": QUESTION, **GREEDY}
    stopped = client.messages.create(max_tokens=200, stop_sequences=["zzz", "straw"], **asked)
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", "straw")
    assert "straw" not in stopped.content[0].text
    assert client.messages.create(max_tokens=2, **asked).stop_reason == "max_tokens"


def test_tokens_are_counted(served: Served, client: Any) -> None:
    counted = client.messages.count_tokens(model="demo", messages=QUESTION, system="Be brief.")
    prompt = served.engine.prompt([{"role": "system", "content": "Be brief."}, *QUESTION], thinking=False)
    assert counted.input_tokens == len(prompt)


def test_what_is_too_long_is_counted_too(served: Served, client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Agents ask for the number to know when to shorten; no schema is compiled for it."""
    monkeypatch.setattr(GrammarCompiler, "compile", lambda *_, **__: pytest.fail("compiled"))
    engine = served.engine
    long = [{"role": "user", "content": "word " * engine.model.config.context_length}]
    tool = {"name": "f", "strict": True, "input_schema": {"type": "object", "properties": {"a": {"type": "null"}}}}
    counted = client.messages.count_tokens(model="demo", messages=long, tools=[tool], tool_choice={"type": "any"})
    assert counted.input_tokens > engine.model.config.context_length
    assert served.post({"messages": long}, "/tokenize")["count"] == len(engine.prompt(long))
    huge = [{"role": "user", "content": "a" * 4_000_000}]
    for path in ("/tokenize", "/v1/messages/count_tokens"):
        refused = served.client.post(path, json={"model": "demo", "messages": huge})
        assert refused.status_code == 400
        assert "expected at most 4,000,000" in refused.json()["error"]["message"]


def test_what_changes_with_each_request_is_no_part_of_the_prompt(client: Any) -> None:
    def count(*blocks: dict[str, Any]) -> int:
        tokens: int = client.messages.count_tokens(model="demo", messages=QUESTION, system=list(blocks)).input_tokens
        return tokens

    brief = {"type": "text", "text": "Be brief."}
    marked = {**brief, "cache_control": {"type": "ephemeral"}}
    billing = {"type": "text", "text": "x-anthropic-billing-header: cc_version=2; cch=1f2e;"}
    assert count(brief) == count(marked) == count(billing, brief)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"max_tokens": 0}, "max_tokens: found 0"),
        ({"max_tokens": None}, "max_tokens: is missing, expected a valid integer"),
        ({"messages": None}, "messages: is missing, expected a list"),
        ({"messages": ["a"]}, 'messages[0]: found "a", expected an object'),
        ({"messages": [{"role": "user"}]}, "messages[0].content: is missing, expected a valid string or a list"),
        ({"messages": [{"content": "a"}]}, "messages[0].role: is missing, expected 'user', 'assistant' or 'system'"),
        ({"temperature": 1.5}, "temperature"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "image"),
        ({"messages": [*QUESTION, {"role": "assistant", "content": [{"type": ["text"]}]}]}, 'found ["text"]'),
        ({"messages": [{"role": "wizard", "content": "a"}]}, "role"),
        ({"messages": [{"role": "user", "content": "word " * 3000}]}, "context"),
        ({"mcp_servers": [{"url": "http://127.0.0.1"}]}, "mcp_servers"),
        ({"compaction": {"type": "summary"}}, "compaction: found some"),
        ({"thread": {"type": "continue"}}, "thread: found some, expected none: that is not done here: give the whole"),
        ({"stop_sequences": [""]}, "stop_sequences: found ''"),
        ({"output_config": {"format": {"type": "json_schema", "schema": {"type": 1}}}}, "output_config.format: found"),
        (
            {"output_format": {"type": "json_schema"}},
            'output_format.schema: is missing, expected {"type": "json_schema", "schema": {…}}',
        ),
    ],
    ids=str,
)
def test_errors_have_anthropics_form(served: Served, fields: dict[str, Any], words: str) -> None:
    response = served.client.post(PATH, json={"model": "demo", "max_tokens": 5, "messages": QUESTION, **fields})
    assert response.status_code == 400
    error = response.json()
    assert (error["type"], error["error"]["type"]) == ("error", "invalid_request_error")
    assert words in error["error"]["message"]


FUNCTION = {"name": "f", "parameters": {"type": "object"}}


@pytest.mark.parametrize(
    ("tool", "found"),
    [
        ({"type": "function", "function": FUNCTION}, 'type "function"'),
        ({"type": "function", **FUNCTION}, 'type "function"'),
        ({"function": FUNCTION}, "function"),
        (FUNCTION, "parameters"),
    ],
)
@pytest.mark.parametrize("path", [PATH, f"{PATH}/count_tokens"])
def test_tools_in_openais_form_are_refused(served: Served, path: str, tool: dict[str, Any], found: str) -> None:
    body = {"model": "demo", "messages": QUESTION, "tools": [CALCULATOR, tool]}
    response = served.client.post(path, json=body | ({"max_tokens": 1} if path == PATH else {}))
    assert response.status_code == 400
    assert response.json()["error"]["message"] == (
        f"tools[1]: found OpenAI's form ({found}), "
        'expected Anthropic\'s: {"name": …, "description": …, "input_schema": {…}}'
    )


def test_tools_of_anthropics_own_are_left_out_with_a_note(served: Served) -> None:
    tools = [{"type": "web_search_20250305", "name": "web_search"}, CALCULATOR]
    response = served.client.post(
        PATH, json={"model": "demo", "max_tokens": 1, "messages": QUESTION, "tools": tools, "betas": []}
    )
    assert response.status_code == 200
    assert response.headers["x-mlxqwen-ignored"] == "betas, tools[0]"
