"""Completions: texts and ids that are gone on with, as the engine does."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import pytest

import mlxqwen
from mlxqwen.engine.engine import Engine
from mlxqwen.model.qwen3 import Qwen3ForCausalLM
from mlxqwen.text.tokenizer import Tokenizer
from tests.serving import Served, serving

PATH = "/v1/completions"


@pytest.fixture(scope="module")
def served(babbler: Qwen3ForCausalLM, tokenizer: Tokenizer) -> Iterator[Served]:
    with serving(Engine(babbler, tokenizer)) as made:
        yield made


def texts(reply: Any) -> list[str]:
    return [choice["text"] for choice in reply["choices"]]


def streamed(events: list[Any], count: int = 1) -> list[str]:
    pieces = [""] * count
    for event in events:
        for choice in event["choices"]:
            pieces[choice["index"]] += choice["text"]
    return pieces


def test_a_text_is_gone_on_with(served: Served) -> None:
    body = {"prompt": "strawberry", "seed": 4, "max_tokens": 20, "temperature": 1.0}
    reply = served.post(body, PATH)
    sampling = {"temperature": 1.0, "seed": 4}
    expected = mlxqwen.generate(
        served.engine.model, served.engine.tokenizer, "strawberry", max_tokens=20, sampling=sampling
    )
    assert (reply["object"], texts(reply)) == ("text_completion", [expected])
    assert reply["choices"][0]["finish_reason"] == "length"
    assert reply["usage"]["completion_tokens"] == 20
    assert streamed(served.stream(body, PATH)) == [expected]
    ids = served.engine.tokenizer.encode("strawberry")
    assert texts(served.post({**body, "prompt": ids}, PATH)) == [expected]
    echoed = {**body, "echo": True}
    assert texts(served.post(echoed, PATH)) == streamed(served.stream(echoed, PATH)) == ["strawberry" + expected]
    assert served.post({**body, "max_tokens": None}, PATH)["usage"]["completion_tokens"] == 16


def test_several_prompts_with_several_choices(served: Served) -> None:
    body = {"seed": 4, "max_tokens": 6, "temperature": 1.0}
    together = {**body, "prompt": ["straw", "berry"], "n": 2}
    reply = served.post(together, PATH)
    alone = [
        texts(served.post({**body, "prompt": prompt, "seed": seed}, PATH))[0]
        for prompt, seed in (("straw", 4), ("straw", 5), ("berry", 6), ("berry", 7))
    ]
    assert texts(reply) == streamed(served.stream(together, PATH), 4) == alone
    lengths = [len(served.engine.tokenizer.encode(prompt)) for prompt in ("straw", "berry")]
    assert reply["usage"]["prompt_tokens"] == sum(lengths)
    assert reply["usage"]["completion_tokens"] == 24


def test_logprobs_in_the_old_form(served: Served) -> None:
    body = {"prompt": "straw", "seed": 4, "max_tokens": 5, "logprobs": 2}
    reply = served.post(body, PATH)
    told = reply["choices"][0]["logprobs"]
    assert len(told["tokens"]) == len(told["token_logprobs"]) == len(told["top_logprobs"]) == 5
    assert told["text_offset"][0] == 0
    assert all(len(likeliest) <= 2 for likeliest in told["top_logprobs"])
    events = served.stream(body, PATH)
    parts = [event["choices"][0]["logprobs"] for event in events if event["choices"][0]["logprobs"]]
    assert [token for part in parts for token in part["tokens"]] == told["tokens"]


def spelled(served: Served, ids: list[int]) -> list[bytes]:
    return [served.engine.tokenizer.token_bytes(one) for one in ids]


def test_logprobs_of_a_prompt_that_is_echoed(served: Served) -> None:
    text = "strawberry, wörld 🍓 and straw"
    ids = served.engine.tokenizer.encode(text)
    logits = served.engine.model(mx.array([ids]))[0]
    expected = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    body = {"prompt": text, "seed": 4, "max_tokens": 5, "logprobs": 2, "echo": True}
    plain = served.post({**body, "echo": False}, PATH)["choices"][0]
    for given in ({}, {"prompt": ids}, {}):  # what is known makes no difference
        reply = served.post({**body, **given}, PATH)
        choice = reply["choices"][0]
        told = choice["logprobs"]
        assert choice["text"] == text + plain["text"]
        assert [len(values) for values in told.values()] == [len(ids) + 5] * 4
        assert told["tokens"][len(ids) :] == plain["logprobs"]["tokens"]
        assert told["token_logprobs"][len(ids) :] == pytest.approx(plain["logprobs"]["token_logprobs"], abs=1e-5)
        assert (told["token_logprobs"][0], told["top_logprobs"][0]) == (None, None)
        own = [expected[place, token].item() for place, token in enumerate(ids[1:])]
        assert told["token_logprobs"][1 : len(ids)] == pytest.approx(own, abs=2e-5)
        assert all(1 <= len(likeliest) <= 2 for likeliest in told["top_logprobs"][1:])
        assert told["text_offset"][len(ids)] == len(text)
        for place, offset in enumerate(told["text_offset"][: len(ids)]):
            before = b"".join(spelled(served, ids[:place])).decode("utf-8", "replace")
            assert offset == len(before)
        assert reply["usage"]["completion_tokens"] == 5
    parts = [event["choices"][0] for event in served.stream(body, PATH)]
    assert "".join(part["text"] for part in parts) == choice["text"]
    assert [token for part in parts if part["logprobs"] for token in part["logprobs"]["tokens"]] == told["tokens"]


def test_every_choice_has_the_logprobs_of_its_prompt(served: Served) -> None:
    prompts = ["straw", "berry pie"]
    body = {"prompt": prompts, "n": 2, "seed": 4, "max_tokens": 3, "logprobs": 0, "echo": True}
    tokens = [choice["logprobs"]["tokens"] for choice in served.post(body, PATH)["choices"]]
    assert ["".join(one[:-3]) for one in tokens] == ["straw", "straw", "berry pie", "berry pie"]
    pieces: list[list[str]] = [[], [], [], []]
    for event in served.stream(body, PATH):
        for choice in event["choices"]:
            pieces[choice["index"]] += (choice["logprobs"] or {"tokens": []})["tokens"]
    assert pieces == tokens


def test_a_text_is_scored_without_going_on(served: Served) -> None:
    body = {"prompt": "strawberry", "max_tokens": 0, "logprobs": 1, "echo": True}
    reply = served.post(body, PATH)
    choice = reply["choices"][0]
    ids = served.engine.tokenizer.encode("strawberry")
    assert (choice["text"], len(choice["logprobs"]["tokens"])) == ("strawberry", len(ids))
    assert choice["finish_reason"] == "length"
    assert (reply["usage"]["completion_tokens"], reply["usage"]["total_tokens"]) == (0, len(ids))
    assert streamed(served.stream(body, PATH)) == ["strawberry"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"suffix": "x"}, "suffix"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[1], "a"]}, "prompt"),
        ({"prompt": [10**9]}, "prompt"),
        ({"prompt": ["a"] * 200}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"best_of": 3}, "best_of"),
        ({"max_tokens": 0}, "max_tokens"),
    ],
    ids=str,
)
def test_what_is_not_done_or_wrong(served: Served, fields: dict[str, Any], param: str) -> None:
    assert str(served.refused({"prompt": "a", **fields}, path=PATH)["param"]).startswith(param)


@pytest.mark.parametrize(
    ("prompt", "param", "expected"),
    [
        (["a", 1], "prompt[1]", "a valid string"),
        (["a", "b", 1, 2], "prompt[2]", "a valid string"),
        ([1, "a"], "prompt[1]", "a valid integer"),
        ([1, "a", 2, "b"], "prompt[1]", "a valid integer"),
        ([1, [2]], "prompt[1]", "a valid integer"),
        (["a", [2]], "prompt[1]", "a valid string"),
        ([[1], "a"], "prompt[1]", "a list"),
        ([[1], [2, "a"]], "prompt[1][1]", "a valid integer"),
        ([[1], []], "prompt[1]", "at least 1 of them"),
        (["a", ""], "prompt[1]", "text that is not empty"),
        ([["a"]], "prompt[0][0]", "a valid integer"),
        ([True], "prompt[0]", "a valid integer or a valid string or a list"),
        ({"a": 1}, "prompt", "a valid string or a list"),
    ],
    ids=str,
)
def test_of_a_prompt_the_part_that_is_wrong_is_named(served: Served, prompt: object, param: str, expected: str) -> None:
    error = served.refused({"prompt": prompt}, path=PATH)
    assert error["param"] == param
    assert error["message"].startswith(f"{param}: found ")
    assert error["message"].endswith(f", expected {expected}")
