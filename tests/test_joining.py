"""Rows that join a running batch: each gets what it would get alone, and nobody pays for another."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxqwen.cache import KVCache, make_cache
from mlxqwen.engine.request import Request
from mlxqwen.engine.token_stream import TokenStream, generate_tokens
from mlxqwen.errors import CacheError, ContextLengthError, OptionError
from mlxqwen.model.qwen3 import Qwen3ForCausalLM, Qwen3Model
from mlxqwen.sampling.params import SamplingParams
from mlxqwen.sampling.sampler import Sampler
from tests.conftest import CONTEXT, VOCAB_SIZE
from tests.one_layer_cache import (
    ATTENTION_TOLERANCE,
    KV_BITS,
    attend,
    expected,
    new_cache,
    placements,
    random_tokens,
)
from tests.reference_attention import Floats
from tests.scheduling import asked, own_scheduler
from tests.test_generation import GREEDY, IDS, PROMPT, SEEDED, by_the_book, calls
from tests.tolerance import worst

__all__ = ["calls"]  # a fixture


# Caches


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_rows_of_several_caches_go_on_as_alone(data: st.DataObject) -> None:
    """Prefilled apart to any offsets, put together in any order, and then fed in steps of any lengths."""
    window, keep = data.draw(placements())
    kv_bits = data.draw(st.sampled_from(KV_BITS))
    total = 30
    rows = [random_tokens(total, seed=seed) for seed in range(4)]
    found: list[list[Floats]] = [[] for _ in rows]

    def feed(cache: KVCache, numbers: Sequence[int], length: int, lengths: Sequence[int]) -> None:
        spans = [(start, start + count) for start, count in zip(cache.offsets, lengths, strict=True)]
        for number, part in zip(numbers, attend(cache, [rows[n] for n in numbers], spans, length), strict=True):
            found[number].append(part)

    caches = [new_cache(max_kv_size=window, keep=keep, kv_bits=kv_bits, batch_size=2) for _ in range(2)]
    for place, cache in enumerate(caches):
        lengths = data.draw(st.lists(st.integers(0, 12), min_size=2, max_size=2))
        if any(lengths):
            feed(cache, [2 * place, 2 * place + 1], max(lengths), lengths)
    order = data.draw(st.permutations(range(4)).flatmap(lambda p: st.integers(1, 4).map(lambda n: p[:n])))
    caches[0].assemble([(caches[number // 2], [number % 2]) for number in order])
    for _ in range(data.draw(st.integers(0, 4))):
        length = data.draw(st.integers(1, 4))
        lengths = data.draw(st.lists(st.integers(0, length), min_size=len(order), max_size=len(order)))
        feed(caches[0], order, length, lengths)
    assert caches[0].batch_size == len(order)
    for number in order:
        output = np.concatenate(found[number], axis=1) if found[number] else np.zeros((4, 0, 32))
        queries, keys, values = (part[:, : output.shape[1]] for part in rows[number])
        alone = expected((queries, keys, values), window, keep, kv_bits) if output.shape[1] else queries
        assert worst(output, alone) <= ATTENTION_TOLERANCE[kv_bits]


def test_buffers_fit_the_longest_row(tiny: Qwen3ForCausalLM) -> None:
    long, short = make_cache(tiny), make_cache(tiny)
    tiny(mx.array([[1] * 300]), long)
    tiny(mx.array([[2] * 5]), short)
    alone = short.nbytes
    short.assemble([(short, [0]), (long, [0])])
    assert short.offsets == (5, 300)
    assert short.nbytes == 2 * long.nbytes
    short.keep_rows([0])
    assert short.nbytes == alone


def test_putting_rows_together_takes_one_layer_more(tiny: Qwen3ForCausalLM) -> None:
    caches = [make_cache(tiny, batch_size=4) for _ in range(2)]
    for cache in caches:
        mx.eval(tiny(mx.ones((4, 300), dtype=mx.int32), cache), cache.state)
    whole = 2 * caches[0].nbytes
    layer = whole // len(caches[0])
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    cache = caches.pop(0)
    cache.assemble([(cache, [0, 1, 2, 3]), (caches.pop(), [0, 1, 2, 3])])
    assert mx.get_peak_memory() - before <= whole // 2 + layer
    assert cache.nbytes == whole


def test_only_rows_of_the_same_kind_of_cache_join(tiny: Qwen3ForCausalLM, model: Qwen3ForCausalLM) -> None:
    cache = make_cache(tiny)
    others = [make_cache(tiny, kv_bits=8), make_cache(tiny, max_kv_size=9), make_cache(model)]
    for other in others:
        with pytest.raises(CacheError, match="another kind"):
            cache.assemble([(cache, [0]), (other, [0])])
    wrong: list[Any] = [[], [(cache, [])], [(cache, [1])], [(cache, [-1])], [(cache, [0.0])]]
    for parts in wrong:
        with pytest.raises(CacheError, match="cannot go on with"):
            cache.assemble(parts)
    assert cache.offsets == (0,)


# Samplers


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_joined_rows_are_drawn_for_as_alone(data: st.DataObject) -> None:
    """Rows come and go at any time; each draws what its own sampler draws, penalties and forced tokens included."""
    random = np.random.default_rng(data.draw(st.integers(0, 99)))
    together = Sampler([], [], VOCAB_SIZE)
    alone: list[Sampler] = []
    for _ in range(data.draw(st.integers(1, 6))):
        for params in data.draw(st.lists(st.lists(SEEDED, min_size=1, max_size=2), max_size=2)):
            prompts = [data.draw(PROMPT) for _ in params]
            together.join([Sampler(params, prompts, VOCAB_SIZE)])
            alone += [Sampler([one], [prompt], VOCAB_SIZE) for one, prompt in zip(params, prompts, strict=True)]
        for _ in range(data.draw(st.integers(0, 3)) if alone else 0):
            logits = mx.array(random.normal(size=(len(alone), VOCAB_SIZE)) * 2)
            drawn = together(logits)
            assert drawn.tolist() == [one(row[None]).item() for one, row in zip(alone, logits, strict=True)]
            if data.draw(st.booleans()):
                others = (drawn + 1) % VOCAB_SIZE
                together.replace(drawn, others)
                for place, one in enumerate(alone):
                    one.replace(drawn[place : place + 1], others[place : place + 1])
        going = [place for place in range(len(alone)) if data.draw(st.booleans())]
        together.keep_rows(going)
        alone = [alone[place] for place in going]


def test_what_a_row_remembers_leaves_with_it() -> None:
    """The width of what is penalised is that of the rows that are there, not of all that have been."""
    params = SamplingParams(temperature=0, presence_penalty=1.0, repetition_penalty=1.2)
    sampler = Sampler([params], [list(range(50))], VOCAB_SIZE)
    for _ in range(3):
        sampler.join([Sampler([params], [[1, 2]], VOCAB_SIZE)])
        for _ in range(5):
            sampler(mx.random.normal((2, VOCAB_SIZE)))
        sampler.keep_rows([1])
    (group,) = sampler._groups
    assert group._history._touched.shape == (1, 2 + 5)


def test_samplers_of_one_vocabulary() -> None:
    with pytest.raises(OptionError, match="vocabulary of 9, expected 97"):
        Sampler([], [], VOCAB_SIZE).join([Sampler([GREEDY], [[1]], 9)])


# Streams


def run(stream: TokenStream, arrivals: dict[int, list[Request]]) -> dict[int, list[int]]:
    """All tokens by row; `arrivals` says which requests are added when so many tokens have been told."""
    rows: dict[int, list[int]] = defaultdict(list)
    for told, (row, one) in enumerate(stream):
        rows[row].append(one.token)
        for request in arrivals.get(told, []):
            assert stream.submit(request) not in rows
    return rows


@settings(max_examples=25, deadline=None)
@given(
    prompts=st.lists(PROMPT, min_size=2, max_size=6),
    params=st.lists(SEEDED, min_size=6, max_size=6),
    counts=st.lists(st.integers(1, 8), min_size=6, max_size=6),
    times=st.lists(st.integers(0, 9), min_size=6, max_size=6),
    first=st.integers(1, 3),
    ends=st.sets(IDS, max_size=10),
    chunk=st.integers(1, 60),
    is_gpu=st.booleans(),
)
def test_rows_that_join_get_what_they_would_get_alone(
    tiny: Qwen3ForCausalLM,
    prompts: list[list[int]],
    params: list[SamplingParams],
    counts: list[int],
    times: list[int],
    first: int,
    ends: set[int],
    chunk: int,
    is_gpu: bool,
) -> None:
    first = min(first, len(prompts))
    rows = list(zip(prompts, params, counts, strict=False))
    arrivals: dict[int, list[Any]] = defaultdict(list)
    order = list(range(first))
    options: Any = {"end_token_ids": frozenset(ends), "prefill_chunk": chunk}
    for time, row in sorted(zip(times, range(first, len(rows)), strict=False)):
        prompt, one, count = rows[row]
        arrivals[time].append(asked(prompt, count, sampling=one, **options))
        order.append(row)
    with own_scheduler(tiny, is_gpu=is_gpu):
        stream = generate_tokens(
            tiny,
            prompts[:first],
            sampling=params[:first],
            max_tokens=counts[:first],
            eos_token_ids=ends,
            prefill_chunk=chunk,
        )
        found = run(stream, arrivals)
    for number in found:
        prompt, one, count = rows[order[number]]
        assert found[number] == by_the_book(tiny, prompt, one, count, ends)


@settings(max_examples=15, deadline=None)
@given(
    prompts=st.lists(st.lists(IDS, min_size=1, max_size=40), min_size=2, max_size=4),
    window=st.sampled_from([None, 7, 16]),
    kv_bits=st.sampled_from([None, 8, 4]),
    chunk=st.integers(3, 60),
    time=st.integers(0, 16),
    is_gpu=st.booleans(),
)
def test_rows_join_rings_and_quantized_caches(
    tiny: Qwen3ForCausalLM,
    prompts: list[list[int]],
    window: int | None,
    kv_bits: int | None,
    chunk: int,
    time: int,
    is_gpu: bool,
) -> None:
    params = SamplingParams(seed=4, top_k=10)

    def whole(first: list[int], *others: list[int]) -> dict[int, list[int]]:
        cache = make_cache(tiny, max_kv_size=window, keep=2, kv_bits=kv_bits, kv_group_size=32)
        options: Any = {"sampling": params, "cache": cache, "prefill_chunk": chunk}
        stream = generate_tokens(tiny, first, max_tokens=12, **options)
        return run(stream, {time: [asked(prompt, 12, cache_row=None, **options) for prompt in others]})

    with own_scheduler(tiny, is_gpu=is_gpu):
        for number, tokens in whole(*prompts).items():
            assert tokens == whole(prompts[number])[0]


def test_the_cache_of_a_conversation_takes_rows_in(tiny: Qwen3ForCausalLM) -> None:
    """Rows begun in a cache that holds something, and one that is added before anything has run."""
    cache = make_cache(tiny, batch_size=2)
    list(generate_tokens(tiny, [[1, 2, 3], [4, 5]], cache=cache, max_tokens=1))
    options: Any = {"sampling": GREEDY, "prefill_chunk": 40, "cache": cache}
    stream = generate_tokens(tiny, [[6], [7] * 19], max_tokens=4, **options)
    stream.submit(asked([8, 9], 4, cache_row=None, **options))
    rows = run(stream, {})
    whole = [[1, 2, 3, 6], [4, 5, *[7] * 19], [8, 9]]
    assert [rows[n] for n in range(3)] == [by_the_book(tiny, prompt, GREEDY, 4) for prompt in whole]
    assert cache.offsets == tuple(len(prompt) + 3 for prompt in whole)


@pytest.mark.parametrize("chunk", [3, 100])
def test_rows_that_end_before_others_leave_the_callers_cache(tiny: Qwen3ForCausalLM, chunk: int) -> None:
    """Also where one has ended before another is read."""
    cache = make_cache(tiny, batch_size=2)
    stream = generate_tokens(
        tiny, [[1, 2], [3] * 9], cache=cache, sampling=GREEDY, max_tokens=[2, 6], prefill_chunk=chunk
    )
    rows = run(stream, {})
    assert [rows[n] for n in range(2)] == [
        by_the_book(tiny, [1, 2], GREEDY, 2),
        by_the_book(tiny, [3] * 9, GREEDY, 6),
    ]
    assert cache.offsets == (9 + 5,)


def test_rows_join_at_the_next_step_and_leave_at_once(tiny: Qwen3ForCausalLM, calls: list[tuple[int, ...]]) -> None:
    stream = generate_tokens(tiny, [[1, 2], [3, 4]], sampling=GREEDY, max_tokens=[5, 2])
    seen = []
    for row, one in stream:
        seen.append((row, one.finish_reason))
        if len(seen) == 2:
            stream.submit(asked([5] * 7, 2))
    assert calls == [(2, 2), (2, 1), (1, 7), (2, 1), (1, 1), (1, 1)]
    assert [row for row, _ in seen] == [0, 1, 0, 1, 2, 0, 2, 0, 0]


def test_a_row_may_join_as_the_last_one_ends(tiny: Qwen3ForCausalLM, calls: list[tuple[int, ...]]) -> None:
    stream = generate_tokens(tiny, [1, 2], sampling=GREEDY, max_tokens=1)
    rows = run(stream, {0: [asked([3, 4, 5], 2), asked([6], 1)]})
    assert [len(rows[number]) for number in range(3)] == [1, 2, 1]
    assert calls == [(1, 2), (2, 3), (1, 1)]


def test_a_row_that_is_stopped_before_it_joins_is_not_read(
    tiny: Qwen3ForCausalLM, calls: list[tuple[int, ...]]
) -> None:
    stream = generate_tokens(tiny, [1, 2], sampling=GREEDY, max_tokens=2)
    next(stream)
    stream.stop(stream.submit(asked([3, 4, 5])))
    assert [row for row, _ in stream] == [0]
    assert calls == [(1, 2), (1, 1)]


def test_what_cannot_join(tiny: Qwen3ForCausalLM) -> None:
    """Others go on, those that were added with it among them."""
    stream = generate_tokens(tiny, [1, 2], sampling=GREEDY, max_tokens=3)
    rows: dict[int, list[int]] = defaultdict(list)

    def take() -> None:
        row, one = next(stream)
        rows[row].append(one.token)

    take()
    stream.submit(asked([7], 4))
    wrong: list[tuple[Request, type[Exception]]] = [
        (asked([VOCAB_SIZE]), OptionError),
        (asked([1], sampling=SamplingParams(logit_bias={VOCAB_SIZE: 1.0})), OptionError),
        (asked([1] * CONTEXT), ContextLengthError),
        (asked([1], cached_tokens=1), OptionError),
    ]
    for request, _ in wrong:
        stream.submit(request)
    stream.submit(asked([8], 4))
    for _, error in wrong:
        with pytest.raises(error):
            take()
    for _ in range(2 + 4 + 4):
        take()
    assert next(stream, None) is None
    assert [rows[0], rows[1], rows[6]] == [
        by_the_book(tiny, prompt, GREEDY, count) for prompt, count in (([1, 2], 3), ([7], 4), ([8], 4))
    ]
    with pytest.raises(OptionError, match="over"):
        stream.submit(asked([1]))
    closed = generate_tokens(tiny, [1, 2])
    closed.close()
    with pytest.raises(OptionError, match="over"):
        closed.submit(asked([1]))


def test_a_stream_that_runs_for_hours_keeps_nothing_of_rows_that_are_gone(tiny: Qwen3ForCausalLM) -> None:
    params = SamplingParams(temperature=0, presence_penalty=1.0, repetition_penalty=1.1)
    stream = generate_tokens(tiny, [[1] * 9] * 2, sampling=params, max_tokens=2)
    held: list[int] = []
    for _, one in stream:
        if one.finish_reason and len(held) < 40:
            stream.submit(asked([one.token] * 9, 2, sampling=params))
            mx.synchronize()
            mx.clear_cache()
            held.append(mx.get_active_memory())
    assert max(held[20:]) <= max(held[4:20]) + 4096  # buffers that are used again may be larger than what they hold


def test_rows_that_are_stopped_before_they_join_leave_nothing(
    tiny: Qwen3ForCausalLM, calls: list[tuple[int, ...]]
) -> None:
    params = SamplingParams(temperature=0, repetition_penalty=1.1)
    stream = generate_tokens(tiny, [1, 2], sampling=params, max_tokens=12)

    def come_and_go() -> int:
        """Bytes that are held after a step in which many rows were added and stopped."""
        for number in [stream.submit(asked([1] * 9, sampling=params)) for _ in range(50)]:
            stream.stop(number)
            stream.stop(number)
        next(stream)
        mx.synchronize()
        mx.clear_cache()
        return mx.get_active_memory()

    next(stream)
    held = [come_and_go() for _ in range(8)]
    assert max(held[1:]) <= held[0] + 4096
    assert stream.submit(asked([1] * 9, 1)) == 401
    assert [row for row, _ in stream] == [0, 401, 0, 0]
    assert calls == [(1, 2), *[(1, 1)] * 9, (1, 9), (1, 1), (1, 1)]
    assert not stream._requests
    assert not stream._handles


@pytest.mark.parametrize("row", [-1, 1])
def test_rows_that_are_not_there_are_not_stopped(tiny: Qwen3ForCausalLM, row: int) -> None:
    stream = generate_tokens(tiny, [1, 2], max_tokens=2)
    with pytest.raises(OptionError, match=f"^stop: found row {row}, expected a row from 0 to 0"):
        stream.stop(row)
    assert len(list(stream)) == 2


# What is fed through the model


@settings(max_examples=25, deadline=None)
@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=8), chunk=st.integers(1, 200))
def test_no_prompt_pays_for_the_padding_of_a_longer_one(tiny: Qwen3ForCausalLM, lengths: list[int], chunk: int) -> None:
    shapes: list[tuple[int, ...]] = []
    step = Qwen3Model.__call__

    def recorded(self: Qwen3Model, tokens: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        shapes.append(tokens.shape)
        return step(self, tokens, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Qwen3Model, "__call__", recorded)
        with own_scheduler(tiny):
            list(generate_tokens(tiny, [[1] * length for length in lengths], max_tokens=1, prefill_chunk=chunk))
    fed = [rows * tokens for rows, tokens in shapes]
    assert max(fed) <= chunk
    assert sum(fed) <= sum(length + max(16, length // 4) for length in lengths)


def test_prompts_of_about_one_length_are_read_together(tiny: Qwen3ForCausalLM, calls: list[tuple[int, ...]]) -> None:
    lengths = [40, 3, 42, 9, 44, 60]
    with own_scheduler(tiny):
        list(generate_tokens(tiny, [[1] * length for length in lengths], max_tokens=1))
    assert sorted(calls) == [(1, 60), (2, 9), (3, 44)]
