"""OpenAI's responses, by the official client: items, events in their order, and conversations that are kept."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from mlxqwen.engine.engine import Engine
from mlxqwen.model.qwen3 import Qwen3ForCausalLM
from mlxqwen.server.responses_request import messages_of
from mlxqwen.server.responses_store import ResponseStore, StoredResponse
from mlxqwen.text.tokenizer import Tokenizer
from tests.asgi_calls import Call, events_of, until
from tests.serving import Served, serving

openai = pytest.importorskip("openai")

PATH = "/v1/responses"
QUESTION = "How many r's in strawberry?"
CALCULATOR = {
    "type": "function",
    "name": "calculator",
    "description": "Evaluate an arithmetic expression.",
    "parameters": {
        "type": "object",
        "properties": {"expression": {"type": "string", "description": "The expression."}},
        "required": ["expression"],
    },
}


@pytest.fixture
def client(served: Served) -> Any:
    return openai.OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none", http_client=served.client, max_retries=0)


def test_a_response(served: Served, client: Any) -> None:
    response = client.responses.create(model="demo", input=QUESTION, temperature=0.0)
    expected = served.engine.chat([{"role": "user", "content": QUESTION}], sampling={"temperature": 0.0})
    thought, said = response.output
    assert (thought.type, thought.content[0].text) == ("reasoning", expected.reasoning)
    assert (said.type, said.status, response.output_text) == ("message", "completed", expected.content)
    assert response.status == "completed"
    usage = response.usage
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens
    assert 0 < usage.output_tokens_details.reasoning_tokens < usage.output_tokens


def test_events_come_in_their_order_and_add_up(served: Served, client: Any) -> None:
    whole = client.responses.create(model="demo", input=QUESTION, temperature=0.0)
    events = list(client.responses.create(model="demo", input=QUESTION, temperature=0.0, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    merged = [kind for place, kind in enumerate(kinds) if place == 0 or kind != kinds[place - 1]]
    assert merged == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.reasoning_text.delta",
        "response.reasoning_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    said = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert said == whole.output_text == events[-1].response.output_text
    added = [event.item.id for event in events if event.type == "response.output_item.added"]
    assert added == [item.id for item in events[-1].response.output]
    assert served.client.get(f"{PATH}/{events[-1].response.id}").json()["status"] == "completed"


@pytest.mark.parametrize(
    ("fields", "headers", "name"),
    [
        ({}, {}, "response.reasoning"),
        ({}, {"x-stainless-lang": "js"}, "response.reasoning_text"),
        ({"reasoning": {"effort": "low"}}, {}, "response.reasoning_text"),
    ],
)
def test_each_client_gets_the_thought_under_the_name_that_it_knows(
    served: Served, fields: dict[str, Any], headers: dict[str, str], name: str
) -> None:
    body = {"model": "demo", "input": QUESTION, "temperature": 0.0, "stream": True, **fields}
    events = events_of(served.client.post(PATH, json=body, headers=headers).content)
    thought = next(item for item in events[-1]["response"]["output"] if item["type"] == "reasoning")
    kinds = {event["type"] for event in events if event["type"].startswith("response.reasoning")}
    assert kinds == {f"{name}.delta", f"{name}.done"}
    told = "".join(event["delta"] for event in events if event["type"] == f"{name}.delta")
    assert told == thought["content"][0]["text"] != ""


def test_thought_may_be_told_as_its_summary(client: Any) -> None:
    asked: dict[str, Any] = {"model": "demo", "input": QUESTION, "temperature": 0.0}
    plain = client.responses.create(**asked).output[0].content[0].text
    summarized = client.responses.create(**asked, reasoning={"summary": "auto"})
    assert (summarized.output[0].summary[0].text, summarized.output[0].content) == (plain, [])
    events = list(client.responses.create(**asked, reasoning={"summary": "auto"}, stream=True))
    pieces = [event.delta for event in events if event.type == "response.reasoning_summary_text.delta"]
    assert "".join(pieces) == plain
    kinds = [event.type for event in events]
    assert kinds.index("response.reasoning_summary_part.added") < kinds.index("response.reasoning_summary_text.delta")
    assert kinds.index("response.reasoning_summary_text.done") < kinds.index("response.reasoning_summary_part.done")


def test_calls_and_their_results(client: Any) -> None:
    asked: dict[str, Any] = {"model": "demo", "tools": [CALCULATOR], "temperature": 0.0}
    first = client.responses.create(input="What is 1234 * 567?", **asked)
    call = first.output[-1]
    assert (call.type, call.name, call.arguments) == ("function_call", "calculator", '{"expression": "1234 * 567"}')
    events = list(client.responses.create(input="What is 1234 * 567?", stream=True, **asked))
    pieces = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
    assert "".join(pieces) == call.arguments
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "699678"}
    for following in (
        {"previous_response_id": first.id, "input": [result]},
        {"input": [{"role": "user", "content": "What is 1234 * 567?"}, *first.output, result]},
    ):
        answer = client.responses.create(**following, **asked)
        assert "699678" in answer.output_text


def test_a_response_is_kept_followed_shown_and_forgotten(served: Served, client: Any) -> None:
    first = client.responses.create(
        model="demo", input="My name is Ann.", instructions="Be brief.", max_output_tokens=30
    )
    second = client.responses.create(model="demo", input=QUESTION, previous_response_id=first.id, max_output_tokens=2)
    answer = "".join(part.text for item in first.output if item.type == "message" for part in item.content)
    talk = [{"role": "user", "content": "My name is Ann."}, {"role": "assistant", "content": answer}]
    prompt = served.engine.prompt([*talk, {"role": "user", "content": QUESTION}])  # no instructions, no old thought
    assert second.usage.input_tokens == len(prompt)
    assert (second.status, second.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert client.responses.retrieve(first.id).output == first.output
    items = client.responses.input_items.list(first.id)
    assert items.data[0].content[0].text == "My name is Ann."
    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(first.id)
    with pytest.raises(openai.BadRequestError, match="previous_response_id"):
        client.responses.create(model="demo", input="a", previous_response_id=first.id)
    unkept = client.responses.create(model="demo", input="Hi", store=False, max_output_tokens=1)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(unkept.id)
    with pytest.raises(openai.BadRequestError, match="on its way"):
        client.responses.cancel(second.id)


def test_one_that_is_on_its_way_is_cancelled(babbler: Qwen3ForCausalLM, tokenizer: Tokenizer) -> None:
    async def work() -> None:
        with serving(Engine(babbler, tokenizer), max_kv_size=256) as served:  # not over before it is cancelled
            end = tokenizer.token_to_id("<|im_end|>")
            body = {"model": "demo", "input": "a", "stream": True, "logit_bias": {str(end): -100}}
            call = Call(served.app, PATH, body)
            await until(lambda: len(call.sent) > 3)
            (name,) = served.service.responses.running
            cancelled = await Call(served.app, f"{PATH}/{name}/cancel").end()
            assert cancelled.json["status"] == "cancelled"
            await call.end()
            assert call.events[-1]["response"]["status"] == "cancelled"
            assert not served.service.responses.running
            assert served.service.load.replies == 0

    asyncio.run(work())


def test_items_of_clients(served: Served) -> None:
    items = [
        {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "Be brief."}]},
        {"role": "user", "content": "a"},
        {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "b"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "c", "annotations": []}]},
        {"type": "web_search_call", "id": "ws_1"},
        {"role": "user", "content": "d"},
    ]
    tools = [{"type": "web_search"}, {"type": "custom", "name": "x"}, CALCULATOR]
    response = served.client.post(
        PATH, json={"model": "demo", "input": items, "tools": tools, "max_output_tokens": 1, "verbosity": 1}
    )
    assert response.status_code == 200, response.text
    assert response.headers["x-mlxqwen-ignored"] == "verbosity, input[4], tools[0], tools[1]"


def test_what_a_coding_agent_sends(served: Served) -> None:
    shell = {
        "type": "function",
        "name": "shell",
        "strict": False,
        "parameters": {"type": "object", "properties": {"command": {"type": "array", "items": {"type": "string"}}}},
    }
    call = {"type": "function_call", "call_id": "c1", "name": "shell", "arguments": '{"command": ["ls"]}'}
    body = {
        "model": "demo",
        "instructions": "Help.",
        "input": [
            {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "Rules."}]},
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "List files."}]},
            {"type": "reasoning", "summary": [], "encrypted_content": None},
            call,
            {"type": "function_call_output", "call_id": "c1", "output": [{"type": "input_text", "text": "a.txt"}]},
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Thanks."}]},
        ],
        "tools": [
            shell,
            {"type": "custom", "name": "apply_patch", "format": {"type": "grammar"}},
            {"type": "web_search"},
        ],
        "tool_choice": "auto",
        "parallel_tool_calls": False,
        "reasoning": {"effort": "medium", "summary": "auto"},
        "include": ["reasoning.encrypted_content"],
        "prompt_cache_key": "k",
        "text": {"verbosity": "low"},
        "store": False,
        "stream": True,
        "max_output_tokens": 5,
    }
    response = served.client.post(PATH, json=body)
    assert response.status_code == 200, response.text
    assert response.headers["x-mlxqwen-ignored"] == "tools[1], tools[2]"
    assert '"type":"response.incomplete"' in response.text


def test_a_long_talk_is_cut_where_that_is_wanted(served: Served) -> None:
    old = [{"role": role, "content": "word " * 60} for role in ("user", "assistant")] * 6
    items = [*old, {"role": "user", "content": QUESTION}]
    assert served.refused({"input": items}, path=PATH)["code"] == "context_length_exceeded"
    assert served.post({"input": items, "truncation": "auto", "max_output_tokens": 1}, PATH)["truncation"] == "auto"


def test_calls_of_custom_tools_in_a_talk_are_calls_with_one_text() -> None:
    call = {"type": "custom_tool_call", "call_id": "1", "name": "apply_patch", "input": 'a "patch"'}
    output = {"type": "custom_tool_call_output", "call_id": "1", "output": "done"}
    notes: list[str] = []
    messages = messages_of([{"role": "user", "content": "Patch it."}, call, output], notes)
    (called,) = messages[1]["tool_calls"]
    assert called["function"] == {"name": "apply_patch", "arguments": {"input": 'a "patch"'}}
    assert messages[2] == {"role": "tool", "tool_call_id": "1", "content": "done"}
    assert notes == []


def test_a_talk_that_may_be_compacted_is_answered_whole_with_a_note(served: Served) -> None:
    body = {"model": "demo", "input": "Hi", "context_management": [{"type": "compaction", "compact_threshold": 1000}]}
    response = served.client.post(PATH, json={**body, "max_output_tokens": 1})
    assert response.status_code == 200
    assert response.headers["x-mlxqwen-ignored"] == "context_management"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"conversation": "conv_1"}, "conversation"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt: found one"),
        ({"moderation": {"model": "m"}}, "moderation: found one, expected none: it is not done here"),
        ({"context_management": "compaction"}, "context_management: found"),
        ({"input": None}, "input: is missing"),
        ({"input": []}, "input: is missing"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input_image"),
        ({"input": [{"role": "user", "content": 5}]}, "expected text or a list"),
        ({"max_output_tokens": 0}, "max_output_tokens: found 0"),
        ({"truncation": "some"}, "truncation"),
    ],
    ids=str,
)
def test_what_is_not_done_or_wrong(served: Served, fields: dict[str, Any], words: str) -> None:
    assert words in served.refused({"input": "a", **fields}, path=PATH)["message"]


def test_the_store_is_asked_by_the_thread_of_the_loop_alone(
    served: Served, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = client.responses.create(model="demo", input="Hi", max_output_tokens=1)
    find, asked = ResponseStore.find, []

    def watched(self: ResponseStore, response_id: str) -> StoredResponse | None:
        asyncio.get_running_loop()  # raises where none runs
        asked.append(response_id)
        return find(self, response_id)

    monkeypatch.setattr(ResponseStore, "find", watched)
    client.responses.create(model="demo", input="Hi", previous_response_id=first.id, max_output_tokens=1)
    assert asked == [first.id]


def test_the_store_is_bounded() -> None:
    store = ResponseStore(most=3, most_bytes=1000)
    for number in range(5):
        store.keep({"id": str(number)}, [], [])
        store.find("2")
    assert [number for number in range(5) if store.find(str(number))] == [2, 3, 4]
    store.keep({"id": "large", "text": "a" * 800}, [], [])
    store.keep({"id": "larger", "text": "a" * 1500}, [], [])
    assert store.find("large") is None
    assert store.find("larger") is None
    assert store.drop("2") is False
