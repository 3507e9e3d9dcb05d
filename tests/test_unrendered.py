"""What a chat template fails on is named by its place; what it says itself stands last, and is bounded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from mlxqwen.chat import unrendered
from mlxqwen.chat.prompts import check_messages, render_prompt
from mlxqwen.errors import MessagesError, TemplateError
from mlxqwen.text.tokenizer import Tokenizer
from tests.test_tokenizer import QWEN

# Walks through schemas, adds texts, and reads further keys of messages and a variable, as templates of other models do.
WALKING = """
{%- for tool in tools or [] %}
    {%- for name, one in tool.function.parameters.properties.items() %}{{ name + ': ' + one.type }}{% endfor %}
{%- endfor %}
{%- for message in messages %}
    {{- message.role + message.content + message.get('name', '') }}
    {%- for part in message.get('notes', []) %}{{ part.items() | list | length }}{% endfor %}
{%- endfor %}
{%- if style is defined %}{{ style + '' }}{% endif %}
"""
BROKEN = "{% for message in messages %}{{ message.content + 1 }}{% endfor %}"
USER = {"role": "user", "content": "Hi"}


def tokenizer(template: str) -> Tokenizer:
    return Tokenizer(QWEN._backend, {"eos_token": "<|im_end|>"}, {"default": template})


def tool(name: str, **schema: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": {"properties": {}, **schema}}}


def said(name: str, more: Any) -> dict[str, Any]:
    return {"role": "user", "content": "Hi", name: more}


@pytest.mark.parametrize(
    ("messages", "tools", "variables", "place", "words"),
    [
        ([USER], [tool("a"), tool("b", properties=["x"])], {}, "tools[1].function.parameters.properties: found a list",
         "'list object' has no attribute 'items'"),
        ([USER], [tool("a", properties={"x": {"type": ["a", "b"]}})], {},
         "tools[0].function.parameters.properties.x.type: found a list", "TypeError: can only concatenate str"),
        ([USER], [tool(str(n), properties={"x": {"type": "a"}}) for n in range(9)] + [tool("z", properties=5)], {},
         "tools[9].function.parameters.properties: found a number", "'int object' has no attribute 'items'"),
        ([USER, said("name", 5), USER], None, {}, "messages[1].name: found a number", "TypeError: can only concat"),
        ([USER] * 5 + [said("notes", [{}, {"a": 1}, "b", {}])] + [USER] * 5, None, {},
         "messages[5].notes[2]: found text", "'str object' has no attribute 'items'"),
        ([USER, said("notes", {"a": 1})], [tool("a")], {}, "messages[1].notes: found an object", "'str object' has no"),
        ([USER], None, {"style": 5, "other": 1}, "template_variables.style: found a number",
         "TypeError: unsupported operand"),
    ],
)  # fmt: skip
def test_the_place_is_named_before_the_templates_own_words(
    messages: Sequence[Mapping[str, Any]], tools: Any, variables: dict[str, Any], place: str, words: str
) -> None:
    with pytest.raises(MessagesError) as caught:
        render_prompt(tokenizer(WALKING), messages, tools=tools, variables=variables)
    assert caught.value.problem.startswith(f"{place}: the chat template raises an error: {words}")
    assert "leave" in caught.value.hint.lower()


def test_a_template_that_is_broken_itself_is_told_as_such() -> None:
    with pytest.raises(TemplateError) as caught:
        render_prompt(tokenizer(BROKEN), [USER, USER], tools=[tool("a")])
    assert caught.value.problem.startswith("chat template: it raises an error on any conversation: TypeError: ")
    assert "model's page" in caught.value.hint


def test_what_a_template_says_is_one_line_and_bounded() -> None:
    template = "{% for message in messages %}{{ {}[message.content * 50] + 'a' }}{% endfor %}"
    for content in ("x" * 100, "a\nb" * 100):
        with pytest.raises(TemplateError) as caught:
            render_prompt(tokenizer(template), [{"role": "user", "content": content}])
        assert len(caught.value.problem) < 300
        assert caught.value.problem.isprintable()


def test_the_search_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    messages = [USER] * 5 + [said("name", 5)] + [USER] * 5
    monkeypatch.setattr(unrendered, "_MOST_RENDERINGS", 2)
    with pytest.raises(TemplateError, match="it raises an error on this conversation: TypeError"):
        render_prompt(tokenizer(WALKING), messages)
    monkeypatch.setattr(unrendered, "_MOST_RENDERINGS", 5)
    with pytest.raises(MessagesError, match=r"^messages\[5\]: found an object: the chat template"):
        render_prompt(tokenizer(WALKING), messages)
    monkeypatch.setattr(unrendered, "_MOST_RENDERINGS", 200)
    monkeypatch.setattr(unrendered, "_MOST_SECONDS", -1)
    with pytest.raises(TemplateError, match="raises an error on this conversation"):
        render_prompt(tokenizer(WALKING), messages)
    monkeypatch.setattr(unrendered, "_MOST_SECONDS", 0.5)
    monkeypatch.setattr(unrendered, "_MOST_CHARACTERS", 50)
    with pytest.raises(TemplateError, match="it raises an error on this conversation: TypeError"):
        render_prompt(tokenizer(WALKING), messages)


def test_a_conversation_is_checked_in_the_same_words() -> None:
    odd: list[Any] = [USER, {"role": "assistant", "content": "a", "notes": ["b"]}, {"role": "system", "content": "c"}]
    with pytest.raises(MessagesError, match=r"^messages\[1\]\.notes\[0\]: found text: the chat template raises"):
        check_messages(tokenizer(WALKING), odd)
