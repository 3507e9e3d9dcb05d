"""Calls of tools in any form, which can only end in text, and their results."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given, settings

from mlxqwen.chat.tools import call_tool, tool_schema
from mlxqwen.errors import OptionError
from tests.tool_functions import JSON_VALUES, Adder, asynchronous, call, scale


@pytest.mark.parametrize(
    "arguments", [{"n": 3}, '{"n": 3}', ' {"n" : 3.0}\n'], ids=["object", "text", "text with spaces"]
)
@pytest.mark.parametrize("wrapped", [True, False])
def test_a_call_in_any_of_its_forms(arguments: Any, wrapped: bool) -> None:
    function = {"name": "double", "arguments": arguments}
    asked = {"id": "call_1", "type": "function", "function": function} if wrapped else function
    assert call_tool({"double": Adder.double}, [tool_schema("double", Adder.double)], asked) == "6"


@pytest.mark.parametrize("arguments", [{}, "", "{}", " "])
def test_a_call_without_arguments(arguments: Any) -> None:
    assert call(lambda: "14:32", arguments) == "14:32"
    assert call_tool({"f": lambda: "14:32"}, [tool_schema("f", lambda: 0)], {"name": "f"}) == "14:32"


def test_a_tool_without_parameters_knows_no_names() -> None:
    told = call(lambda: "14:32", {"zone": "UTC"})
    assert told == 'Error: arguments: found the unknown name "zone", expected none'
    assert call(Adder.double, {"n": 1, "m": 2}) == 'Error: arguments: found the unknown name "m", expected n'


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("{", "arguments: not valid JSON"),
        ('{"n": 1, "n": 2}', "arguments: not valid JSON: the key 'n' appears twice"),
        ('{"n": NaN}', "arguments: not valid JSON: NaN"),
        ("[1]", "arguments: found a list, expected an object"),
        ("null", "arguments: found null, expected an object"),
        (None, "arguments: found null, expected an object"),
        (f'{{"n": {"[" * 100}{"]" * 100}}}', "arguments: not valid JSON: nested deeper"),
        ({"n": "\ud800"}, "arguments.n: found half of a surrogate pair"),
        ({"n": {1}}, "arguments.n: found set"),
        ("{}", "arguments: n is missing"),
    ],
)
def test_arguments_that_are_none(arguments: Any, told: str) -> None:
    assert call(Adder.double, arguments).startswith(f"Error: {told}")


@pytest.mark.parametrize("name", ["other", "__class__", "f.__call__", "eval", "print", "\x1b[2J"])
def test_only_the_callables_given_are_ever_called(name: str) -> None:
    text = call_tool({"f": scale}, [tool_schema("f", scale)], {"name": name, "arguments": {"n": 1}})
    assert text.startswith("Error: found no tool named ")
    assert text.endswith(", expected one of: f")
    assert text.isprintable()


def test_a_callable_that_was_not_shown_is_not_called() -> None:
    text = call_tool({"f": scale, "g": scale}, [tool_schema("f", scale)], {"name": "g", "arguments": {"n": 1}})
    assert text == "Error: found no tool named 'g', expected one of: f"


@pytest.mark.parametrize("asked", [{}, {"name": 3}, {"function": None}, {"function": {"arguments": {}}}, [], None])
def test_a_call_that_is_none(asked: Any) -> None:
    assert call_tool({"f": scale}, [tool_schema("f", scale)], asked) == "Error: found a call without the name of a tool"


class UnspeakableError(Exception):
    def __str__(self) -> str:
        raise RuntimeError


@pytest.mark.parametrize(
    ("cause", "text"),
    [
        (ZeroDivisionError("division by zero"), "Error: ZeroDivisionError: division by zero"),
        (ValueError("two\nlines \x1b[2J"), r"Error: ValueError: two\nlines \x1b[2J"),
        (OptionError("of our own", hint="not told"), "Error: OptionError: of our own"),
        (UnspeakableError(), "Error: UnspeakableError: no message"),
    ],
)
def test_an_exception_becomes_a_line_of_text(cause: Exception, text: str) -> None:
    def fail() -> None:
        raise cause

    assert call(fail, {}).startswith(text)
    assert call(fail, {}).isprintable()


def test_the_text_of_an_exception_is_bounded() -> None:
    def fail() -> None:
        raise ValueError("x" * 100_000)

    assert len(call(fail, {})) < 500


@pytest.mark.parametrize("cause", [KeyboardInterrupt, GeneratorExit])
def test_what_ends_the_program_passes_through(cause: type[BaseException]) -> None:
    def stop() -> None:
        raise cause

    with pytest.raises(cause):
        call(stop, {})


def test_a_tool_does_not_end_the_program() -> None:
    assert call(lambda: sys.exit("no disk"), {}) == "Error: SystemExit: no disk"
    assert call(lambda: sys.exit(3), {}) == "Error: SystemExit: 3"


GAVE = "the tool gave a result of type"


def _circle() -> list[Any]:
    circle: list[Any] = []
    circle.append(circle)
    return circle


@pytest.mark.parametrize("result", [{1, 2}, b"x", math.inf, _circle(), {(1, 2): 3}, object(), asynchronous])
def test_a_result_that_json_cannot_hold(result: Any) -> None:
    assert call(lambda: result, {}) == f"Error: {GAVE} {type(result).__name__}, which JSON cannot hold"


def test_a_coroutine_as_a_result_is_closed() -> None:
    assert call(lambda: asynchronous(1), {}) == f"Error: {GAVE} coroutine, which JSON cannot hold"


@settings(deadline=None)
@given(result=JSON_VALUES)
def test_results_come_as_json_and_text_as_it_is(result: Any) -> None:
    text = call(lambda: result, {})
    assert text == result if isinstance(result, str) else json.loads(text) == result


def test_results_keep_their_characters() -> None:
    assert call(lambda: {"städte": ["北京"]}, {}) == '{"städte": ["北京"]}'
    assert call(lambda: "half \ud800", {}) == "half \\ud800"


def test_a_long_result_is_cut_and_says_so() -> None:
    assert call(lambda: "x" * 12, {}, limit=10) == "x" * 10 + "\n[cut off: the first 10 of 12 characters]"
    assert call(lambda: "x" * 10, {}, limit=10) == "x" * 10
    assert call(lambda: list(range(100)), {}, limit=5) == "[0, 1\n[cut off: the first 5 of 390 characters]"


@pytest.mark.parametrize("limit", [0, -1, True, 1.5, None])
def test_a_limit_that_is_none(limit: Any) -> None:
    with pytest.raises(OptionError, match="limit"):
        call(scale, {"n": 1}, limit=limit)


def test_a_chat_without_tools_loads_no_library_for_them() -> None:
    code = (
        "import sys, mlxqwen, mlxqwen.chat.tools, mlxqwen.chat.prompts; from tests.test_tokenizer import QWEN;"
        "assert mlxqwen.chat.prompts.render_prompt(QWEN, [{'role': 'user', 'content': 'Hello'}]);"
        "sys.exit(not {'pydantic', 'pydantic_core', 'jsonschema', 'referencing'}.isdisjoint(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
