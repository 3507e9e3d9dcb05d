"""What one request does to others: nothing. Weights that change, caches in use, constraints, stores and callbacks."""

from __future__ import annotations

import gc
import math
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Any, cast

import mlx.core as mx
import pytest

from mlxqwen.cache import make_cache
from mlxqwen.cache.prefix_store import PrefixStore
from mlxqwen.engine.engine import Engine
from mlxqwen.engine.events import Done
from mlxqwen.engine.prefixes import _sample
from mlxqwen.engine.request import Request
from mlxqwen.engine.schedulers import scheduler_of
from mlxqwen.engine.token_stream import generate_tokens
from mlxqwen.errors import CacheError, GenerationError, MlxqwenError, OptionError
from mlxqwen.model.qwen3 import Qwen3ForCausalLM
from mlxqwen.sampling.constraint import Constraint, pack_mask
from mlxqwen.sampling.params import SamplingParams
from mlxqwen.text.tokenizer import Tokenizer
from tests.conftest import VOCAB_SIZE, random_model

PROMPT = list(range(1, 41))
QUESTION = [{"role": "user", "content": "12 + 3?"}]


def tokens_of(model: Qwen3ForCausalLM, prompt: list[int] = PROMPT, count: int = 6, **options: Any) -> list[int]:
    options = {"sampling": SamplingParams(seed=5), "eos_token_ids": (), **options}
    return [token.token for _, token in generate_tokens(model, prompt, max_tokens=count, **options)]


def without_store(model: Qwen3ForCausalLM) -> list[int]:
    """The reply of a cache of its own, which shares nothing."""
    return tokens_of(model, cache=make_cache(model))


def replaced(model: Qwen3ForCausalLM) -> None:
    layer = model.model.layers[0].self_attn.v_proj
    for _ in range(2):  # the second array may have the first one's address
        layer.weight = layer.weight * -1.5


def in_place(model: Qwen3ForCausalLM) -> None:
    model.model.layers[1].mlp.down_proj.weight += 0.5


@pytest.mark.parametrize("change", [replaced, in_place])
def test_weights_that_change_leave_nothing_in_the_store(change: Callable[[Qwen3ForCausalLM], None]) -> None:
    model = random_model()
    before = tokens_of(model)
    assert tokens_of(model) == before
    change(model)
    assert tokens_of(model) == without_store(model) != before


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16, mx.uint32])
@pytest.mark.parametrize("shape", [(5,), (6, 4), (7, 20), (3, 5, 9)])
def test_the_numbers_of_a_weight_are_read_where_they_lie(dtype: mx.Dtype, shape: tuple[int, ...]) -> None:
    weight = mx.arange(math.prod(shape)).reshape(shape).astype(dtype)
    for array in (weight, weight.T, weight[..., 1:]):
        row = array
        while row.ndim > 1:
            row = row[row.shape[0] // 2]
        assert _sample(array) == bytes(memoryview(cast(Any, mx.contiguous(row[:8]).view(mx.uint8))))
        assert _sample(array + 1) != _sample(array)


def test_a_weight_without_rows_is_read_whole() -> None:
    assert _sample(mx.array(2.0)) == _sample(mx.array(2.0)) != _sample(mx.array(3.0))
    assert _sample(mx.zeros((0, 4))) == _sample(mx.zeros((0, 4)))


def test_a_weight_that_is_no_number_has_not_changed() -> None:
    nothing = mx.full((4, 4), float("nan"))
    assert _sample(nothing) == _sample(nothing) == _sample(nothing.T)


def test_a_reply_across_a_change_of_weights_is_not_stored() -> None:
    model = random_model()
    stream = generate_tokens(model, PROMPT, max_tokens=20, eos_token_ids=())
    next(stream)
    replaced(model)
    list(stream)
    assert tokens_of(model) == without_store(model)


def test_a_cache_in_use_is_refused_and_its_reply_goes_on() -> None:
    model = random_model()
    expected = tokens_of(model, cache=make_cache(model))
    cache = make_cache(model)
    stream = generate_tokens(
        model, PROMPT, cache=cache, max_tokens=6, eos_token_ids=(), sampling=SamplingParams(seed=5)
    )
    told = [next(stream)[1].token]
    with pytest.raises(CacheError, match="found in use by a reply"):
        tokens_of(model, [1, 2], cache=cache)
    assert told + [token.token for _, token in stream] == expected


class Unruly:
    """A constraint that does what it is told when its mask is asked for."""

    def __init__(self, act: Callable[[], mx.array | None]) -> None:
        self._act = act

    def mask(self) -> mx.array | None:
        return self._act()

    def settle(self, drawn: int) -> int:
        return drawn

    def advance(self, token: int) -> None:
        pass

    def fork(self) -> Constraint:
        return self


def leave() -> mx.array:
    raise SystemExit(3)


@pytest.mark.parametrize("has_daemon", [False, True])
@pytest.mark.parametrize("act", ["shape", "leave", "ask"])
def test_an_unruly_constraint_ends_its_own_reply(act: str, has_daemon: bool) -> None:
    model = random_model()
    expected = tokens_of(model)
    acts: dict[str, Callable[[], mx.array | None]] = {
        "shape": lambda: pack_mask([1], VOCAB_SIZE)[:1],
        "leave": leave,
        "ask": lambda: mx.array(tokens_of(model, [3], 1)),
    }
    if has_daemon:
        thread = threading.Thread(target=tokens_of, args=(model, [7], 1))
        thread.start()
        thread.join()
    scheduler = scheduler_of(model)
    seeded = SamplingParams(seed=5)
    unruly = scheduler.submit(
        Request(prompt=(5, 6), sampling=seeded, max_tokens=6, constraints=(lambda _: Unruly(acts[act]),))
    )
    neighbour = scheduler.submit(Request(prompt=tuple(PROMPT), sampling=seeded, max_tokens=6))
    assert [neighbour.next_token().token for _ in range(6)] == expected
    error = {"shape": GenerationError, "leave": SystemExit, "ask": OptionError}[act]
    with pytest.raises(error):
        unruly.next_token()


def test_a_parked_reply_goes_on_in_another_thread() -> None:
    model = random_model(context=1024)
    scheduler = scheduler_of(model)
    made = [Request(prompt=tuple(PROMPT), sampling=SamplingParams(seed=seed), max_tokens=500) for seed in (1, 2)]
    alone = [token.token for _, token in generate_tokens(model, PROMPT, sampling=made[0].sampling, max_tokens=500)]
    ahead, read = [scheduler.submit(one) for one in made]
    told = [ahead.next_token().token]
    for _ in range(400):
        read.next_token()
    thread = threading.Thread(target=lambda: told.extend(ahead.next_token().token for _ in range(499)))
    thread.start()
    thread.join()
    assert told == alone


def test_a_store_that_fails_ends_no_reply(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    model = random_model()
    expected = tokens_of(model)

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(PrefixStore, "put", fail)
    assert tokens_of(model, [*PROMPT[1:]]) != expected
    assert tokens_of(model) == expected
    assert "not kept: no memory" in caplog.text


def test_an_urgent_prompt_does_not_wait_for_one_that_is_less_urgent() -> None:
    model = random_model()
    scheduler = scheduler_of(model)

    def asked(priority: int) -> Request:
        return Request(prompt=tuple(PROMPT), max_tokens=2, priority=priority, prefill_chunk=8)

    slow = scheduler.submit(asked(100))
    scheduler.step()
    urgent = scheduler.submit(asked(-100))
    while not urgent.is_ready:
        scheduler.step()
    assert not slow.is_ready


def test_errors_hold_nothing_of_a_reply() -> None:
    model = random_model()

    class Held:
        pass

    held = Held()
    gone = weakref.ref(held)

    def fail(_: object, kept: Held = held) -> Constraint:
        return Unruly(lambda: (kept, leave())[1])

    gc.collect()
    gc.disable()
    try:
        with suppress(SystemExit):
            tokens_of(model, constraints=(fail,))
        del held, fail
        assert gone() is None
    finally:
        gc.enable()


def test_a_batch_goes_on_where_a_callback_of_one_conversation_fails(demo: tuple[Qwen3ForCausalLM, Tokenizer]) -> None:
    engine = Engine(*demo)
    refused: list[tuple[int, MlxqwenError]] = []

    def fail(_: object) -> Constraint:
        raise ValueError("grammar")

    def broken(pipeline: object) -> Constraint:
        return Unruly(lambda: fail(pipeline))  # type: ignore[arg-type, return-value]

    answered = dict(
        engine.batch([QUESTION] * 3, max_tokens=3, on_error=lambda *one: refused.append(one), constraints=[broken])
    )
    assert not answered
    assert [index for index, _ in refused] == [0, 1, 2]
    assert all("ValueError: grammar" in error.problem for _, error in refused)
    assert isinstance(next(iter(dict(engine.batch([QUESTION], max_tokens=3)).values())), Done)
