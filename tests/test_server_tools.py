"""Tools in the forms of all APIs: what is no schema is named as the request names it, whatever else is left out."""

from __future__ import annotations

from typing import Any

import pytest

from mlxqwen.engine.engine import Engine
from mlxqwen.errors import MessagesError
from mlxqwen.text.tokenizer import Tokenizer
from tests.serving import CHAT, Served, ask, serving

MESSAGES, RESPONSES = "/v1/messages", "/v1/responses"
WRONG: tuple[Any, ...] = ([], "{}", 5, [{"type": "object"}])


def asked(path: str, tools: list[dict[str, Any]]) -> dict[str, Any]:
    if path == RESPONSES:
        return {"input": "Hi", "max_output_tokens": 1, "tools": tools}
    return {"messages": ask()["messages"], "max_tokens": 1, "tools": tools}


def tool(path: str, name: object, **schema: Any) -> dict[str, Any]:
    """A tool in an API's form, with `schema` if one is given."""
    if path.startswith(MESSAGES):
        return {"name": name, **({"input_schema": schema["schema"]} if schema else {})}
    function = {"name": name, **({"parameters": schema["schema"]} if schema else {})}
    return {"type": "function", **function} if path == RESPONSES else {"type": "function", "function": function}


@pytest.mark.parametrize("schema", WRONG, ids=str)
@pytest.mark.parametrize(
    ("path", "place"),
    [
        (CHAT, "tools[2].function.parameters"),
        (RESPONSES, "tools[2].parameters"),
        (MESSAGES, "tools[2].input_schema"),
        ("/v1/messages/count_tokens", "tools[2].input_schema"),
        ("/tokenize", "tools[2].function.parameters"),
    ],
)
def test_parameters_that_are_no_schema_are_named(served: Served, path: str, place: str, schema: Any) -> None:
    body = asked(path, [{"type": "web_search_20250305"}, tool(path, "a"), tool(path, "b", schema=schema)])
    response = served.client.post(path, json={"model": "demo", **body})
    error = response.json()["error"]
    assert response.status_code == 400
    assert error["message"].startswith(f"{place}: found ")
    assert "expected a JSON schema, which is an object" in error["message"]
    assert error.get("param", place) == place


@pytest.mark.parametrize(
    ("path", "place"),
    [(CHAT, "tools[1]: function: name"), (RESPONSES, "tools[1]: name"), (MESSAGES, "tools[1]: name")],
)
def test_tools_that_are_left_out_are_counted(served: Served, path: str, place: str) -> None:
    body = asked(path, [{"type": "web_search_20250305", "name": "web_search"}, tool(path, "a<b")])
    response = served.client.post(path, json={"model": "demo", **body})
    assert response.status_code == 400
    assert response.json()["error"]["message"].startswith(f"{place}: found 'a<b'")


WALKING = """
{%- for tool in tools or [] %}{% for name in tool.function.parameters.properties.keys() %}{{ name }}{% endfor %}
{%- endfor %}{% for message in messages %}{{ message.role + message.content }}{% endfor %}{{ style | default('') + '' }}
"""


def test_what_the_template_fails_on_is_named_in_the_words_of_each_api(demo: Any) -> None:
    model, tokenizer = demo
    with serving(Engine(model, Tokenizer(tokenizer._backend, {}, {"default": WALKING}))) as served:
        for path, place in (
            (CHAT, "tools[1].function.parameters.properties"),
            (RESPONSES, "tools[1].parameters.properties"),
            (MESSAGES, "tools[1].input_schema.properties"),
        ):
            tools = [{"type": "web_search"}, tool(path, "f", schema={"type": "object", "properties": []})]
            error = served.client.post(path, json={"model": "demo", **asked(path, tools)}).json()["error"]
            said = (
                f"{place}: found a list: the chat template raises an error: 'list object' has no attribute 'keys'. A "
            )
            assert error["message"].startswith(said)
            assert error.get("param", place) == place
        error = served.refused({**ask(), "chat_template_kwargs": {"style": 5}})
        assert error["param"] == "chat_template_kwargs.style"
        assert error["message"].startswith("chat_template_kwargs.style: found a number: the chat template raises")


@pytest.mark.parametrize("path", [CHAT, RESPONSES, MESSAGES])
def test_no_schema_an_empty_one_and_the_one_that_allows_all_are_taken(served: Served, path: str) -> None:
    schemas: list[dict[str, Any]] = [{}, {"schema": None}, {"schema": {}}, {"schema": True}]
    body = asked(path, [tool(path, f"f{place}", **given) for place, given in enumerate(schemas)])
    served.post(body, path)


@pytest.mark.parametrize("schema", WRONG, ids=str)
def test_in_python_it_is_the_same(demo: Any, schema: Any) -> None:
    tools = [{"name": "a"}, {"type": "function", "function": {"name": "b", "parameters": schema}}]
    with pytest.raises(MessagesError, match=r"^tools\[1\]\.function\.parameters: found .*, expected a JSON schema"):
        Engine(*demo).chat("Hi", tools=tools, max_tokens=1)
