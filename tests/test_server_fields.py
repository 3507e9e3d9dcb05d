"""Every field of a request does something: what it comes to for the engine, and no field is left out."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from mlxqwen.engine.engine import Engine
from mlxqwen.engine.request import Request
from mlxqwen.model.qwen3 import Qwen3ForCausalLM
from mlxqwen.server.chat_fields import ChatFields
from mlxqwen.server.chat_request import prepare_chat
from mlxqwen.server.models import ServedModel
from mlxqwen.server.settings import ServerSettings
from mlxqwen.text.tokenizer import Tokenizer
from tests.asgi_calls import Call, until
from tests.held_model import held_engine
from tests.serving import CHAT, Served, ask, serving

# Field → a value, and what of the engine's request becomes what by it. 40 is any token that ends no reply.
REQUESTS: dict[str, tuple[Any, str, Any]] = {
    "max_tokens": (7, "max_tokens", 7),
    "max_completion_tokens": (8, "max_tokens", 8),
    "temperature": (0.3, "sampling.temperature", 0.3),
    "top_p": (0.4, "sampling.top_p", 0.4),
    "top_k": (3, "sampling.top_k", 3),
    "min_p": (0.2, "sampling.min_p", 0.2),
    "presence_penalty": (1.25, "sampling.presence_penalty", 1.25),
    "frequency_penalty": (-1.5, "sampling.frequency_penalty", -1.5),
    "repetition_penalty": (1.1, "sampling.repetition_penalty", 1.1),
    "logit_bias": ({"40": 2.5}, "sampling.logit_bias", {40: 2.5}),
    "seed": (12, "sampling.seed", 12),
    "stop": (["a", "b"], "stop", ("a", "b")),
    "logprobs": (True, "logprobs", 0),
    "skip_special_tokens": (False, "skip_special_tokens", False),
    "cache_salt": ("s", "salt", "s"),
    "priority": (-3, "priority", -3),
    "thinking_budget": (9, "thinking_budget", 9),
    "thinking_token_budget": (9, "thinking_budget", 9),
    "reasoning_effort": ("low", "thinking_budget", 1024),
    "ignore_eos": (True, "end_token_ids", frozenset()),
}
# Field → the test that it has: its effect is one on the prompt, the reply, or several requests.
ELSEWHERE = {
    "test_server_chat.py": (
        *("model", "messages", "stream", "stream_options", "n", "user", "metadata", "store", "service_tier"),
        *("top_logprobs", "tools", "tool_choice", "parallel_tool_calls", "chat_template_kwargs"),
        *("add_generation_prompt", "continue_final_message", "include_reasoning", "separate_reasoning", "min_tokens"),
        *("best_of", "use_beam_search", "prompt_logprobs", "modalities", "audio", "functions", "function_call"),
        *("web_search_options", "moderation", "stop_token_ids"),
    ),
    "test_server_structured.py": (
        *("response_format", "structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar"),
        *("regex", "json_schema", "ebnf"),
    ),
    "taken, without effect": (
        *("prediction", "prompt_cache_key", "prompt_cache_retention", "prompt_cache_options"),
        "safety_identifier",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def model(small: tuple[Qwen3ForCausalLM, Tokenizer]) -> Iterator[ServedModel]:
    served = ServedModel("demo", Engine(*small), ServerSettings())
    yield served
    served.close()


def prepared(model: ServedModel, **fields: Any) -> Request:
    chat = ChatFields(messages=ask()["messages"], **fields)
    return prepare_chat(chat, model, ServerSettings()).requests[0]


def attribute(request: Request, path: str) -> Any:
    found: Any = request
    for name in path.split("."):
        found = getattr(found, name)
    return found


def test_no_field_is_left_out() -> None:
    known = {*REQUESTS, *(name for names in ELSEWHERE.values() for name in names)}
    assert known == set(ChatFields.model_fields)


@pytest.mark.parametrize("name", REQUESTS)
def test_a_field_changes_the_request_and_nothing_else(model: ServedModel, name: str) -> None:
    value, path, expected = REQUESTS[name]
    plain, changed = prepared(model), prepared(model, **{name: value})
    assert attribute(changed, path) == expected
    assert attribute(plain, path) != expected
    of_request, _, of_sampling = path.partition(".")
    for other in (one for one in Request.__dataclass_fields__ if one not in (of_request, "constraints")):
        assert getattr(changed, other) == getattr(plain, other), other
    if of_sampling:
        for other in (one for one in plain.sampling.__dataclass_fields__ if one != of_sampling):
            assert getattr(changed.sampling, other) == getattr(plain.sampling, other), other


BENT = {name: REQUESTS[name][0] for name, (_, path, _) in REQUESTS.items() if path.startswith("sampling.")}
BENT |= {
    "top_k": 1,
    "temperature": 0.0,
    "min_p": 0.9,
    "top_p": 0.01,
    "repetition_penalty": 9.0,
    "logit_bias": {"40": 9.0},
}
del BENT["seed"]


@pytest.fixture(scope="module")
def served(babbler: Qwen3ForCausalLM, tokenizer: Tokenizer) -> Iterator[Served]:
    with serving(Engine(babbler, tokenizer)) as made:
        yield made


@pytest.mark.parametrize("name", BENT)
def test_a_field_of_sampling_changes_the_draws_as_the_engines_does(served: Served, name: str) -> None:
    free: dict[str, Any] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "presence_penalty": 0.0}
    body = ask(seed=3, max_tokens=24, chat_template_kwargs={"enable_thinking": False})
    plain, bent = [served.post({**body, **free, **more})["choices"][0] for more in ({}, {name: BENT[name]})]
    sampling = {**free, name: {40: 9.0} if name == "logit_bias" else BENT[name]}
    options: dict[str, Any] = {"seed": 3, "max_tokens": 24, "thinking": False, "sampling": sampling}
    assert bent["message"]["content"] == served.engine.chat(ask()["messages"], **options).content
    assert bent["message"]["content"] != plain["message"]["content"]


def test_who_has_priority_goes_first(babbler: Qwen3ForCausalLM, tokenizer: Tokenizer) -> None:
    engine, model = held_engine(babbler, tokenizer)
    ended: list[int] = []

    async def finished(priority: int, call: Call) -> None:
        await call.end()
        ended.append(priority)

    async def work() -> None:
        with serving(engine, max_running=1) as served:
            model.hold()
            first = Call(served.app, CHAT, ask(max_tokens=2))
            await until(lambda: model.is_held)
            tasks = []
            for place, priority in enumerate((5, -5, 0)):
                call = Call(served.app, CHAT, ask(max_tokens=2, priority=priority))
                tasks.append(asyncio.create_task(finished(priority, call)))
                await until(lambda place=place: len(engine.scheduler.waiting) == place + 1)
            model.release()
            await first.end()
            await asyncio.gather(*tasks)

    try:
        asyncio.run(work())
    finally:
        model.release()
    assert ended == [-5, 0, 5]
