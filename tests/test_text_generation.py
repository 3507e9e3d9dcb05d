"""Text in, text out: what is shown, where it ends, and what it is drawn from."""

from __future__ import annotations

import logging
import re
from codecs import getincrementaldecoder
from collections.abc import Sequence
from copy import copy
from dataclasses import fields, replace
from typing import Any

import mlx.core as mx
import pytest
from demo.data import ADDED_TOKENS
from hypothesis import given, settings
from hypothesis import strategies as st

import mlxqwen
from mlxqwen import Engine, batch_generate, generate, load, make_cache, stream_generate
from mlxqwen.chat.reply import Delta
from mlxqwen.chat.reply_parser import parse_reply
from mlxqwen.chat.thinking import EARLY_STOP_TEXT, begins_in_thought
from mlxqwen.engine import text_generation
from mlxqwen.engine.request import CacheKind
from mlxqwen.engine.text_generation import GenerationResponse, batch_stream, end_token_ids, resolve_params
from mlxqwen.errors import ContextLengthError, OptionError
from mlxqwen.files.config import AffineQuantization, GenerationConfig, Quantization
from mlxqwen.model.qwen3 import Qwen3ForCausalLM
from mlxqwen.sampling.params import NON_THINKING, THINKING, SamplingParams
from mlxqwen.text.tokenizer import Tokenizer
from tests.conftest import random_model

QUESTION = [{"role": "user", "content": "How many r's in strawberry?"}]
GREEDY = SamplingParams(temperature=0)


def token_id(tokenizer: Tokenizer, token: str) -> int:
    found = tokenizer.token_to_id(token)
    assert found is not None
    return found


def always(*ids: int) -> SamplingParams:
    """Draws one of `ids`, the others being 100 nats behind: far more than a model's logits make up for."""
    return SamplingParams(logit_bias=dict.fromkeys(ids, 100.0), top_k=1)


def text_of(responses: Sequence[GenerationResponse]) -> str:
    return "".join(response.text for response in responses)


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 1000), count=st.integers(1, 30))
def test_the_pieces_are_the_text_of_the_tokens(
    babbler: Qwen3ForCausalLM, tokenizer: Tokenizer, seed: int, count: int
) -> None:
    sampling = SamplingParams(temperature=2.0, seed=seed)
    responses = list(stream_generate(babbler, tokenizer, "a", max_tokens=count, sampling=sampling))
    tokens = [response.token for response in responses]
    if responses[-1].finish_reason == "stop":
        assert tokens.pop() == tokenizer.eos_token_id
    whole_characters = getincrementaldecoder("utf-8")("replace")
    special = {token_id(tokenizer, token) for token, is_special in ADDED_TOKENS if is_special}
    expected = (tokenizer.token_bytes(token) for token in tokens if token not in special)
    assert text_of(responses) == whole_characters.decode(b"".join(expected))
    assert text_of(responses) == generate(babbler, tokenizer, "a", max_tokens=count, sampling=sampling)


def test_ids_without_a_token_leave_no_text(babbler: Qwen3ForCausalLM, tokenizer: Tokenizer) -> None:
    assert generate(babbler, tokenizer, "a", max_tokens=3, sampling=always(tokenizer.vocab_size)) == ""


def test_what_a_response_tells(model: Qwen3ForCausalLM, tokenizer: Tokenizer) -> None:
    responses = list(stream_generate(model, tokenizer, [5, 6, 7], max_tokens=6, sampling=always(8)))
    assert [response.generation_tokens for response in responses] == [1, 2, 3, 4, 5, 6]
    assert [response.finish_reason for response in responses] == [None] * 5 + ["length"]
    for response in responses:
        assert response.token == 8
        assert response.prompt_tokens == 3
        assert 0 < response.prompt_tps < 1e9
        assert response.peak_memory > 0
    assert responses[0].generation_tps == 0
    assert all(0 < response.generation_tps < 1e9 for response in responses[1:])


def test_special_tokens_are_not_shown_but_think_is(model: Qwen3ForCausalLM, tokenizer: Tokenizer) -> None:
    for token, shown in (
        ("<|im_start|>", ""),
        ("<|vision_pad|>", ""),
        ("<think>", "<think>"),
        ("</think>", "</think>"),
    ):
        sampling = always(token_id(tokenizer, token))
        assert generate(model, tokenizer, "a", max_tokens=3, sampling=sampling) == shown * 3


def test_half_a_character_at_the_end(model: Qwen3ForCausalLM, tokenizer: Tokenizer) -> None:
    half = tokenizer.encode("ᚠ")[0]
    for sampling in (always(half), always(half, token_id(tokenizer, "<|im_end|>"))):
        responses = list(stream_generate(model, tokenizer, "a", max_tokens=2, sampling=sampling))
        halves = [response.token for response in responses if response.token == half]
        assert text_of(responses) == tokenizer.decode(halves)[:-1]  # the last one is not shown as a broken character


@settings(max_examples=20, deadline=None)
@given(data=st.data(), seed=st.integers(0, 5))
def test_stop_strings_anywhere(babbler: Qwen3ForCausalLM, tokenizer: Tokenizer, data: st.DataObject, seed: int) -> None:
    options: dict[str, Any] = {"max_tokens": 12, "sampling": SamplingParams(temperature=2.0, seed=seed)}
    whole = generate(babbler, tokenizer, "a", **options)
    stops = ["not in the text"]
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(whole) - 1))
        stops.append(whole[start : start + data.draw(st.integers(1, 8))])
    responses = list(stream_generate(babbler, tokenizer, "a", stop=stops, **options))
    end = min(whole.find(stop) for stop in stops[1:])
    assert text_of(responses) == whole[:end]
    assert [response.finish_reason for response in responses] == [None] * (len(responses) - 1) + ["stop"]
    assert whole.startswith(
        tokenizer.decode([r.token for r in responses[:-1]], skip_special_tokens=True).rstrip("\ufffd")
    )
    assert batch_generate(babbler, tokenizer, ["a", "a"], stop=stops, **options) == [whole[:end]] * 2


def test_a_stop_string_at_the_very_start(model: Qwen3ForCausalLM, tokenizer: Tokenizer) -> None:
    (letter,) = tokenizer.encode("x")
    stops: list[tuple[Any, int]] = [("x", 1), (["x"], 1), ("xx", 2), (["y", "xxx"], 3)]
    for stop, tokens in stops:
        responses = list(stream_generate(model, tokenizer, "a", stop=stop, max_tokens=9, sampling=always(letter)))
        assert text_of(responses) == ""
        assert len(responses) == tokens
        assert responses[-1].finish_reason == "stop"


def test_what_could_have_become_a_stop_is_shown_in_the_end(model: Qwen3ForCausalLM, tokenizer: Tokenizer) -> None:
    (letter,) = tokenizer.encode("x")
    responses = list(stream_generate(model, tokenizer, "a", stop="xxxxx", max_tokens=3, sampling=always(letter)))
    assert [response.text for response in responses] == ["", "", "xxx"]
    assert responses[-1].finish_reason == "length"


def test_end_tokens_of_every_file(tokenizer: Tokenizer) -> None:
    model = random_model(GenerationConfig({}, (5,)), vocab_size=tokenizer.vocab_size, eos_token_ids=[3, 4])
    assert set(end_token_ids(model, tokenizer)) == {3, 4, 5, tokenizer.eos_token_id}
    for end in end_token_ids(model, tokenizer):
        (response,) = stream_generate(model, tokenizer, "a", sampling=always(end))
        assert (response.text, response.token, response.finish_reason) == ("", end, "stop")


def test_verbose_prints_as_it_returns(
    model: Qwen3ForCausalLM, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    text = generate(model, tokenizer, "Hello", max_tokens=5, sampling=always(*tokenizer.encode("x")), verbose=True)
    assert text == "xxxxx"
    printed = capsys.readouterr().out
    assert printed.startswith(text + "\n")
    assert f"{len(tokenizer.encode('Hello'))} tokens" in printed
    assert "5 tokens" in printed
    generate(model, tokenizer, "Hello", max_tokens=5)
    assert capsys.readouterr().out == ""


@settings(max_examples=5, deadline=None)
@given(
    prompts=st.lists(st.text("abc <>/think\n", min_size=1, max_size=20), min_size=1, max_size=4),
    seeds=st.lists(st.integers(0, 99), min_size=4, max_size=4),
)
def test_many_prompts_at_once(
    babbler: Qwen3ForCausalLM, tokenizer: Tokenizer, prompts: list[str], seeds: list[int]
) -> None:
    mixtures: list[list[Any]] = [
        [{"seed": seed} for seed in seeds],
        [GREEDY] * 4,
        [{"seed": seeds[0]}, SamplingParams(seed=2), GREEDY, {"seed": 1}],
    ]
    for mixture in mixtures:
        each = mixture[: len(prompts)]
        alone = [
            generate(babbler, tokenizer, prompt, max_tokens=8, sampling=one)
            for prompt, one in zip(prompts, each, strict=True)
        ]
        assert batch_generate(babbler, tokenizer, prompts, max_tokens=8, sampling=each) == alone
    one_for_all = {"seed": 7, "temperature": 1.5}
    alone = [generate(babbler, tokenizer, prompt, max_tokens=8, sampling=one_for_all) for prompt in prompts]
    assert batch_generate(babbler, tokenizer, prompts, max_tokens=8, sampling=one_for_all, prefill_chunk=3) == alone


@pytest.mark.parametrize("cache", [CacheKind(max_kv_size=16), CacheKind(max_kv_size=16, kv_bits=8)], ids=str)
def test_rows_that_fill_windows_of_their_own(babbler: Qwen3ForCausalLM, tokenizer: Tokenizer, cache: CacheKind) -> None:
    """Prompts of nearly the same length, each of which is stopped in where its window is kept."""
    prompts = ["a b c d e f g h i j " * 2 + "k " * n for n in (9, 0, 5, 1)]
    options: dict[str, Any] = {"max_tokens": 8, "sampling": {"seed": 5, "temperature": 1.5}, "cache": cache}
    alone = [generate(babbler, tokenizer, prompt, **options) for prompt in prompts]
    for _ in range(2):  # at first, and with what was kept
        assert batch_generate(babbler, tokenizer, prompts, **options) == alone


def test_rows_of_the_demo_end_by_themselves(model: Qwen3ForCausalLM, tokenizer: Tokenizer) -> None:
    prompts = [
        tokenizer.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        for content in ("Hello", "How many e's in tree?", "12 + 30 = ? /no_think")
    ]
    alone = [generate(model, tokenizer, prompt, max_tokens=150, sampling={"seed": 3}) for prompt in prompts]
    assert batch_generate(model, tokenizer, prompts, max_tokens=150, sampling={"seed": 3}) == alone


def test_prompts_as_arrays(model: Qwen3ForCausalLM, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("Hello")
    text = generate(model, tokenizer, "Hello", max_tokens=5, sampling=GREEDY)
    assert generate(model, tokenizer, mx.array(ids), max_tokens=5, sampling=GREEDY) == text
    several: list[Any] = [mx.array([ids, ids]), [mx.array(ids), "Hello"], (tuple(ids), ids)]
    for prompts in several:
        assert batch_generate(model, tokenizer, prompts, max_tokens=5, sampling=GREEDY) == [text] * 2


@pytest.mark.parametrize("thinking", [None, True, False])
def test_the_prompt_tells_the_profile(babbler: Qwen3ForCausalLM, tokenizer: Tokenizer, thinking: bool | None) -> None:
    ids = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, enable_thinking=thinking)
    assert begins_in_thought(tokenizer, ids) is (False if thinking is False else None)
    profile = NON_THINKING if thinking is False else THINKING
    assert resolve_params(babbler, None, thinking=thinking is not False) == profile
    names = ("temperature", "top_p", "top_k", "min_p")
    spelled = SamplingParams(seed=11, **{name: getattr(profile, name) for name in names})
    chosen, other = (
        generate(babbler, tokenizer, ids, max_tokens=40, sampling=one) for one in (spelled, SamplingParams(seed=11))
    )
    assert chosen != other
    assert generate(babbler, tokenizer, ids, max_tokens=40, sampling={"seed": 11}) == chosen
    assert batch_generate(babbler, tokenizer, [ids], max_tokens=40, sampling={"seed": 11}) == [chosen]
    assert generate(babbler, tokenizer, tokenizer.decode(ids), max_tokens=40, sampling={"seed": 11}) == chosen


def test_an_old_think_block_is_no_closed_one(tokenizer: Tokenizer) -> None:
    history = [*QUESTION, {"role": "assistant", "content": "<think>\n\n</think>\n\n3"}, *QUESTION]
    assert begins_in_thought(tokenizer, tokenizer.apply_chat_template(history, add_generation_prompt=True)) is None
    closed = "<think>\n\n</think>\n\n"
    assert begins_in_thought(tokenizer, tokenizer.encode(f"{closed}3<|im_end|>\n<|im_start|>assistant\n")) is None
    assert begins_in_thought(tokenizer, tokenizer.encode("Hello")) is None
    assert begins_in_thought(tokenizer, tokenizer.encode(closed)) is False
    assert begins_in_thought(tokenizer, tokenizer.encode("Why?<|im_end|>\n<|im_start|>assistant\n<think>\n")) is True


def with_template(tokenizer: Tokenizer, template: str) -> Tokenizer:
    other = copy(tokenizer)
    other.chat_templates = {"default": template}
    return other


def test_a_template_without_think_blocks_asks_for_no_thought(babbler: Qwen3ForCausalLM, tokenizer: Tokenizer) -> None:
    plain = with_template(tokenizer, "{{ messages[0].content }}")
    spelled = SamplingParams(temperature=0.7, top_p=0.8, top_k=20, seed=11)
    chosen = generate(babbler, plain, "Hello", max_tokens=40, sampling=spelled)
    assert generate(babbler, plain, "Hello", max_tokens=40, sampling={"seed": 11}) == chosen
    assert generate(babbler, tokenizer, "Hello", max_tokens=40, sampling={"seed": 11}) != chosen


def test_single_options_win_over_file_and_profile() -> None:
    model = random_model(GenerationConfig({"temperature": 0.1, "repetition_penalty": 1.2, "presence_penalty": 0.5}))
    chosen = resolve_params(model, {"presence_penalty": 1.5, "top_k": 7, "top_p": None}, thinking=True)
    assert chosen == SamplingParams(temperature=0.6, top_p=0.95, top_k=7, presence_penalty=1.5, repetition_penalty=1.2)
    complete = SamplingParams(temperature=0.3)
    assert resolve_params(model, complete, thinking=True) is complete


def test_junk_in_the_file_is_noted_once(tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture) -> None:
    model = random_model(GenerationConfig({"temperature": "hot", "top_k": 5}), vocab_size=tokenizer.vocab_size)
    with caplog.at_level(logging.WARNING, "mlxqwen"):
        generate(model, tokenizer, "a", max_tokens=4)
        assert [record.name for record in caplog.records] == ["mlxqwen"]
        assert "temperature" in caplog.text
        caplog.clear()
        batch_generate(model, tokenizer, ["a", "b", "c"], max_tokens=4)
        assert len(caplog.records) == 1


@pytest.mark.parametrize(
    ("prompt", "options"),
    [
        ("", {}),
        ([], {}),
        (None, {}),
        (5, {}),
        ("\ud800", {}),
        ([[1]], {}),
        ([[1], [2]], {}),
        (["a"], {}),
        ("a", {"stop": ""}),
        ("a", {"stop": ["b", None]}),
        ("a", {"sampling": "greedy"}),
        ("a", {"sampling": {"temprature": 1.0}}),
        ("a", {"sampling": {"temperature": float("nan")}}),
        ("a", {"sampling": {"logit_bias": {2**30: 1.0}}}),
        ("a", {"max_tokens": 0}),
    ],
    ids=repr,
)
def test_bad_requests_touch_no_cache(
    model: Qwen3ForCausalLM, tokenizer: Tokenizer, prompt: Any, options: dict[str, Any]
) -> None:
    cache = make_cache(model)
    with pytest.raises(OptionError):
        generate(model, tokenizer, prompt, cache=cache, **options)
    assert cache.offset == 0
    with pytest.raises(OptionError):
        batch_generate(model, tokenizer, [prompt, "a"], **options)


@pytest.mark.parametrize("function", [generate, stream_generate, batch_stream, batch_generate])
def test_keywords_that_do_not_exist_are_type_errors(
    model: Qwen3ForCausalLM, tokenizer: Tokenizer, function: Any
) -> None:
    name = function.__name__
    for keyword, way_out in {"temp": "temperature=", "holds_cache": "", "prompt_cache": "cache=make_cache"}.items():
        expected = rf"{name}\(\) got an unexpected keyword argument '{keyword}'"
        with pytest.raises(TypeError, match=expected + (f"; here it is {way_out}" if way_out else "$")):
            function(model, tokenizer, ["a"], **{keyword: 0})
    with pytest.raises(TypeError, match=r"Engine\.reply\(\) got an unexpected keyword argument 'temp'; here it is"):
        Engine(model, tokenizer).reply([1], temp=0)


def test_ways_out_of_foreign_keywords_name_what_there_is() -> None:
    """The first word of each is a keyword of ours, or a sampling option."""
    ours = {*(stream_generate.__kwdefaults__ or ()), *(one.name for one in fields(SamplingParams))}
    for keyword, way_out in text_generation._ELSEWHERE.items():
        assert keyword not in ours
        first = re.split(r"[=(, ]", way_out)[0]
        assert first in ours or hasattr(mlxqwen, first) or first in ("for", "tokenizer.apply_chat_template")


def test_sampling_options_may_be_given_by_themselves(model: Qwen3ForCausalLM, tokenizer: Tokenizer) -> None:
    single: dict[str, Any] = {"temperature": 1.5, "seed": 7, "logit_bias": {5: 3.0}}
    for function in (generate, batch_generate):
        prompt: Any = "Once" if function is generate else ["Once", "A"]
        expected = function(model, tokenizer, prompt, max_tokens=12, sampling=single)
        assert function(model, tokenizer, prompt, max_tokens=12, **single) == expected
        mixed: dict[str, Any] = {"sampling": {"temperature": 1.5, "logit_bias": {5: 3.0}}, "seed": 7}
        assert function(model, tokenizer, prompt, max_tokens=12, **mixed) == expected
    events = [*Engine(model, tokenizer).reply("Once", max_tokens=12, split=False, **single)]
    assert "".join(one.content or "" for one in events if isinstance(one, Delta)) == generate(
        model, tokenizer, "Once", max_tokens=12, **single
    )
    for sampling in (SamplingParams(), {"seed": 1}):
        with pytest.raises(OptionError, match=r"^seed: found beside sampling"):
            generate(model, tokenizer, "Once", seed=2, sampling=sampling)
    with pytest.raises(OptionError, match=r"^temperature: found -1"):
        stream_generate(model, tokenizer, "Once", temperature=-1)


@pytest.mark.parametrize("prompts", ["text", [], None, 3, [1, 2]], ids=repr)
def test_what_is_no_list_of_prompts(model: Qwen3ForCausalLM, tokenizer: Tokenizer, prompts: Any) -> None:
    with pytest.raises(OptionError, match="prompt"):
        batch_generate(model, tokenizer, prompts)


def test_one_prompt_goes_into_a_list(model: Qwen3ForCausalLM, tokenizer: Tokenizer) -> None:
    with pytest.raises(OptionError, match=r"prompts: found one prompt, expected a list of .*\n.*\[prompt\]"):
        batch_generate(model, tokenizer, [1, 2, 3])
    with pytest.raises(OptionError, match="prompts: found one prompt"):
        batch_generate(model, tokenizer, "Hello")
    with pytest.raises(OptionError, match="prompts: found none"):
        batch_generate(model, tokenizer, [])


def test_sampling_for_another_number_of_prompts(model: Qwen3ForCausalLM, tokenizer: Tokenizer) -> None:
    with pytest.raises(OptionError, match="found 2 for 1 prompts"):
        batch_generate(model, tokenizer, ["a"], sampling=[GREEDY, GREEDY])


def test_a_text_longer_than_the_context(model: Qwen3ForCausalLM, tokenizer: Tokenizer) -> None:
    context = model.config.context_length
    with pytest.raises(ContextLengthError, match=f"{context:,}"):
        generate(model, tokenizer, "word " * context)


def test_the_example_of_the_model_card(capsys: pytest.CaptureFixture[str]) -> None:
    model, tokenizer = load()
    prompt: Any = "Hello, please introduce yourself and tell me what you can do."
    if tokenizer.chat_template is not None:
        messages = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    assert isinstance(prompt, list)
    response = generate(model, tokenizer, prompt=prompt, verbose=True, max_tokens=1024)
    assert capsys.readouterr().out.startswith(response + "\n")


def test_the_chatbot_of_the_model_card(
    model: Qwen3ForCausalLM, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    class QwenChatbot:
        def __init__(self) -> None:
            self.history: list[dict[str, str]] = []

        def generate_response(self, user_input: str) -> str:
            messages = [*self.history, {"role": "user", "content": user_input}]
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            # The card allows 32,768; a reply without end would fill the demo's context and leave no third turn.
            response = generate(model, tokenizer, prompt=text, verbose=True, max_tokens=100)
            self.history.append({"role": "user", "content": user_input})
            self.history.append({"role": "assistant", "content": response})
            return response

    chatbot = QwenChatbot()
    for turn in (
        "How many 'r's are in strawberries?",
        "Then, how many 'r's are in blueberries? /no_think",
        "Really? /think",
    ):
        response = chatbot.generate_response(turn)
        assert capsys.readouterr().out.startswith(response + "\n")
    assert [message["role"] for message in chatbot.history] == ["user", "assistant"] * 3


# Thinking budgets, loops and batches

THOUGHTFUL = ("How many r's in strawberry?", "12 + 30 = ?", "Hello", "Reverse the word tree.")


def chat_ids(tokenizer: Tokenizer, content: str, **options: Any) -> list[int]:
    return tokenizer.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True, **options)


def tokens_of(responses: Sequence[GenerationResponse]) -> list[int]:
    return [response.token for response in responses]


@settings(max_examples=8, deadline=None)
@given(content=st.sampled_from(THOUGHTFUL), budget=st.integers(0, 60), seed=st.integers(0, 5))
def test_a_budget_for_the_demo(
    model: Qwen3ForCausalLM, tokenizer: Tokenizer, content: str, budget: int, seed: int
) -> None:
    ids = chat_ids(tokenizer, content)
    options: dict[str, Any] = {"max_tokens": 200, "sampling": {"seed": seed}}
    free = list(stream_generate(model, tokenizer, ids, **options))
    bounded = list(stream_generate(model, tokenizer, ids, thinking_budget=budget, **options))
    natural = parse_reply(text_of(free), thinking=begins_in_thought(tokenizer, ids)).reasoning or ""
    assert free[-1].reasoning_tokens <= len(natural.encode()) + 2
    assert not free[-1].budget_exhausted
    assert bounded[-1].budget_exhausted == (free[-1].reasoning_tokens > budget)
    if free[-1].reasoning_tokens <= budget:
        assert tokens_of(bounded) == tokens_of(free)
        assert text_of(bounded) == text_of(free)
        assert [one.reasoning_tokens for one in bounded] == [one.reasoning_tokens for one in free]
        return
    assert tokens_of(bounded)[: 1 + budget] == tokens_of(free)[: 1 + budget]
    thought, close, _ = text_of(bounded).removeprefix("<think>").partition("</think>\n\n")
    assert close
    own = tokenizer.decode(tokens_of(free)[1 : 1 + budget]).rstrip("\n")
    assert thought == (f"{own}\n\n{EARLY_STOP_TEXT}\n" if own else f"\n\n{EARLY_STOP_TEXT}\n" if budget else "\n\n")
    assert [one.budget_exhausted for one in bounded] == [place > budget for place in range(len(bounded))]
    sentence = tokens_of(bounded).index(token_id(tokenizer, "</think>")) - 1
    assert bounded[-1].reasoning_tokens == (sentence if budget else 0)


@pytest.mark.parametrize("content", THOUGHTFUL)
def test_no_budget_at_all_is_the_hard_switch(model: Qwen3ForCausalLM, tokenizer: Tokenizer, content: str) -> None:
    prompt, off = chat_ids(tokenizer, content), chat_ids(tokenizer, content, enable_thinking=False)
    options: dict[str, Any] = {"max_tokens": 60, "sampling": GREEDY}
    without = list(stream_generate(model, tokenizer, prompt, thinking_budget=0, **options))
    switched = list(stream_generate(model, tokenizer, off, **options))
    answered = len(off) - len(prompt)
    assert prompt + tokens_of(without)[:answered] == off
    assert tokens_of(without)[answered:] == tokens_of(switched)[: 60 - answered]
    closed = list(stream_generate(model, tokenizer, off, thinking_budget=0, **options))
    assert tokens_of(closed) == tokens_of(switched)
    assert not closed[-1].budget_exhausted


def test_a_prompt_that_opens_the_block_is_counted_from_its_end(model: Qwen3ForCausalLM, tokenizer: Tokenizer) -> None:
    opened = [*chat_ids(tokenizer, THOUGHTFUL[0]), *tokenizer.encode("<think>\n")]
    for budget in (0, 4):
        responses = list(stream_generate(model, tokenizer, opened, thinking_budget=budget, max_tokens=90))
        forced = next(place for place, response in enumerate(responses) if response.budget_exhausted)
        assert forced == budget
        assert responses[-1].budget_exhausted


@pytest.mark.parametrize("content", THOUGHTFUL)
def test_a_budget_of_exactly_the_thought(model: Qwen3ForCausalLM, tokenizer: Tokenizer, content: str) -> None:
    ids = chat_ids(tokenizer, content)
    free = list(stream_generate(model, tokenizer, ids, sampling=GREEDY, max_tokens=100))
    exact = stream_generate(
        model, tokenizer, ids, sampling=GREEDY, max_tokens=100, thinking_budget=free[-1].reasoning_tokens
    )
    assert tokens_of(list(exact)) == tokens_of(free)


def test_an_end_token_right_behind_the_budget_ends(babbler: Qwen3ForCausalLM, tokenizer: Tokenizer) -> None:
    opened = tokenizer.encode("<think>\n")
    sampling = SamplingParams(seed=3, presence_penalty=2.0)
    free = tokens_of(list(stream_generate(babbler, tokenizer, opened, sampling=sampling, max_tokens=6)))
    for budget in (0, 1, 5):
        end = free[budget]
        assert end not in free[:budget]
        ending = random_model(vocab_size=babbler.config.vocab_size, context=512, eos_token_ids=[end])
        row = list(stream_generate(ending, tokenizer, opened, sampling=sampling, thinking_budget=budget))
        assert tokens_of(row) == free[: budget + 1]
        assert (row[-1].finish_reason, row[-1].budget_exhausted) == ("stop", False)


def test_many_budgets_at_once(model: Qwen3ForCausalLM, tokenizer: Tokenizer) -> None:
    prompts = [chat_ids(tokenizer, content) for content in THOUGHTFUL]
    budgets = [7, None, 0, 3]
    options: dict[str, Any] = {"max_tokens": 120, "early_stop_text": "Time is up."}
    alone = [
        list(stream_generate(model, tokenizer, prompt, sampling={"seed": 4}, thinking_budget=budget, **options))
        for prompt, budget in zip(prompts, budgets, strict=True)
    ]
    together: list[list[GenerationResponse]] = [[] for _ in prompts]
    for row, response in batch_stream(
        model, tokenizer, prompts, sampling={"seed": 4}, thinking_budget=budgets, prefill_chunk=5, **options
    ):
        together[row].append(response)
    shown = [
        [(one.token, one.text, one.reasoning_tokens, one.budget_exhausted, one.finish_reason) for one in row]
        for row in together
    ]
    assert shown == [
        [(one.token, one.text, one.reasoning_tokens, one.budget_exhausted, one.finish_reason) for one in row]
        for row in alone
    ]
    assert [row[-1].budget_exhausted for row in together] == [True, False, True, True]
    assert [row[-1].prompt_tokens for row in together] == [len(prompt) for prompt in prompts]
    assert [[one.generation_tokens for one in row] for row in together] == [
        list(range(1, len(row) + 1)) for row in together
    ]
    one_for_all = batch_generate(model, tokenizer, prompts, sampling={"seed": 4}, thinking_budget=2, **options)
    assert all(text.count("Time is up.\n</think>\n\n") == 1 for text in one_for_all)
    assert one_for_all[0] == generate(model, tokenizer, prompts[0], sampling={"seed": 4}, thinking_budget=2, **options)


@pytest.mark.parametrize("max_tokens", [4, 5, 10, 30])
def test_the_limit_comes_before_the_end_of_the_sentence(
    model: Qwen3ForCausalLM, tokenizer: Tokenizer, max_tokens: int
) -> None:
    ids = chat_ids(tokenizer, THOUGHTFUL[0])
    responses = list(stream_generate(model, tokenizer, ids, thinking_budget=3, max_tokens=max_tokens))
    assert [response.finish_reason for response in responses] == [None] * (max_tokens - 1) + ["length"]
    assert responses[-1].budget_exhausted == (max_tokens > 4)


def test_stop_strings_see_the_sentence(model: Qwen3ForCausalLM, tokenizer: Tokenizer) -> None:
    ids = chat_ids(tokenizer, THOUGHTFUL[0])
    text = generate(model, tokenizer, ids, thinking_budget=3, stop="limited time", max_tokens=90)
    assert text.endswith("\n\nConsidering the ")


def test_a_loop_is_stopped_if_asked(babbler: Qwen3ForCausalLM, tokenizer: Tokenizer) -> None:
    (letter,) = tokenizer.encode("x")
    slid = make_cache(babbler, max_kv_size=64)
    options: dict[str, Any] = {"max_tokens": 530, "sampling": always(letter)}
    responses = list(stream_generate(babbler, tokenizer, "a", stop="xx!", stop_on_loop=True, cache=slid, **options))
    assert [response.finish_reason for response in responses] == [None] * 511 + ["loop"]
    assert text_of(responses) == "x" * 512
    slid = make_cache(babbler, max_kv_size=64)
    responses = list(stream_generate(babbler, tokenizer, "a", cache=slid, **options))
    assert [response.finish_reason for response in responses] == [None] * 529 + ["length"]


@pytest.mark.parametrize("option", ["thinking_budget", "sampling"])
def test_one_option_a_row(model: Qwen3ForCausalLM, tokenizer: Tokenizer, option: str) -> None:
    with pytest.raises(OptionError, match=f"{option}: found 2 for 1 prompts"):
        batch_stream(model, tokenizer, ["a"], **{option: [None, None]})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "options", [{"thinking_budget": -1}, {"thinking_budget": 2.5}, {"early_stop_text": "</think>"}], ids=repr
)
def test_bad_budgets_are_told_before_anything_runs(
    model: Qwen3ForCausalLM, tokenizer: Tokenizer, options: dict[str, Any]
) -> None:
    with pytest.raises(OptionError):
        stream_generate(model, tokenizer, "a", **options)


@pytest.mark.parametrize(("bits", "presence_penalty"), [(4, 1.5), (8, 0.0)])
def test_weights_of_few_bits_are_drawn_from_with_a_penalty(bits: int, presence_penalty: float) -> None:
    model = random_model()
    model.config = replace(model.config, quantization=Quantization(AffineQuantization(64, bits)))
    assert resolve_params(model, None, thinking=True) == replace(THINKING, presence_penalty=presence_penalty)
    assert resolve_params(model, {"presence_penalty": 0.0}, thinking=True) == THINKING
