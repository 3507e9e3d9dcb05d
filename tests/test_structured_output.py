"""Replies kept to a format: every one parses and fits, as jsonschema judges it, at any temperature."""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, Literal

import pytest
from jsonschema import Draft202012Validator, FormatChecker
from pydantic import BaseModel, Field

from mlxqwen import ChatRequest, Conversation, Done, Engine, generate
from mlxqwen.errors import OptionError
from mlxqwen.model.qwen3 import Qwen3ForCausalLM
from mlxqwen.text.tokenizer import Tokenizer
from tests.structured_schemas import ENDLESS, SCHEMAS, record

pytest.importorskip("llguidance")

QUESTION = [{"role": "user", "content": "Describe a cat."}]


@pytest.fixture(scope="module")
def engine(demo: tuple[Qwen3ForCausalLM, Tokenizer]) -> Engine:
    return Engine(*demo)


@pytest.fixture(scope="module")
def babble(babbler: Qwen3ForCausalLM, tokenizer: Tokenizer) -> Engine:
    return Engine(babbler, tokenizer)


def last(engine: Engine, **options: Any) -> Done:
    *_, done = engine.stream(QUESTION, **options)
    assert isinstance(done, Done)
    return done


def check(schema: dict[str, Any], content: str) -> None:
    """Fail for a text that is no JSON, or that does not fit."""
    Draft202012Validator(schema, format_checker=FormatChecker()).validate(json.loads(content))


@pytest.mark.parametrize("temperature", [0, 20])
def test_replies_of_a_random_model_fit_every_schema(babble: Engine, temperature: float) -> None:
    asked = [ChatRequest(QUESTION, {"response_format": schema}) for schema in SCHEMAS.values()]
    sampling = {"temperature": temperature, "top_p": 1, "top_k": 0}
    ended = 0
    for index, done in babble.batch(
        asked, batch_size=40, max_tokens=64, thinking=False, seed=int(temperature), sampling=sampling
    ):
        if done.finish_reason == "stop":
            check(asked[index].options["response_format"], done.reply.content)
            ended += 1
    assert ended > len(asked) * 0.8


@pytest.mark.parametrize(
    "names",
    [
        ["integer", "unicode", "record", "array of records", "anyOf", "allOf", "definitions", "pattern"],
        pytest.param(list(SCHEMAS), marks=pytest.mark.slow),
    ],
    ids=["some", "all"],
)
def test_replies_of_the_demo_fit_behind_a_free_thought(engine: Engine, names: list[str]) -> None:
    asked = [ChatRequest(QUESTION, {"response_format": SCHEMAS[name], "seed": 5}) for name in names]
    cut_off = set()
    for index, done in engine.batch(asked, batch_size=40, max_tokens=200):
        if done.finish_reason == "stop":
            check(SCHEMAS[names[index]], done.reply.content)
        else:
            cut_off.add(names[index])
        assert done.reply.reasoning
    assert cut_off <= ENDLESS
    assert len(cut_off) <= 0.2 * len(names)


class Cat(BaseModel):
    """What is asked for."""

    name: Annotated[str, Field(max_length=6)]
    lives: Annotated[int, Field(ge=0, le=9)]
    colors: Annotated[list[Literal["black", "white"]], Field(max_length=2)]


def test_a_model_in_every_form(engine: Engine) -> None:
    schema = Cat.model_json_schema()
    forms = [
        Cat,
        schema,
        {"type": "json_schema", "json_schema": {"name": "cat", "schema": schema, "strict": True}},
        {"type": "json_schema", "name": "cat", "schema": schema},
        {"json": schema},
        {"json": json.dumps(schema)},
    ]
    asked = [ChatRequest(QUESTION, {"response_format": form}) for form in forms]
    contents = {done.reply.content for _, done in engine.batch(asked, seed=1, thinking=False, max_tokens=100)}
    assert len(contents) == 1
    assert Cat.model_validate_json(*contents)


def test_other_forms(engine: Engine) -> None:
    for form in ({"type": "json_object"}, {"json_object": True}):
        done = last(engine, response_format=form, seed=2, max_tokens=40)
        assert done.finish_reason == "length" or isinstance(json.loads(done.reply.content), dict)
    choices = ["ja", "nein", 'vielleicht "so"']
    assert last(engine, response_format={"choice": choices}, seed=2).reply.content in choices
    content = last(engine, response_format={"regex": r"[a-f]{3}/\d{2,4}"}, seed=2).reply.content
    assert re.fullmatch(r"[a-f]{3}/[0-9]{2,4}", content)
    grammar = 'start: sum\nsum: NUMBER (" + " NUMBER){1,2}\nNUMBER: /[1-9][0-9]?/'
    content = last(engine, response_format={"grammar": grammar}, seed=2).reply.content
    assert re.fullmatch(r"[1-9][0-9]?( \+ [1-9][0-9]?){1,2}", content)
    free = last(engine, response_format={"type": "text"}, seed=2, max_tokens=20)
    assert free.tokens == last(engine, seed=2, max_tokens=20).tokens


def test_white_space_is_bounded(babble: Engine) -> None:
    """Where blanks are all that a model wants to say, JSON ends all the same."""
    blanks = [n for n in range(babble.tokenizer.vocab_size) if not babble.tokenizer.token_bytes(n).strip()]
    schema = record(a={"type": "boolean"}, b=record(c={"type": "null"}))
    sampling = {"temperature": 0, "logit_bias": dict.fromkeys(blanks, 100.0)}
    done = last(babble, response_format=schema, thinking=False, sampling=sampling, max_tokens=60)
    assert done.finish_reason == "stop"
    check(schema, done.reply.content)


@pytest.mark.parametrize(("thinking", "budget"), [(True, None), (True, 3), (None, 0), (False, None)])
def test_nothing_stands_before_the_answer(engine: Engine, thinking: bool | None, budget: int | None) -> None:
    form = SCHEMAS["record"]
    done = last(engine, response_format=form, thinking=thinking, thinking_budget=budget, seed=3)
    behind = engine.tokenizer.decode(done.tokens).rpartition("</think>")[2]
    assert re.match(r"\n{0,2}\{", behind)
    assert done.usage.budget_exhausted == (budget == 3)
    check(form, done.reply.content)


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (5, "found a number, expected a JSON Schema"),
        ({"type": "xml"}, "found type 'xml'"),
        ({"type": "json_schema"}, 'found type "json_schema" without a schema'),
        ({"type": "json_schema", "json_schema": {"schema": []}}, "found a list, expected a JSON schema"),
        ({"choice": []}, "choice: found a list of 0"),
        ({"choice": ["a", 1]}, r"choice\[1\]: found a number"),
        ({"regex": "(a"}, "invalid regex"),
        ({"regex": 3}, "regex: found a number, expected text"),
        ({"grammar": "start: nothing"}, "nothing"),
        ({"grammar": "start: <|im_end|>"}, r"found <\|im_end\|>, the name of a token"),
        ({"grammar": 'start: "a" <[5-9]>'}, r"found <\[5-9\]>, the name of a token"),
        ({"json": "{"}, "json: not valid JSON"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"not": {}}, '"not"'),
        ({"enum": []}, "Unsatisfiable"),
        ({"$ref": "#"}, "no text fits it"),
        ({"$ref": "https://example.com/schema.json"}, "example.com"),
    ],
)
def test_what_cannot_be_compiled_is_an_error_at_once(engine: Engine, form: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message) as caught:
        engine.stream(QUESTION, response_format=form)
    assert "response_format" in caught.value.problem


def test_text_without_a_conversation(engine: Engine) -> None:
    text = generate(engine.model, engine.tokenizer, "JSON: ", response_format=SCHEMAS["record"], max_tokens=120, seed=1)
    check(SCHEMAS["record"], text.rpartition("</think>")[2])


def test_a_conversation_keeps_its_form(engine: Engine) -> None:
    conversation = Conversation(engine, response_format=Cat, thinking=False)
    for question, seed in (("Describe a cat.", 1), ("Another one.", 2)):
        assert Cat.model_validate_json(conversation.chat(question, seed=seed, max_tokens=100).content)
    free = conversation.chat("Hi", response_format=None, max_tokens=5, seed=3).content
    assert not free.startswith("{")
