"""`/v1/responses/compact`: what stays of a talk as it is, what becomes a summary, and how the talk goes on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from mlxqwen.model.qwen3 import Qwen3ForCausalLM
from mlxqwen.server.summaries import encoded_summary, read_summary
from mlxqwen.text.tokenizer import Tokenizer
from tests.asgi_calls import events_of
from tests.scripted_model import ScriptedModel, scripted_engine
from tests.serving import Served, serving

PATH = "/v1/responses/compact"
SUMMARY = "They launch on Tuesday. 礼拜二"
TALK: list[dict[str, Any]] = [
    {"role": "user", "content": "We agreed to launch on Tuesday."},
    {"role": "assistant", "content": [{"type": "output_text", "text": "Understood."}]},
    {"type": "function_call", "call_id": "call_1", "name": "note", "arguments": '{"text": "Tuesday"}'},
    {"type": "function_call_output", "call_id": "call_1", "output": "noted"},
    {"role": "user", "content": [{"type": "input_text", "text": "Tell "}, {"type": "input_text", "text": "support."}]},
]


@pytest.fixture(scope="module")
def speaking(demo: tuple[Qwen3ForCausalLM, Tokenizer]) -> Iterator[tuple[Served, ScriptedModel]]:
    engine, model = scripted_engine(*demo)
    with serving(engine) as made:
        yield made, model


def says(speaking: tuple[Served, ScriptedModel], text: str) -> Served:
    """The server, whose model says this next."""
    served, model = speaking
    end = served.engine.tokenizer.token_to_id("<|im_end|>")
    assert end is not None
    model.say([*served.engine.tokenizer.encode(text), end])
    return served


def test_users_messages_stay_and_the_rest_is_a_summary(speaking: tuple[Served, ScriptedModel]) -> None:
    served = says(speaking, SUMMARY)
    compacted = served.post({"input": TALK}, PATH)
    assert set(compacted) == {"id", "object", "created_at", "output", "usage"}
    assert compacted["object"] == "response.compaction"
    *users, compaction = compacted["output"]
    assert [item["content"][0]["text"] for item in users] == ["We agreed to launch on Tuesday.", "Tell support."]
    assert {(item["type"], item["role"]) for item in users} == {("message", "user")}
    assert compaction["type"] == "compaction"
    assert read_summary(compaction["encrypted_content"], "input[0]") == SUMMARY
    assert len({item["id"] for item in compacted["output"]}) == 3
    usage = compacted["usage"]
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
    assert usage["output_tokens_details"]["reasoning_tokens"] == 0


def test_a_shorter_talk_goes_on_as_if_the_summary_had_been_said(speaking: tuple[Served, ScriptedModel]) -> None:
    served = says(speaking, SUMMARY)
    shorter = served.post({"input": TALK}, PATH)["output"]
    question = {"role": "user", "content": "When?"}
    said = {"role": "assistant", "content": f"Summary of the conversation so far:\n\n{SUMMARY}"}
    asked = served.post({"input": [*shorter, question], "max_output_tokens": 1}, "/v1/responses")
    spelled = served.post({"input": [*shorter[:-1], said, question], "max_output_tokens": 1}, "/v1/responses")
    assert asked["usage"]["input_tokens"] == spelled["usage"]["input_tokens"]
    assert spelled["usage"]["input_tokens_details"]["cached_tokens"] // 16 == (asked["usage"]["input_tokens"] - 1) // 16
    again = says(speaking, "Tuesday it is.").post({"input": [*shorter, question]}, PATH)["output"]
    assert [item["type"] for item in again] == ["message", "message", "message", "compaction"]


def test_a_response_that_is_kept_is_followed(speaking: tuple[Served, ScriptedModel]) -> None:
    first = says(speaking, "Noted.").post(
        {"input": "Tuesday!", "chat_template_kwargs": {"enable_thinking": False}}, "/v1/responses"
    )
    compacted = says(speaking, SUMMARY).post({"previous_response_id": first["id"]}, PATH)
    assert compacted["output"][0]["content"][0]["text"] == "Tuesday!"
    assert len(compacted["output"]) == 2


def test_a_stream_is_one_event(speaking: tuple[Served, ScriptedModel]) -> None:
    response = says(speaking, SUMMARY).client.post(PATH, json={"model": "demo", "input": "Hi", "stream": True})
    (told,) = events_of(response.content)
    assert told["object"] == "response.compaction"


def test_a_model_that_says_nothing_is_an_error(speaking: tuple[Served, ScriptedModel]) -> None:
    error = says(speaking, " \n").refused({"input": "Hi"}, 500, PATH)
    assert error["code"] == "empty_summary"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "input"),
        ({"input": []}, "input"),
        ({"input": [{"type": "input_image"}]}, "input"),
        ({"input": "Hi", "previous_response_id": "resp_none"}, "previous_response_id"),
        ({"input": "Hi", "model": None}, "model"),
    ],
)
def test_what_cannot_be_compacted(speaking: tuple[Served, ScriptedModel], fields: dict[str, Any], param: str) -> None:
    assert speaking[0].refused(fields, 400, PATH)["param"] == param


@pytest.mark.parametrize(
    "content", [None, 3, "", "gAAAAABpM0Yj", encoded_summary("x")[:-1], encoded_summary("x") + "é"]
)
def test_what_others_have_encrypted_is_refused(speaking: tuple[Served, ScriptedModel], content: Any) -> None:
    items = [{"role": "user", "content": "Hi"}, {"type": "compaction", "encrypted_content": content}]
    error = speaking[0].refused({"input": items}, 400, "/v1/responses")
    assert error["param"] == "input[1]"
    assert "encrypted_content: found" in error["message"]
    assert len(json.dumps(error)) < 500
