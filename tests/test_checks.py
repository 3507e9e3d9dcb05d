"""Values that callers give: what counts as an integer, a number, a switch, a token id or a size, for every option."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlxqwen import DraftModel, Engine, SamplingParams, batch_generate, call_tool, generate, make_cache, tool_schema
from mlxqwen.chat.request_files.batch import parse_requests
from mlxqwen.checks import check_flag, check_integer, check_number, check_token_ids, parse_size
from mlxqwen.engine.loops import LoopDetector
from mlxqwen.engine.token_stream import generate_tokens
from mlxqwen.errors import OptionError
from mlxqwen.model.qwen3 import Qwen3ForCausalLM
from mlxqwen.text.tokenizer import Tokenizer

MESSAGES = [{"role": "user", "content": "Hi"}]
CALL = {"name": "shout", "arguments": {"word": "a"}}


def shout(word: str) -> str:
    """Say a word loudly."""
    return word.upper() * 50


class Doors:
    """The public functions, cut to a few tokens; what they return can be compared."""

    def __init__(self, model: Qwen3ForCausalLM, tokenizer: Tokenizer) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.engine = Engine(model, tokenizer)

    def generate(self, **options: Any) -> str:
        return generate(self.model, self.tokenizer, "Hi", **{"max_tokens": 3, "sampling": {"seed": 1}, **options})

    def chat(self, **options: Any) -> tuple[str | None, str]:
        reply = self.engine.chat(MESSAGES, **{"max_tokens": 3, "seed": 1, **options})
        return reply.reasoning, reply.content

    def cache(self, **options: Any) -> tuple[object, ...]:
        cache = make_cache(self.model, **options)
        return cache.max_kv_size, cache.keep, cache.kv_bits, cache.kv_group_size, cache.batch_size

    def trim(self, length: int) -> tuple[int, ...]:
        cache = make_cache(self.model)
        self.model(mx.array([[1, 2, 3]]), cache)
        cache.reserve(length)
        cache.trim(length)
        return cache.offsets

    def tokens(self, prompts: Any) -> list[tuple[int, int]]:
        stream = generate_tokens(self.model, prompts, max_tokens=2, sampling=SamplingParams(seed=1))
        return [(row, generated.token) for row, generated in stream]

    def batch(self, batch_size: int) -> list[str]:
        return [done.reply.content for _, done in self.engine.batch([MESSAGES], batch_size=batch_size, max_tokens=2)]

    def run_tools(self, max_rounds: int) -> int:
        return len(self.engine.run_tools(MESSAGES, {"shout": shout}, max_rounds=max_rounds, max_tokens=2).rounds)

    def open(self, **options: Any) -> bool:
        return Engine(self.model, self.tokenizer, **options) is not None


OPTIONS: dict[str, tuple[int, Callable[[Doors, Any], object]]] = {
    "SamplingParams top_k": (5, lambda doors, value: SamplingParams(top_k=value)),
    "SamplingParams seed": (5, lambda doors, value: SamplingParams(seed=value)),
    "SamplingParams logit_bias": (5, lambda doors, value: SamplingParams(logit_bias={value: 1.0}).logit_bias),
    "make_cache max_kv_size": (64, lambda doors, value: doors.cache(max_kv_size=value)),
    "make_cache keep": (2, lambda doors, value: doors.cache(keep=value, max_kv_size=64)),
    "make_cache kv_bits": (8, lambda doors, value: doors.cache(kv_bits=value)),
    "make_cache kv_group_size": (64, lambda doors, value: doors.cache(kv_group_size=value, kv_bits=8)),
    "make_cache batch_size": (2, lambda doors, value: doors.cache(batch_size=value)),
    "KVCache reserve, trim": (2, lambda doors, value: doors.trim(value)),
    "generate max_tokens": (2, lambda doors, value: doors.generate(max_tokens=value)),
    "generate thinking_budget": (2, lambda doors, value: doors.generate(thinking_budget=value, max_tokens=9)),
    "generate prefill_chunk": (1, lambda doors, value: doors.generate(prefill_chunk=value)),
    "generate draft_tokens": (2, lambda doors, value: doors.generate(draft_tokens=value, speculative="lookup")),
    "generate cached_tokens": (
        0,
        lambda doors, value: doors.generate(cached_tokens=value, cache=make_cache(doors.model)),
    ),
    "generate an id of the prompt": (
        5,
        lambda doors, value: generate(doors.model, doors.tokenizer, [value, 6], max_tokens=2, sampling={"seed": 1}),
    ),
    "batch_generate an id of a prompt": (
        5,
        lambda doors, value: batch_generate(
            doors.model, doors.tokenizer, [[value, 6], [7]], max_tokens=2, sampling={"seed": 1}
        ),
    ),
    "Engine.chat max_tokens": (2, lambda doors, value: doors.chat(max_tokens=value)),
    "Engine.chat thinking_budget": (2, lambda doors, value: doors.chat(thinking_budget=value, max_tokens=9)),
    "Engine.chat seed": (2, lambda doors, value: doors.chat(seed=value)),
    "Engine.chat max_kv_size": (64, lambda doors, value: doors.chat(max_kv_size=value)),
    "Engine.chat keep": (2, lambda doors, value: doors.chat(keep=value, max_kv_size=64)),
    "Engine.chat kv_bits": (8, lambda doors, value: doors.chat(kv_bits=value)),
    "Engine.chat prefill_chunk": (4, lambda doors, value: doors.chat(prefill_chunk=value)),
    "Engine.chat priority": (4, lambda doors, value: doors.chat(priority=value)),
    "Engine.batch batch_size": (2, lambda doors, value: doors.batch(value)),
    "Engine.run_tools max_rounds": (2, lambda doors, value: doors.run_tools(value)),
    "Engine.fit max_tokens": (2, lambda doors, value: doors.engine.fit(MESSAGES, max_tokens=value)),
    "Engine max_running": (256, lambda doors, value: doors.open(max_running=value)),
    "Engine prefix_cache": (1 << 20, lambda doors, value: doors.open(prefix_cache=value)),
    "Engine draft_tokens": (4, lambda doors, value: doors.open(draft_tokens=value, speculative="lookup")),
    "DraftModel max_kv_size": (64, lambda doors, value: DraftModel(doors.model, max_kv_size=value).nbytes),
    "DraftModel kv_bits": (8, lambda doors, value: DraftModel(doors.model, kv_bits=value).nbytes),
    "DraftModel prefill_chunk": (8, lambda doors, value: DraftModel(doors.model, prefill_chunk=value).nbytes),
    "call_tool limit": (
        20,
        lambda doors, value: call_tool({"shout": shout}, [tool_schema("shout", shout)], CALL, limit=value),
    ),
    "LoopDetector min_tokens": (9, lambda doors, value: LoopDetector(min_tokens=value).feed(1)),
    "LoopDetector repeats": (9, lambda doors, value: LoopDetector(repeats=value).feed(1)),
    "LoopDetector max_period": (9, lambda doors, value: LoopDetector(max_period=value).feed(1)),
}


@pytest.fixture(scope="module")
def doors(demo: tuple[Qwen3ForCausalLM, Tokenizer]) -> Doors:
    return Doors(*demo)


class Index:
    """An integer by `__index__` alone."""

    def __init__(self, value: int) -> None:
        self._value = value

    def __index__(self) -> int:
        return self._value


@pytest.mark.parametrize("make", [np.int32, Index], ids=lambda make: make.__name__)
@pytest.mark.parametrize("option", OPTIONS)
def test_what_has_an_index_is_an_integer_everywhere(doors: Doors, option: str, make: Callable[[int], object]) -> None:
    value, use = OPTIONS[option]
    assert use(doors, make(value)) == use(doors, value)


def test_a_budget_of_no_token_is_one_by_its_index(doors: Doors) -> None:
    none: Any = Index(0)
    assert doors.chat(thinking_budget=none, max_tokens=9) == doors.chat(thinking_budget=0, max_tokens=9)
    with pytest.raises(OptionError, match="found True with a thinking_budget of 0"):
        doors.chat(thinking_budget=none, thinking=True)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("make", [bool, float, str], ids=lambda make: make.__name__)
def test_what_is_no_integer_is_refused_everywhere(doors: Doors, option: str, make: Callable[[int], object]) -> None:
    value, use = OPTIONS[option]
    if make is str and option in ("SamplingParams logit_bias", "Engine prefix_cache"):
        assert use(doors, str(value)) == use(doors, value)
        return
    with pytest.raises(OptionError, match="found "):
        use(doors, make(value))


def test_options_that_hold_integers_hold_ints() -> None:
    given: dict[str, Any] = {"top_k": np.int64(3), "seed": np.uint64(2**64 - 1), "logit_bias": {np.int16(5): 1}}
    params = SamplingParams(**given)
    assert [type(params.top_k), type(params.seed), *map(type, params.logit_bias or ())] == [int, int, int]
    assert params == SamplingParams(top_k=3, seed=2**64 - 1, logit_bias={5: 1.0})


def test_a_json_file_can_say_every_option_of_sampling() -> None:
    given: dict[str, Any] = {field.name: field.default for field in fields(SamplingParams)}
    given |= {"logit_bias": {18: -100.0, 7: 2.5}, "top_k": -1, "seed": 3}
    assert SamplingParams(**json.loads(json.dumps(given))) == SamplingParams(**given)
    assert SamplingParams(top_k=-1) == SamplingParams(top_k=0)
    with pytest.raises(OptionError, match="logit_bias: found a token id twice"):
        SamplingParams(logit_bias={"18": 1.0, 18: 2.0})  # type: ignore[dict-item]


def test_a_line_of_a_batch_can_say_a_bias() -> None:
    line = json.dumps({"prompt": "a", "sampling": {"logit_bias": {"18": -100}, "top_k": -1}})
    (request,) = parse_requests(line, "batch.jsonl")
    assert SamplingParams(**request.options["sampling"]) == SamplingParams(logit_bias={18: -100.0})


@pytest.mark.parametrize("array", [np.array, mx.array, tuple], ids=["numpy", "mlx", "tuple"])
def test_prompts_are_arrays_of_any_library(doors: Doors, array: Callable[[list[int]], Any]) -> None:
    options: dict[str, Any] = {"max_tokens": 2, "sampling": {"seed": 1}}
    for prompts in ([[5, 6], [7]], [[7]]):
        expected = batch_generate(doors.model, doors.tokenizer, prompts, **options)
        assert batch_generate(doors.model, doors.tokenizer, [*map(array, prompts)], **options) == expected
        assert doors.tokens([*map(array, prompts)]) == doors.tokens(prompts)


@pytest.mark.parametrize("key", ["", "a", "-1", "+1", "1.0", "1_0", " 1", "٣", "9" * 5000])
def test_other_text_is_no_token_id(key: str) -> None:
    with pytest.raises(OptionError, match="logit_bias token id: found") as caught:
        SamplingParams(logit_bias={key: 1.0})  # type: ignore[dict-item]
    assert len(caught.value.problem) < 200


def test_errors_name_the_value_and_what_was_expected() -> None:
    cases: list[tuple[Callable[[], object], str]] = [
        (lambda: check_integer("n", 5, 1, 4), "n: found 5, expected an integer from 1 to 4"),
        (lambda: check_integer("n", 0, 1), "n: found 0, expected an integer from 1"),
        (lambda: check_integer("n", 2000, None, 1000), "n: found 2000, expected an integer up to 1,000"),
        (lambda: check_integer("n", True), "n: found True, expected an integer"),
        (
            lambda: check_integer("n", "1", 0, optional="None for no limit"),
            "n: found '1', expected an integer from 0, or None for no limit",
        ),
        (lambda: check_integer("n", 10**5000, 0, 9), "n: found a number of thousands of digits, expected an integer"),
        (lambda: check_number("x", 0, 0, 1, low_is_open=True), "x: found 0, expected a number in (0, 1]"),
        (lambda: check_number("x", 10**400, 0, 1), "x: found 1000"),
        (lambda: check_flag("b", 1), "b: found 1, expected True or False"),
        (lambda: check_flag("b", None), "b: found None, expected True or False"),
        (lambda: check_flag("b", 0, optional=True), "b: found 0, expected True, False or None"),
        (lambda: check_token_ids("p", [1, 9], 9), "p: found 9, expected token ids from 0 to 8"),
        (lambda: parse_size("s", "2 potatoes"), "s: found '2 potatoes', expected a size above 0"),
    ]
    for check, problem in cases:
        with pytest.raises(OptionError) as caught:
            check()
        assert caught.value.problem.startswith(problem)


def test_what_is_right_comes_back_plain() -> None:
    assert check_integer("n", None, optional="None for no limit") is None
    assert type(check_integer("n", np.int8(3))) is int
    assert type(check_number("x", np.float32(0.5), 0, 1)) is float
    assert check_flag("b", None, optional=True) is None
    assert [type(token) for token in check_token_ids("p", np.array([1, 2]), 9)] == [int, int]
    sizes = {"512": 512, "1.5 GB": 1_500_000_000, "2GiB": 2 << 30, 7: 7, np.int64(7): 7}
    assert [parse_size("s", size) for size in sizes] == [*sizes.values()]
