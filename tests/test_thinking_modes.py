"""What a model can do about thinking is its template's word: five kinds of templates, each switch, reply and budget."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from itertools import islice
from typing import Any

import pytest

from mlxqwen import Conversation, Engine
from mlxqwen.chat.reply import Reply
from mlxqwen.chat.thinking_modes import ThinkingModes, thinking_modes
from mlxqwen.engine.events import Done
from mlxqwen.engine.text_generation import stream_generate, text_request
from mlxqwen.errors import OptionError
from mlxqwen.model.qwen3 import Qwen3ForCausalLM
from mlxqwen.sampling.params import NON_THINKING, THINKING
from mlxqwen.text.tokenizer import Tokenizer
from tests.qwen_templates import TEMPLATES
from tests.scripted_model import ScriptedModel, scripted_engine

USER = [{"role": "user", "content": "What is 2+3?"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
PAST = "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}"
CLOSED = "<think>\n\n</think>\n\n"


def template(*, past: str = "", start: str = "", end: str = "") -> str:
    """The shape of all: messages with the reasoning in them, `past`, and the header of the answer with `end`."""
    turns = "{% for m in messages %}<|im_start|>{{ m.role }}\n" + past + "{{ m.content }}<|im_end|>\n{% endfor %}"
    return start + turns + "{% if add_generation_prompt %}<|im_start|>assistant\n" + end + "{% endif %}"


KINDS = {**TEMPLATES, "plain": template()}
MODES = {
    "Qwen3": ThinkingModes(default=True, can_switch=True),
    "Instruct-2507": ThinkingModes(default=False, can_switch=False),
    "Thinking-2507": ThinkingModes(default=True, can_switch=False),
    "Coder": ThinkingModes(default=False, can_switch=False),
    "plain": ThinkingModes(default=False, can_switch=False),
}
BOTH, CLOSING, NONE = "<think>\nHm.\n</think>\n\nHi.", "Hm.\n</think>\n\nHi.", "Hi."
# How a reply that begins so is read: the model is free, it is in a thought, or its thought is closed.
FREE = {BOTH: Reply("Hm.", "Hi."), CLOSING: Reply(None, CLOSING), NONE: Reply(None, "Hi.")}
THOUGHT = {BOTH: Reply("Hm.", "Hi."), CLOSING: Reply("Hm.", "Hi."), NONE: Reply("Hi.", "")}
ANSWER = {text: Reply(None, text) for text in (BOTH, CLOSING, NONE)}


def read(kind: str, thinking: bool | None) -> dict[str, Reply]:
    if kind == "Qwen3":
        return {None: FREE, True: THOUGHT, False: ANSWER}[thinking]
    return THOUGHT if kind == "Thinking-2507" else FREE


def with_template(tokenizer: Tokenizer, source: str, **more: str) -> Tokenizer:
    config = {name: getattr(tokenizer, name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
    return Tokenizer(tokenizer._backend, config, {"default": source, **more})


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def scripted(kind: str, small: tuple[Qwen3ForCausalLM, Tokenizer]) -> tuple[Engine, ScriptedModel]:
    model, tokenizer = small
    return scripted_engine(model, with_template(tokenizer, KINDS[kind]))


@pytest.fixture
def notes(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.WARNING, logger="mlxqwen")
    return caplog


def answers(engine: Engine, model: ScriptedModel, text: str, **options: Any) -> Iterator[Done]:
    """The same reply by all ways: a stream, a batch, a conversation."""
    for answer in (
        lambda: list(engine.stream(USER, **options))[-1],
        lambda: next(engine.batch([USER], **options))[1],
        lambda: list(Conversation(engine, **options).stream(USER))[-1],
    ):
        model.say([*engine.tokenizer.encode(text), engine.tokenizer.eos_token_id or 0])
        done = answer()
        assert isinstance(done, Done)
        yield done


@pytest.mark.parametrize("tools", [False, True])
def test_the_modes_are_read_off_the_template(kind: str, scripted: tuple[Engine, ScriptedModel], tools: bool) -> None:
    assert thinking_modes(scripted[0].tokenizer, tools=tools) == MODES[kind]


@pytest.mark.parametrize("text", [BOTH, CLOSING, NONE])
@pytest.mark.parametrize("thinking", [None, True, False])
@pytest.mark.parametrize("budget", [None, 1_000])
def test_a_switch_without_effect_changes_no_reading(
    kind: str, scripted: tuple[Engine, ScriptedModel], text: str, thinking: bool | None, budget: int | None
) -> None:
    if thinking is False and budget and kind != "Thinking-2507":
        with pytest.raises(OptionError, match="found 1000 where thinking is off"):
            scripted[0].stream(USER, thinking=False, thinking_budget=budget)
        return
    expected = read(kind, thinking)[text]
    ways = answers(*scripted, text, thinking=thinking, thinking_budget=budget)
    for done in ways if budget is None else islice(ways, 1):
        assert done.reply == expected
        assert (done.usage.reasoning_tokens > 0) == (expected.reasoning is not None)
        assert not done.usage.budget_exhausted


@pytest.mark.parametrize("thinking", [True, False])
def test_a_budget_ends_a_thought_whatever_the_switch(
    kind: str, scripted: tuple[Engine, ScriptedModel], thinking: bool | None
) -> None:
    engine, model = scripted
    always = kind == "Thinking-2507"
    thinking = thinking or (False if always else None)  # False is refused where it keeps a model from thinking
    thought = engine.tokenizer.encode("one two three four five")
    opening = [] if always else engine.tokenizer.encode("<think>")
    model.say([*opening, *thought])
    *_, done = engine.stream(USER, thinking=thinking, thinking_budget=3, early_stop_text="Enough.", max_tokens=40)
    assert isinstance(done, Done)
    assert done.reply.reasoning == engine.tokenizer.decode(thought[:3]) + "\n\nEnough."
    assert done.usage.budget_exhausted


@pytest.mark.parametrize("thinking", [None, False])
def test_no_budget_at_all_keeps_every_model_from_thinking(
    kind: str, scripted: tuple[Engine, ScriptedModel], thinking: bool | None, notes: pytest.LogCaptureFixture
) -> None:
    engine, model = scripted
    model.say([*engine.tokenizer.encode("one two three four five six"), engine.tokenizer.eos_token_id or 0])
    *_, done = engine.stream(USER, thinking=thinking, thinking_budget=0)
    assert isinstance(done, Done)
    assert done.reply.reasoning is None
    assert done.reply.content
    assert "</think>" not in done.reply.content
    assert done.usage.budget_exhausted == (kind == "Thinking-2507")
    assert engine.sampling_for(USER, thinking=thinking, thinking_budget=0) == NON_THINKING
    assert notes.messages == []


@pytest.mark.parametrize("thinking", [None, True, False])
@pytest.mark.parametrize("said", ["", " /think", " /no_think"])
def test_the_profile_follows_what_the_model_can_do(
    kind: str, scripted: tuple[Engine, ScriptedModel], thinking: bool | None, said: str
) -> None:
    thinks = kind == "Thinking-2507" or (kind == "Qwen3" and thinking is not False and said != " /no_think")
    messages = [{"role": "user", "content": f"Hello{said}"}]
    expected = THINKING if thinks else NON_THINKING
    assert scripted[0].sampling_for(messages, thinking=thinking) == expected


def test_a_text_has_the_profile_of_the_models_default(kind: str, scripted: tuple[Engine, ScriptedModel]) -> None:
    engine, _ = scripted
    request = text_request(engine.model, engine.tokenizer, "Once")
    assert request.sampling == (THINKING if MODES[kind].default else NON_THINKING)


def test_a_switch_without_effect_is_told_once(
    kind: str, scripted: tuple[Engine, ScriptedModel], notes: pytest.LogCaptureFixture
) -> None:
    engine, model = scripted
    for thinking in (None, True, False):
        assert len(list(answers(engine, model, NONE, thinking=thinking))) == 3
    expected = {"Qwen3": [], "Thinking-2507": ["thinking=False (--no-thinking) changes nothing"]}
    told = expected.get(kind, ["thinking=True (--thinking) changes nothing"])
    assert [note.partition(":")[0] for note in notes.messages] == told


# --- other templates ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "default", "can_switch"),
    [
        # thinks where it is told to, as DeepSeek-V3.1 does
        (template(past=PAST, end="{% if enable_thinking %}<think>\n{% else %}" + CLOSED + "{% endif %}"), False, True),
        # closes the block always
        (template(past=PAST, end=CLOSED), False, False),
        # says it in words, as SmolLM3 does
        (template(past=PAST, start="<|im_start|>system\n{{ '/no_think' if enable_thinking is false }}"), True, True),
        # has to be given a system message
        (template(start="{% if messages[0].role != 'system' %}{{ raise_exception('no') }}{% endif %}",
                  past=PAST, end="<think>\n"), True, False),
        # takes no conversation at all
        ("<think>{{ raise_exception('no') }}", False, False),
        # prints what differs each time
        (template(past=PAST, end="{{ strftime_now('%f') }}"), False, False),
        # is given the switch, but knows no think block
        (template(start="{{ enable_thinking }}"), False, False),
    ],
)  # fmt: skip
def test_other_templates(
    small: tuple[Qwen3ForCausalLM, Tokenizer], source: str, default: bool, can_switch: bool
) -> None:
    assert thinking_modes(with_template(small[1], source)) == ThinkingModes(default=default, can_switch=can_switch)


def test_a_switch_that_begins_at_off(small: tuple[Qwen3ForCausalLM, Tokenizer]) -> None:
    source = template(past=PAST, end="{% if enable_thinking %}<think>\n{% endif %}")
    engine, model = scripted_engine(small[0], with_template(small[1], source))
    profiles = [engine.sampling_for(USER, thinking=thinking) for thinking in (None, True, False)]
    assert profiles == [NON_THINKING, THINKING, NON_THINKING]
    for thinking, expected in ((None, FREE), (True, THOUGHT), (False, FREE)):
        for done in answers(engine, model, NONE, thinking=thinking):
            assert done.reply == expected[NONE]


def test_a_template_for_tools_has_modes_of_its_own(
    small: tuple[Qwen3ForCausalLM, Tokenizer], notes: pytest.LogCaptureFixture
) -> None:
    tokenizer = with_template(small[1], KINDS["Qwen3"], tool_use=KINDS["Instruct-2507"])
    engine, model = scripted_engine(small[0], tokenizer)
    assert thinking_modes(tokenizer) == MODES["Qwen3"]
    assert thinking_modes(tokenizer, tools=True) == MODES["Instruct-2507"]
    for done in answers(engine, model, NONE, thinking=True, tools=[TOOL]):
        assert done.reply == FREE[NONE]
    assert engine.sampling_for(USER, tools=[TOOL]) == NON_THINKING
    assert len(notes.messages) == 1
    tokenizer.chat_templates["tool_use"] = KINDS["Thinking-2507"]  # templates may be changed
    assert thinking_modes(tokenizer, tools=True) == MODES["Thinking-2507"]


def test_without_a_template_nothing_speaks_against_thinking(small: tuple[Qwen3ForCausalLM, Tokenizer]) -> None:
    tokenizer = Tokenizer(small[1]._backend)
    assert thinking_modes(tokenizer) == ThinkingModes(default=True, can_switch=False)
    assert len(list(stream_generate(small[0], tokenizer, "Once", max_tokens=2))) == 2


def test_a_template_is_rendered_for_it_once(
    small: tuple[Qwen3ForCausalLM, Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    rendered: list[object] = []
    apply = Tokenizer.apply_chat_template

    def counting(self: Tokenizer, messages: Any, *args: Any, **options: Any) -> Any:
        rendered.append(messages)
        return apply(self, messages, *args, **options)

    monkeypatch.setattr(Tokenizer, "apply_chat_template", counting)
    tokenizer = with_template(small[1], template(past=PAST))
    for _ in range(3):
        thinking_modes(tokenizer)
    assert len(rendered) == 4  # without the switch, twice with it, and with it off
