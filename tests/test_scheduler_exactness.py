"""Each reply is what it is alone, whatever runs beside it: kinds of caches, budgets, seeds, shared prefixes."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest

from mlxqwen import Engine
from mlxqwen.engine.handle import Handle
from mlxqwen.engine.request import CacheKind, Request
from mlxqwen.engine.scheduler import Scheduler
from mlxqwen.engine.speculation.prompt_lookup import PromptLookup
from mlxqwen.engine.text_generation import text_request
from mlxqwen.model.qwen3 import Qwen3ForCausalLM
from mlxqwen.sampling.params import SamplingParams
from mlxqwen.text.tokenizer import Tokenizer
from tests.conftest import VOCAB_SIZE, random_model
from tests.scheduling import (
    EXACT_KINDS,
    KINDS,
    Forced,
    Only,
    alone,
    asked,
    constrained,
    ids,
    machine,
    new_scheduler,
    run,
    taken,
)

SEEDED = SamplingParams(seed=3, temperature=1.5, presence_penalty=1.0, repetition_penalty=1.1)
FRONT = [(n * 13) % VOCAB_SIZE for n in range(70)]


@pytest.fixture(scope="module")
def model() -> Qwen3ForCausalLM:
    return random_model(context=512)


@pytest.fixture(scope="module")
def mixed_alone(model: Qwen3ForCausalLM) -> list[list[int]]:
    """What `mixed(EXACT_KINDS)` get where nobody else runs."""
    return [alone(model, request) for request in mixed(EXACT_KINDS)]


def mixed(kinds: tuple[str, ...]) -> list[Request]:
    """Requests that share fronts, force tokens, restrict draws and guess, of these kinds of caches."""
    found = []
    for place, kind in enumerate(kinds * 2):
        common: dict[str, Any] = {"cache": KINDS[kind], "sampling": SEEDED if place % 2 else SamplingParams(seed=place)}
        found += [
            asked([*FRONT[: 20 + 7 * place], place], 12, **common),
            asked([place], 9, constraints=constrained(lambda: Only(range(10))), **common),
            asked([*FRONT, place], 10, constraints=constrained(lambda: Forced({2: 5, 3: 6})), **common),
            asked([1, 2] * 8, 15, drafter=PromptLookup(), **common),
        ]
    return found


def run_late(scheduler: Scheduler, requests: list[Request], between: int) -> list[list[int]]:
    """One more request after so many steps."""
    handles: list[Handle] = []
    found: list[list[int]] = []
    for request in requests:
        handles.append(scheduler.submit(request))
        found.append([])
        for _ in range(between):
            scheduler.step()
    for tokens, handle, rest in zip(found, handles, run(scheduler, handles), strict=True):
        tokens += rest + ids(taken(handle))
    return found


@pytest.mark.parametrize("is_gpu", [False, True])
@pytest.mark.parametrize("store", [0, 1 << 30])
@pytest.mark.parametrize("between", [0, 2])
def test_replies_of_exact_kinds_are_those_alone(
    model: Qwen3ForCausalLM, mixed_alone: list[list[int]], store: int, between: int, is_gpu: bool
) -> None:
    requests, expected = mixed(EXACT_KINDS), mixed_alone
    with machine(model, 1 << 32, is_gpu=is_gpu):
        assert run_late(new_scheduler(model, store=store), requests, between) == expected
        scheduler = new_scheduler(model, store=store, max_running=3)
        assert run_late(scheduler, requests, between) == expected
        assert run_late(scheduler, requests, between) == expected  # of what is known now


# A ring's logits depend in the last bits on how many tokens are read together; its codes may flip with them.


def logits_of(model: Qwen3ForCausalLM, monkeypatch: pytest.MonkeyPatch, requests: list[Request], **options: Any) -> Any:
    """For each request, the logits behind each of its tokens; tokens are forced, so that all stand alike."""
    seen: dict[int, list[mx.array]] = {}
    place = {request.prompt: n for n, request in enumerate(requests)}

    def noted(logits: mx.array, generations: Any) -> None:
        for row, one in enumerate(generations):
            if one is not None:
                seen.setdefault(place[one.request.prompt], []).append(logits[row])

    from mlxqwen.engine import prefill, running

    def watched(module: Any) -> None:
        real = module.masks_of

        def masks_of(generations: Any) -> Any:
            current.append(generations)
            return real(generations)

        monkeypatch.setattr(module, "masks_of", masks_of)
        apply = module.apply_masks

        def apply_masks(logits: mx.array, masks: Any) -> mx.array:
            noted(logits, current.pop())
            return apply(logits, masks)

        monkeypatch.setattr(module, "apply_masks", apply_masks)

    current: list[Any] = []
    with monkeypatch.context() as patch:
        monkeypatch = patch
        watched(prefill)
        watched(running)
        scheduler = new_scheduler(model, **options)
        run(scheduler, [scheduler.submit(request) for request in requests])
        if options:
            seen.clear()
            run(scheduler, [scheduler.submit(request) for request in requests])  # of what is known now
    return seen


@pytest.mark.parametrize(
    ("kind", "bound"), [("linear", 0.0), ("8 bits", 0.0), ("4 bits", 0.0), ("ring", 2e-4), ("ring of 8 bits", 1e-1)]
)
def test_logits_under_forced_tokens_are_within_a_bound(
    model: Qwen3ForCausalLM, monkeypatch: pytest.MonkeyPatch, kind: str, bound: float
) -> None:
    """Logits of magnitude ten; in a batch, behind what the store knows, beside the same alone."""
    forced = constrained(lambda: Forced({n: (n * 5) % VOCAB_SIZE for n in range(30)}))
    requests = [
        asked([*FRONT[:length], n], 20, constraints=forced, cache=KINDS[kind])
        for n, length in enumerate([3, 20, 33, 64, 70])
    ]
    together = logits_of(model, monkeypatch, requests, store=1 << 30)
    for place, request in enumerate(requests):
        (lone,) = logits_of(model, monkeypatch, [request]).values()
        assert len(lone) == len(together[place]) == 20
        worst = max(float(mx.abs(one - other).max()) for one, other in zip(lone, together[place], strict=True))
        assert worst <= bound


# Text: budgets of thought, stop strings, loops


def test_replies_of_text_are_those_alone(demo: tuple[Qwen3ForCausalLM, Tokenizer]) -> None:
    """Budgets, stop strings and limits of their own, beside each other."""
    model, tokenizer = demo

    def question(text: str) -> list[int]:
        return [*Engine(model, tokenizer).prompt([{"role": "user", "content": text}]), *tokenizer.encode("<think>\n")]

    options: list[dict[str, Any]] = [
        {"thinking_budget": 5},
        {"thinking_budget": 0},
        {},
        {"stop": "r"},
        {"max_tokens": 7},
        {"thinking_budget": 9, "cache": CacheKind(kv_bits=8)},
        {"constraints": ()},
    ]
    requests = [
        text_request(
            model,
            tokenizer,
            question(f"How many r's in strawberry{'!' * n}"),
            sampling={"seed": n},
            **{"max_tokens": 24, **one},
        )
        for n, one in enumerate(options)
    ]

    def replies(*requests: Request, **how: Any) -> list[Any]:
        scheduler = new_scheduler(model, **how)
        handles = [scheduler.submit(request) for request in requests]
        while scheduler.step():
            pass
        ends = [handle.poll_done() for handle in handles]
        return [(end.reply, end.finish_reason, end.usage.reasoning_tokens, end.tokens) for end in ends if end]

    expected = [replies(request)[0] for request in requests]
    for how in ({}, {"max_running": 2}, {"store": 1 << 30}):
        assert replies(*requests, **how) == expected


def test_what_nobody_may_share_is_read_by_each(model: Qwen3ForCausalLM) -> None:
    scheduler = new_scheduler(model, store=1 << 30)
    first = scheduler.submit(asked(FRONT, 2, salt="one"))
    run(scheduler, [first])
    second, third = (scheduler.submit(asked(FRONT, 2, salt=salt)) for salt in ("another", "one"))
    run(scheduler, [second, third])
    assert [handle.cached_tokens for handle in (first, second, third)] == [0, 0, 64]


def test_equal_fronts_that_are_being_read_are_waited_for(model: Qwen3ForCausalLM) -> None:
    scheduler = new_scheduler(model, store=1 << 30)
    handles = [scheduler.submit(asked([*FRONT, n], 3, prefill_chunk=16)) for n in range(4)]
    found = run(scheduler, handles)
    assert [handle.cached_tokens for handle in handles] == [0, 64, 64, 64]
    assert found == [alone(model, handle.request) for handle in handles]


def test_a_stores_blocks_are_those_of_the_reply_too(model: Qwen3ForCausalLM) -> None:
    """A next turn, which begins with the whole reply, reads what is behind the last whole block alone."""
    scheduler = new_scheduler(model, store=1 << 30)
    (reply,) = run(scheduler, [scheduler.submit(asked(FRONT, 40))])
    turn = [*FRONT, *reply, 1, 2, 3]
    handle = scheduler.submit(asked(turn, 5))
    assert run(scheduler, [handle]) == [alone(model, asked(turn, 5))]
    assert handle.cached_tokens == (len(FRONT) + 39) // 16 * 16
