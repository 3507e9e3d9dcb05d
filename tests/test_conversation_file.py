"""Conversations in files: what is written comes back, and what strangers wrote is refused."""

from __future__ import annotations

import dataclasses
import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxqwen import Conversation, Engine, SamplingParams
from mlxqwen.engine.conversation_file import read_conversation, write_conversation
from mlxqwen.errors import MessagesError, OptionError
from mlxqwen.model.qwen3 import Qwen3ForCausalLM
from mlxqwen.text.tokenizer import Tokenizer
from tests.test_conversation_cache import TOOLS, done_of

OLD = Path(__file__).parent / "data" / "conversations"
CALLS = [{"id": "1", "type": "function", "function": {"name": "clock", "arguments": '{"zone": "UTC"}'}}]
MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": "Sei kurz. 请简短。"},
    {"role": "user", "content": [{"type": "text", "text": "What time\x1b[2J is it?"}]},
    {"role": "assistant", "content": "", "reasoning_content": "A tool.", "tool_calls": CALLS},
    {"role": "tool", "tool_call_id": "1", "content": "12:00"},
    {"role": "assistant", "content": "Noon, <|im_end|>"},
]


@pytest.fixture(scope="module")
def engine(demo: tuple[Qwen3ForCausalLM, Tokenizer]) -> Engine:
    return Engine(*demo)


def test_what_is_saved_comes_back_and_goes_on(engine: Engine, tmp_path: Path) -> None:
    path = tmp_path / "chat.json"
    options: dict[str, Any] = {"thinking": False, "max_tokens": 5, "seed": 3, "stop": ["x!"], "tools": TOOLS}
    sampling = SamplingParams(temperature=0.5, logit_bias={7: -1.0})
    saved = Conversation(engine, messages=MESSAGES, sampling=sampling, **options)
    saved.save(path)
    loaded = Conversation.load(str(path), engine, max_kv_size=128, max_tokens=4)
    assert loaded.messages == MESSAGES
    assert {name: loaded.options.get(name) for name in options} == {**options, "max_tokens": 4}
    assert SamplingParams(**loaded.options["sampling"]) == sampling
    assert done_of(loaded.stream("So?")).tokens == done_of(saved.stream("So?")).tokens[:4]

    # Whole or not at all, and for nobody else to read.
    assert os.listdir(tmp_path) == ["chat.json"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    Conversation(engine).save(path)
    assert Conversation.load(path, engine).messages == []


def test_files_of_the_version_before_load_unchanged(engine: Engine, tmp_path: Path) -> None:
    """`Conversation.save` of the code before the scheduler wrote them, and would write the same again."""
    options: dict[str, dict[str, Any]] = {
        "empty": {},
        "thought": {"seed": 1, "max_tokens": 200},
        "tools": {"seed": 1},
        "budget": {
            "thinking_budget": 20,
            "early_stop_text": "Time is up.",
            "sampling": {"temperature": 0, "min_p": 0.1},
        },
        "options": {
            "thinking": False,
            "tools": TOOLS,
            "sampling": {  # JSON's keys are text, and as such they are ids
                **dataclasses.asdict(SamplingParams(temperature=0.5)),
                "logit_bias": {"7": -1.0},
            },
            "max_tokens": 5,
            "seed": 3,
            "stop": ["x!"],
            "stop_on_loop": True,
            "drop_oldest": True,
        },
    }
    assert sorted(path.stem for path in OLD.iterdir()) == sorted(options)
    for path in OLD.iterdir():
        loaded = Conversation.load(path, engine)
        assert loaded.options == options[path.stem]
        assert loaded.messages == json.loads(path.read_text())["messages"]
        loaded.save(tmp_path / path.name)
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()
        assert done_of(loaded.stream("So?", max_tokens=4)).usage.completion_tokens > 0
    sampling = Conversation.load(OLD / "options.json", engine).next_sampling()
    assert sampling == SamplingParams(temperature=0.5, logit_bias={7: -1.0}, seed=3)
    replayed = Conversation.load(OLD / "thought.json", engine)
    said = list(replayed.messages)
    assert done_of(replayed.retry()).reply.content == said[-1]["content"]
    replayed.undo()
    assert done_of(replayed.retry()).reply.reasoning == said[2]["reasoning_content"]


def test_options_that_were_saved_with_others_missing_still_load(engine: Engine, tmp_path: Path) -> None:
    """As of a chat in which the budget, or thinking, was switched off: what is left over is not used."""
    for options in ({"early_stop_text": "Enough."}, {"thinking": False, "thinking_budget": 5}):
        path = tmp_path / "chat.json"
        path.write_text(written(MESSAGES[:1], options))
        loaded = Conversation.load(path, engine, max_tokens=4)
        assert {name: loaded.options[name] for name in options} == options
        loaded.chat("Hello")


def test_plain_messages_are_a_conversation(engine: Engine, tmp_path: Path) -> None:
    path = tmp_path / "messages.json"
    contents: list[tuple[Any, Any]] = [(MESSAGES, None), ({"messages": MESSAGES, "tools": TOOLS}, TOOLS)]
    for content, tools in contents:
        path.write_text(json.dumps(content))
        loaded = Conversation.load(path, engine)
        assert (loaded.messages, loaded.options.get("tools")) == (MESSAGES, tools)


def test_what_is_not_for_a_file_to_say_is_not_saved(engine: Engine, tmp_path: Path) -> None:
    path = tmp_path / "chat.json"
    Conversation(engine, trust_special_tokens=True, prefill_chunk=7, on_prefill=print, thinking=True).save(path)
    assert json.loads(path.read_text())["options"] == {"thinking": True}


def test_files_that_cannot_be_written(engine: Engine, tmp_path: Path) -> None:
    conversation = Conversation(engine, messages=MESSAGES)
    (tmp_path / "folder").mkdir()
    for wrong in ("folder", "none/chat.json", "a\0b", "x" * 300):
        with pytest.raises(OptionError, match="cannot be written"):
            conversation.save(tmp_path / wrong)
    path = tmp_path / "chat.json"
    conversation.save(path)
    before = path.read_bytes()
    conversation.messages[1]["content"] = 3
    with pytest.raises(MessagesError):
        conversation.save(path)
    conversation.messages[1] = {"role": "user", "content": "a", "score": float("nan")}
    with pytest.raises(MessagesError, match="NaN is not JSON"):
        conversation.save(path)
    conversation.messages[1] = {"role": "user", "content": "a", "object": object()}
    with pytest.raises(MessagesError, match="found object"):
        conversation.save(path)
    assert path.read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["chat.json", "folder"]


def written(messages: Any = (), options: Any = None, **more: Any) -> str:
    return json.dumps({"format": "mlxqwen-conversation-1", "messages": messages, "options": options or {}, **more})


DAMAGED = {
    "empty": "",
    "no JSON": "{",
    "a number": "5",
    "a broken list": json.dumps(["Hello"]),
    "options without a format": json.dumps({"messages": MESSAGES, "options": {}}),
    "more without a format": json.dumps({"messages": MESSAGES, "model": "x"}),
    "broken tools without a format": json.dumps({"messages": MESSAGES, "tools": [{}]}),
    "a later format": json.dumps({"format": "mlxqwen-conversation-2", "messages": []}),
    "no list": written("Hello"),
    "no messages": json.dumps({"format": "mlxqwen-conversation-1"}),
    "no dicts": written(["Hello"]),
    "unknown role": written([{"role": "narrator", "content": "a"}]),
    "no content": written([{"role": "user"}]),
    "calls of a user": written([{"role": "user", "content": "a", "tool_calls": CALLS}]),
    "a broken call": written([{"role": "assistant", "tool_calls": [{"id": "1"}]}]),
    "more": written(extra=1),
    "options that are none": written(options=[1]),
    "unknown option": written(options={"temperature": 1}),
    "an option that is not for a file": written(options={"trust_special_tokens": True}),
    "a cache": written(options={"cache": "/etc/passwd"}),
    "a switch that is none": written(options={"thinking": "yes"}),
    "a negative budget": written(options={"thinking_budget": -1}),
    "broken tools": written(options={"tools": [{}]}),
    "unknown sampling": written(options={"sampling": {"heat": 1}}),
    "sampling that is none": written(options={"sampling": [1]}),
    "a bias of no token": written(options={"sampling": {"logit_bias": {"a": 1}}}),
    "a bias of a huge token": written(options={"sampling": {"logit_bias": {"9" * 5000: 1}}}),
    "a bias that is none": written(options={"sampling": {"logit_bias": 5}}),
    "no stop": written(options={"stop": [""]}),
    "tokens that are none": written(options={"max_tokens": "all"}),
    "too deep": written([{"role": "user", "content": "a", "x": json.loads("[" * 200 + "]" * 200)}]),
    "a key twice": '{"format": "mlxqwen-conversation-1", "messages": [], "messages": []}',
    "NaN": '{"format": "mlxqwen-conversation-1", "messages": [{"role": "user", "content": "a", "x": NaN}]}',
    "half a surrogate": written([{"role": "user", "content": "\ud800"}]),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_and_hostile_files_are_one_error(engine: Engine, tmp_path: Path, name: str) -> None:
    path = tmp_path / "chat.json"
    path.write_text(DAMAGED[name])
    with pytest.raises(MessagesError) as caught:
        Conversation.load(path, engine)
    assert caught.value.problem.startswith(f"{path}: ")
    assert "model's folder" not in caught.value.hint


def test_files_that_are_none(engine: Engine, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for wrong in ("none.json", ".", "pipe", "binary", "a\0b"):
        with pytest.raises(MessagesError) as caught:
            Conversation.load(tmp_path / wrong, engine)
        assert (
            caught.value.hint
            == "Give a file that Conversation.save, or /save in the chat, has written, or a list of messages."
        )
    with pytest.raises(MessagesError) as caught:
        Conversation.load(tmp_path, engine)
    assert caught.value.problem == f"{tmp_path}: a folder, expected a file"


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None, max_examples=60)
@given(contents=st.lists(st.tuples(TEXT, TEXT), max_size=4), more=JSON)
def test_any_text_comes_back(
    tmp_path_factory: pytest.TempPathFactory, contents: list[tuple[str, str]], more: Any
) -> None:
    messages = [
        message
        for asked, answered in contents
        for message in (
            {"role": "user", "content": asked, "note": more},
            {"role": "assistant", "content": answered, "reasoning_content": asked},
        )
    ]
    path = tmp_path_factory.mktemp("files") / "chat.json"
    write_conversation(path, messages, {"stop": ["a"], "thinking": None})
    assert read_conversation(path) == (messages, {"stop": ["a"]})
