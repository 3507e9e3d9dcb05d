"""Constrained replies come to the end of their grammar within `max_tokens`, wherever that is possible."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from mlxqwen import ChatRequest, Done, Engine
from mlxqwen.chat.structured import constraint
from mlxqwen.chat.structured.compiler import grammar_compiler
from mlxqwen.chat.structured.constraint import ReplyTokens
from mlxqwen.chat.structured.ending import closing_tokens, finishes, way_to_end
from mlxqwen.chat.structured.grammar import reply_grammar
from mlxqwen.chat.structured.response_format import read_response_format
from mlxqwen.engine.text_generation import end_token_ids
from mlxqwen.model.qwen3 import Qwen3ForCausalLM
from mlxqwen.text.tokenizer import Tokenizer
from tests.structured_schemas import SCHEMAS, record

pytest.importorskip("llguidance")

QUESTION = [{"role": "user", "content": "What is 2 + 3?"}]
WILD = {"temperature": 20, "top_p": 1, "top_k": 0}
TEXTS = record(title={"type": "string"}, tags={"type": "array", "items": {"type": "string"}}, note={"type": "string"})
TOOL = {"type": "function", "function": {"name": "note", "parameters": TEXTS, "strict": True}}


@pytest.fixture(scope="module")
def babble(babbler: Qwen3ForCausalLM, tokenizer: Tokenizer) -> Engine:
    return Engine(babbler, tokenizer)


def way_of(engine: Engine, schema: dict[str, Any]) -> tuple[int, ...]:
    """The way from the beginning of a schema's grammar to its end."""
    vocab_size, ends = engine.model.config.vocab_size, end_token_ids(engine.model, engine.tokenizer)
    answer = read_response_format(schema)
    assert answer is not None
    grammar = grammar_compiler(engine.tokenizer, vocab_size, ends).compile(reply_grammar(answer, None), "x")
    matcher = grammar.begin()
    way = way_to_end(matcher, 512, ReplyTokens(engine.tokenizer, vocab_size, ends).closing, frozenset())
    assert way is not None
    assert finishes(matcher, way)
    assert not finishes(matcher, way[:-1])
    return way


def answers(engine: Engine, asked: Sequence[dict[str, Any]], **options: Any) -> list[Done]:
    """The replies to the question with these options, all at once."""
    options = {"thinking": False, "sampling": WILD, **options}
    found = dict(engine.batch([ChatRequest(QUESTION, one) for one in asked], batch_size=len(asked), **options))
    return [found[place] for place in range(len(asked))]


QUICK = ["number", "text of a length", "enum", "record", "array of records", "anyOf", "definitions", "unicode"]


@pytest.mark.parametrize("names", [QUICK, pytest.param(list(SCHEMAS), marks=pytest.mark.slow)], ids=["some", "all"])
@pytest.mark.parametrize("more", [0, 1, 12])
def test_replies_fit_schemas_within_their_shortest_way_and_more(babble: Engine, more: int, names: list[str]) -> None:
    schemas = [SCHEMAS[name] for name in names]
    lengths = [len(way_of(babble, schema)) + more for schema in schemas]
    asked: list[dict[str, Any]] = [
        {"response_format": schema, "max_tokens": length, "seed": more}
        for schema, length in zip(schemas, lengths, strict=True)
    ]
    for schema, done, length in zip(schemas, answers(babble, asked), lengths, strict=True):
        Draft202012Validator(schema).validate(json.loads(done.reply.content))
        assert len(done.tokens) <= length


def test_a_way_that_is_too_long_leaves_the_reply_as_it_is(babble: Engine) -> None:
    length = len(way_of(babble, TEXTS)) - 1
    (cut,) = answers(babble, [{"response_format": TEXTS, "max_tokens": length, "seed": 1}])
    assert (cut.finish_reason, len(cut.tokens)) == ("length", length)
    with pytest.raises(ValueError, match=r"Unterminated|Expecting"):
        json.loads(cut.reply.content)


def test_calls_are_whole_and_say_that_they_were_cut(babble: Engine) -> None:
    named = {"type": "function", "function": {"name": "note"}}
    choices: list[Any] = [named, "required", "required"]
    asked: list[dict[str, Any]] = [
        {"tool_choice": choice, "max_tokens": most, "seed": seed}
        for seed, choice in enumerate(choices)
        for most in (60, 61, 62, 90)
    ]
    ends = babble.tokenizer.token_to_id("<|im_end|>")
    for done in answers(babble, asked, tools=[TOOL], sampling={**WILD, "logit_bias": {ends: -100}}):
        assert done.finish_reason == "length"
        assert done.reply.whole_calls == done.reply.tool_calls[: len(done.reply.whole_calls)]
        assert done.reply.whole_calls
        for call in done.reply.whole_calls:
            Draft202012Validator(TEXTS).validate(json.loads(call.arguments))


def test_where_there_is_room_nothing_is_replaced(babble: Engine) -> None:
    """A reply that ends by itself is the same with any limit that it does not come near."""
    asked: list[dict[str, Any]] = [
        {"response_format": schema, "max_tokens": most, "seed": 4}
        for schema in list(SCHEMAS.values())[:12]
        for most in (200, 2000)
    ]
    done = answers(babble, asked, sampling={"temperature": 1})
    pairs = list(zip(done[::2], done[1::2], strict=True))
    for near, far in pairs:
        if far.finish_reason == "stop" and len(far.tokens) < 100:
            assert near.tokens == far.tokens
    assert sum(far.finish_reason == "stop" and len(far.tokens) < 100 for _, far in pairs) > 6


def test_an_end_that_was_forced_is_a_cut_even_where_a_token_is_left(babble: Engine) -> None:
    """Closing may take fewer tokens than were kept for it; then the reply ends by an end token."""
    schema = record(a={"type": "string"}, b={"type": "string"})
    length = len(way_of(babble, schema))
    asked = [{"response_format": schema, "max_tokens": length + 6, "seed": seed} for seed in range(40)]
    for done in answers(babble, asked):
        content = json.loads(done.reply.content)
        Draft202012Validator(schema).validate(content)
        assert done.finish_reason in ("stop", "length")
        if len(done.tokens) == length + 6:
            assert done.finish_reason == "length"


def test_searches_are_bounded(babble: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """All replies wait for one: none is made before the last tokens, those in vain are made ever less often."""
    searches: list[int] = []

    def counted(matcher: Any, most: int, closing: Any, never: Any) -> tuple[int, ...] | None:
        searches.append(most)
        return way_to_end(matcher, most, closing, never)

    monkeypatch.setattr(constraint, "way_to_end", counted)
    schema = {"type": "string", "minLength": 3000}
    (done,) = answers(babble, [{"response_format": schema, "max_tokens": 200, "seed": 1}])
    assert done.finish_reason == "length"
    assert searches == [48, 48, 48, 48, 48, 33, 1]  # of 64, 63, 61, 57, 49, 33 and 1 tokens left
    searches.clear()
    answers(babble, [{"response_format": {"type": "string"}, "max_tokens": 200, "seed": 1}])
    assert len(searches) < 30  # a way that still is one is not looked for anew


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        (TEXTS, {"title": "", "tags": [], "note": ""}),
        (record(a={"type": "array", "items": {"type": "string"}, "minItems": 2}, b={"type": "boolean"}), None),
        (record(a={"type": "string", "minLength": 3}, b={"type": "integer"}), {"a": "000", "b": 0}),
        ({"type": "object", "additionalProperties": {"type": "string"}}, {}),
        (record(a={"enum": ["red"]}, b={"type": "object"}), {"a": "red", "b": {}}),
    ],
)
def test_what_was_not_drawn_is_empty(babble: Engine, schema: dict[str, Any], expected: object) -> None:
    found = json.loads(babble.tokenizer.decode(list(way_of(babble, schema))))
    assert found == ({"a": ["", ""], "b": True} if expected is None else expected)


TREE: dict[str, Any] = {
    "$defs": {"node": record(child={"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}, kind={"enum": ["leaf"]})},
    "$ref": "#/$defs/node",
}


@pytest.mark.parametrize("most", [40, 100, 200])
def test_what_stands_behind_a_nested_record_is_there_where_its_way_is_short(babble: Engine, most: int) -> None:
    done = answers(babble, [{"response_format": TREE, "max_tokens": most, "seed": seed} for seed in range(6)])
    for one in done:
        Draft202012Validator(TREE).validate(json.loads(one.reply.content))


def test_a_form_that_no_short_way_ends_is_cut(babble: Engine) -> None:
    asked = {"response_format": record(mail={"type": "string", "format": "email"}), "max_tokens": 30}
    for done in answers(babble, [{**asked, "seed": seed} for seed in range(4)]):
        assert done.finish_reason in ("stop", "length")


def test_closing_tokens_are_looked_up_once(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    closing = closing_tokens(tokenizer, 700)
    assert len(closing_tokens(tokenizer, 300).elsewhere) <= len(closing.elsewhere)
    monkeypatch.setattr(Tokenizer, "encode_plain", lambda *_: pytest.fail("encoded again"))
    assert closing_tokens(tokenizer, 700) is closing


def test_guesses_change_nothing(demo: tuple[Qwen3ForCausalLM, Tokenizer]) -> None:
    options: dict[str, Any] = {"response_format": TEXTS, "max_tokens": 30, "seed": 3, "thinking": False}
    plain, guessed = (Engine(*demo, speculative=one).chat(QUESTION, **options).content for one in (None, "lookup"))
    assert plain == guessed
    Draft202012Validator(TEXTS).validate(json.loads(plain))
