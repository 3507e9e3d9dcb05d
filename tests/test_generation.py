"""Tokens in, tokens out: against a loop that knows no cache, no chunks and no batches."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from itertools import pairwise, product
from typing import Any, cast

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxqwen.cache import KVCache, make_cache
from mlxqwen.device import Device
from mlxqwen.engine.generation import GeneratedToken
from mlxqwen.engine.memory import buffer_bytes
from mlxqwen.engine.request import CacheKind, fitting_prefill_chunk
from mlxqwen.engine.token_stream import TokenStream, generate_tokens
from mlxqwen.errors import CacheError, ContextLengthError, GenerationError, OptionError
from mlxqwen.files.config import ModelConfig
from mlxqwen.model.qwen3 import Qwen3ForCausalLM, Qwen3Model
from mlxqwen.sampling.params import SamplingParams
from mlxqwen.sampling.sampler import Sampler, token_logprobs
from tests.conftest import CONTEXT, VOCAB_SIZE, random_model
from tests.scheduling import Forced, ForcedUnless, asked, constrained, ids, machine, new_scheduler, own_scheduler, taken
from tests.sparse_checkpoints import RELEASES

GREEDY = SamplingParams(temperature=0)

IDS = st.integers(0, VOCAB_SIZE - 1)
PROMPT = st.lists(IDS, min_size=1, max_size=20)
SEEDED = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 1.0, 2.0]),
    top_k=st.sampled_from([0, 5]),
    presence_penalty=st.sampled_from([0.0, 2.0]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    seed=st.integers(0, 2**64 - 1),
)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shape `(rows, tokens)` of each step that the model takes from here on."""
    shapes: list[tuple[int, ...]] = []
    step = Qwen3Model.__call__

    def recorded(self: Qwen3Model, tokens: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        shapes.append(tokens.shape)
        return step(self, tokens, *args, **kwargs)

    monkeypatch.setattr(Qwen3Model, "__call__", recorded)
    return shapes


def by_the_book(
    model: Qwen3ForCausalLM, prompt: Sequence[int], params: SamplingParams, count: int, ends: Collection[int] = ()
) -> list[int]:
    """The whole text through the model for every token."""
    sampler = Sampler([params], [prompt], VOCAB_SIZE)
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(cast(int, sampler(model(mx.array([tokens]))[:, -1]).item()))
        if tokens[-1] in ends:
            break
    return tokens[len(prompt) :]


def rows_of(generated: Iterable[tuple[int, GeneratedToken]]) -> list[list[int]]:
    rows: dict[int, list[int]] = defaultdict(list)
    for row, one in generated:
        rows[row].append(one.token)
    return [rows[row] for row in sorted(rows)]


def told(generated: Iterable[tuple[int, GeneratedToken]]) -> list[tuple[int, str | None]]:
    return [(one.token, one.finish_reason) for _, one in generated]


def row_of(generated: Iterable[tuple[int, GeneratedToken]]) -> list[int]:
    (row,) = rows_of(generated)
    return row


@settings(max_examples=15, deadline=None)
@given(prompt=PROMPT, params=SEEDED, chunk=st.integers(1, 25), count=st.integers(1, 12))
def test_one_prompt_in_chunks_of_any_size(
    tiny: Qwen3ForCausalLM, prompt: list[int], params: SamplingParams, chunk: int, count: int
) -> None:
    stream = generate_tokens(tiny, prompt, sampling=params, max_tokens=count, prefill_chunk=chunk)
    assert row_of(stream) == by_the_book(tiny, prompt, params, count)


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(
    prompts=st.lists(PROMPT, min_size=1, max_size=4),
    params=st.lists(SEEDED, min_size=4, max_size=4),
    ends=st.sets(IDS, max_size=20),
    chunk=st.integers(1, 25),
    is_gpu=st.booleans(),
)
def test_every_row_gets_what_it_would_get_alone(
    tiny: Qwen3ForCausalLM,
    prompts: list[list[int]],
    params: list[SamplingParams],
    ends: set[int],
    chunk: int,
    is_gpu: bool,
) -> None:
    params = params[: len(prompts)]
    with own_scheduler(tiny, is_gpu=is_gpu):
        stream = generate_tokens(tiny, prompts, sampling=params, max_tokens=6, eos_token_ids=ends, prefill_chunk=chunk)
        found = rows_of(stream)
    assert found == [by_the_book(tiny, prompt, one, 6, ends) for prompt, one in zip(prompts, params, strict=True)]


@settings(max_examples=12, deadline=None)
@given(
    prompts=st.lists(PROMPT, min_size=2, max_size=4),
    window=st.sampled_from([None, 7, 16]),
    kv_bits=st.sampled_from([None, 8, 4]),
    ends=st.sets(IDS, max_size=10),
    chunk=st.integers(3, 25),
    seed=st.integers(0, 1000),
    is_gpu=st.booleans(),
)
def test_rows_of_rings_and_quantized_caches(
    tiny: Qwen3ForCausalLM,
    prompts: list[list[int]],
    window: int | None,
    kv_bits: int | None,
    ends: set[int],
    chunk: int,
    seed: int,
    is_gpu: bool,
) -> None:
    def run(prompts: list[list[int]]) -> list[list[int]]:
        cache = make_cache(tiny, max_kv_size=window, keep=2, kv_bits=kv_bits, kv_group_size=32, batch_size=len(prompts))
        params = SamplingParams(seed=seed, top_k=10)
        return rows_of(
            generate_tokens(
                tiny,
                prompts,
                sampling=params,
                max_tokens=12,
                eos_token_ids=ends,
                cache=cache,
                prefill_chunk=chunk,
            )
        )

    with own_scheduler(tiny, is_gpu=is_gpu):
        assert run(prompts) == [row for prompt in prompts for row in run([prompt])]


@pytest.mark.parametrize(("length", "chunk"), [(1, 1), (1, 9), (7, 1), (7, 3), (7, 7), (9, 3), (9, 512)])
@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("is_gpu", [False, True])
def test_no_step_is_wasted_at_the_length_limit(
    tiny: Qwen3ForCausalLM,
    calls: list[tuple[int, ...]],
    length: int,
    chunk: int,
    count: int,
    is_gpu: bool,
) -> None:
    with own_scheduler(tiny, is_gpu=is_gpu):
        stream = generate_tokens(tiny, list(range(length)), sampling=GREEDY, max_tokens=count, prefill_chunk=chunk)
        assert calls == []
        tokens = [one for _, one in stream]
    assert [one.finish_reason for one in tokens] == [None] * (count - 1) + ["length"]
    prefill = [(1, min(chunk, length - start)) for start in range(0, length, chunk)]
    assert calls == prefill + [(1, 1)] * (count - 1)


@pytest.mark.parametrize(("ended_by", "is_gpu"), [*product(["end token", "stop", "close"], [False, True])])
@pytest.mark.parametrize("count", [1, 4])
def test_one_step_at_most_is_wasted_at_an_early_end(
    tiny: Qwen3ForCausalLM, calls: list[tuple[int, ...]], ended_by: str, count: int, is_gpu: bool
) -> None:
    """None behind an end token on a processor; behind a stop the next one has begun, as tokens are told ahead of it."""
    params = SamplingParams(temperature=2.0, seed=3, presence_penalty=2.0)
    expected = by_the_book(tiny, [5, 6, 7], params, count)
    assert expected[-1] not in expected[:-1]
    calls.clear()
    ends = expected[-1:] if ended_by == "end token" else []
    with own_scheduler(tiny, is_gpu=is_gpu) as scheduler:
        stream = generate_tokens(tiny, [5, 6, 7], sampling=params, eos_token_ids=ends)
        tokens = []
        for _, one in stream:
            tokens.append(one.token)
            if ended_by != "end token" and len(tokens) == count:
                stream.stop(0) if ended_by == "stop" else stream.close()
        assert not scheduler.step()
    assert tokens == expected
    assert calls == [(1, 3)] + [(1, 1)] * (count - 1 + (ended_by != "end token" or is_gpu))


def test_ended_rows_leave_the_batch(tiny: Qwen3ForCausalLM, calls: list[tuple[int, ...]]) -> None:
    prompts = [[n, n + 1] for n in range(6)]
    params = [SamplingParams(temperature=2.0, seed=n) for n in range(6)]
    ends = range(0, VOCAB_SIZE, 6)
    rows: list[list[int]] = [[] for _ in prompts]
    with own_scheduler(tiny):
        stream = generate_tokens(tiny, prompts, sampling=params, eos_token_ids=ends, max_tokens=12)
        for row, one in stream:
            rows[row].append(one.token)
            if row == 2 and len(rows[2]) == 2:
                stream.stop(2)
    lengths = [len(row) for row in rows]
    assert len(set(lengths)) > 2
    lengths[2] += 1  # its next token was on its way
    still_going = [sum(length > step for length in lengths) for step in range(1, max(lengths))]
    assert calls == [(6, 2), *((count, 1) for count in still_going)]


def test_tokens_come_in_order_of_rows_and_none_after_a_stop(tiny: Qwen3ForCausalLM) -> None:
    stream = generate_tokens(tiny, [[1], [2], [3]], sampling=GREEDY, max_tokens=3)
    seen = []
    for row, _ in stream:
        seen.append(row)
        stream.stop(1)
    assert seen == [0, 2, 0, 2, 0, 2]
    assert next(stream, None) is None


@pytest.mark.parametrize("lengths", [[1], [7], [3, 7, 1]])
@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_prefill_tells_how_far_each_prompt_is(tiny: Qwen3ForCausalLM, lengths: list[int], chunk: int) -> None:
    told: dict[int, list[int]] = defaultdict(list)
    prompts = [[1] * length for length in lengths]
    stream = generate_tokens(
        tiny, prompts, max_tokens=1, prefill_chunk=chunk, on_prefill=lambda done, total: told[total].append(done)
    )
    list(stream)
    assert sorted(told) == sorted(lengths)
    for length, done in told.items():
        assert (done[0], done[-1]) == (0, length)
        assert all(0 < after - before <= chunk for before, after in pairwise(done))
        if len(lengths) == 1:
            assert done == [*range(0, length, chunk), length]


def test_the_context_bounds_each_row_by_itself(tiny: Qwen3ForCausalLM) -> None:
    prompts = [[1] * (CONTEXT - 3), [2] * (CONTEXT - 1), [3]]
    tokens = list(generate_tokens(tiny, prompts, sampling=GREEDY, max_tokens=20))
    assert [len(row) for row in rows_of(tokens)] == [3, 1, 20]
    assert [row for row, one in tokens if one.finish_reason == "length"] == [1, 0, 2]


def test_a_prompt_longer_than_the_context(tiny: Qwen3ForCausalLM, calls: list[tuple[int, ...]]) -> None:
    for length in (CONTEXT, 1000 + CONTEXT):
        with pytest.raises(ContextLengthError, match=rf"{length:,} tokens.*context of {CONTEXT}") as caught:
            generate_tokens(tiny, [[1], [1] * length])
        for way_out in ("--yarn-factor", "yarn_factor=", "--max-kv-size", "max_kv_size="):
            assert way_out in caught.value.hint
    used = make_cache(tiny)
    list(generate_tokens(tiny, [1] * 10, cache=used, max_tokens=1))
    with pytest.raises(ContextLengthError, match=f"{CONTEXT} tokens"):
        generate_tokens(tiny, [1] * (CONTEXT - 10), cache=used)
    assert calls == [(1, 10)]


def test_a_ring_slides_past_the_context(tiny: Qwen3ForCausalLM) -> None:
    ring = make_cache(tiny, max_kv_size=32)
    prompt = [n % VOCAB_SIZE for n in range(2 * CONTEXT)]
    assert len(row_of(generate_tokens(tiny, prompt, cache=ring, max_tokens=CONTEXT))) == CONTEXT


@settings(max_examples=15, deadline=None)
@given(
    prompts=st.lists(PROMPT, min_size=1, max_size=3),
    more=st.lists(IDS, max_size=5),
    window=st.sampled_from([None, 9]),
    first=st.integers(1, 6),
)
def test_going_on_with_a_used_cache(
    tiny: Qwen3ForCausalLM, prompts: list[list[int]], more: list[int], window: int | None, first: int
) -> None:
    def cache(rows: int) -> Any:
        return make_cache(tiny, max_kv_size=window, keep=1, batch_size=rows)

    used = cache(len(prompts))
    begun = rows_of(generate_tokens(tiny, prompts, sampling=GREEDY, max_tokens=first, cache=used))
    assert used.offsets == tuple(len(prompt) + first - 1 for prompt in prompts)
    turns = [[row[-1], *more] for row in begun]
    continued = rows_of(generate_tokens(tiny, turns, sampling=GREEDY, max_tokens=5, cache=used))
    whole = [prompt + row + more for prompt, row in zip(prompts, begun, strict=True)]
    assert continued == rows_of(
        generate_tokens(tiny, whole, sampling=GREEDY, max_tokens=5, cache=cache(len(prompts)), prefill_chunk=3)
    )


@pytest.mark.parametrize(("is_gpu", "extra"), [(False, 0), (True, 1)])
def test_what_the_cache_holds_in_the_end(tiny: Qwen3ForCausalLM, is_gpu: bool, extra: int) -> None:
    (first,) = by_the_book(tiny, [1, 2, 3], GREEDY, 1)
    for ends, count, held in (([], 4, 6), ([first], 1, 3 + extra)):
        cache = make_cache(tiny)
        with own_scheduler(tiny, is_gpu=is_gpu):
            stream = generate_tokens(tiny, [1, 2, 3], sampling=GREEDY, max_tokens=4, eos_token_ids=ends, cache=cache)
            assert len(list(stream)) == count
        assert cache.offsets == (held,)


def test_arrays_are_prompts_too(tiny: Qwen3ForCausalLM) -> None:
    one = row_of(generate_tokens(tiny, [4, 5], sampling=GREEDY, max_tokens=4))
    prompts: list[Any] = [(4, 5), range(4, 6), mx.array([4, 5]), mx.array([[4, 5]], dtype=mx.uint32), np.array([4, 5])]
    for prompt in prompts:
        assert row_of(generate_tokens(tiny, prompt, sampling=GREEDY, max_tokens=4)) == one
    pairs: list[Any] = [mx.array([[4, 5], [4, 5]]), [mx.array([4, 5]), [4, 5]]]
    for pair in pairs:
        assert rows_of(generate_tokens(tiny, pair, sampling=GREEDY, max_tokens=4)) == [one, one]


@pytest.mark.parametrize(
    "prompts",
    [
        [],
        [[]],
        [[1], []],
        [[[1]]],
        [1, [2]],
        [[1], 2],
        [-1],
        [VOCAB_SIZE],
        [2**70],
        [True],
        [1.0],
        [None],
        ["a"],
        [b"ab"],
        "text",
        b"bytes",
        "",
        None,
        3,
        {1: 2},
        mx.array([]),
        mx.array(3),
        mx.array([1.5]),
        mx.array([[[1]]]),
    ],
    ids=str,
)
def test_what_is_no_prompt(tiny: Qwen3ForCausalLM, calls: list[tuple[int, ...]], prompts: Any) -> None:
    with pytest.raises(OptionError, match="prompt"):
        generate_tokens(tiny, prompts)
    assert calls == []


@pytest.mark.parametrize(
    ("option", "values"),
    [
        ("max_tokens", [0, -1, 1.5, True, "3", [None, 0]]),
        ("prefill_chunk", [0, -1, 1.5, False]),
        ("sampling", [{"temperature": 0}, "greedy", [], [GREEDY, GREEDY]]),
    ],
)
def test_options_out_of_range(
    tiny: Qwen3ForCausalLM, calls: list[tuple[int, ...]], option: str, values: list[Any]
) -> None:
    for value in values:
        with pytest.raises(OptionError, match=option):
            generate_tokens(tiny, [1], **{option: value})
    assert calls == []


def test_a_cache_of_other_rows(tiny: Qwen3ForCausalLM, calls: list[tuple[int, ...]]) -> None:
    with pytest.raises(CacheError, match="2 rows, found 1"):
        generate_tokens(tiny, [1], cache=make_cache(tiny, batch_size=2))
    assert calls == []


def test_a_cache_of_another_model(
    tiny: Qwen3ForCausalLM, model: Qwen3ForCausalLM, calls: list[tuple[int, ...]]
) -> None:
    with pytest.raises(CacheError, match="another model"):
        generate_tokens(tiny, [1], cache=make_cache(model))
    assert calls == []


@pytest.mark.parametrize("params", [GREEDY, SamplingParams(), SamplingParams(top_k=20, top_p=0.9, min_p=0.1)])
def test_damaged_weights_stop_the_first_step(calls: list[tuple[int, ...]], params: SamplingParams) -> None:
    damaged = random_model()
    damaged.model.norm.weight = damaged.model.norm.weight * mx.nan
    stream = generate_tokens(damaged, [[1, 2], [3]], sampling=params)
    for _ in range(2):  # each row fails by itself
        with pytest.raises(GenerationError, match="NaN"):
            next(stream)
    assert calls == [(2, 2)] * len(calls)
    assert len(calls) <= 2
    assert next(stream, None) is None


def test_end_tokens_of_the_configuration(model: Qwen3ForCausalLM) -> None:
    (end, *_) = model.config.eos_token_ids
    always_end = SamplingParams(logit_bias={end: 100.0})
    assert told(generate_tokens(model, [1, 2], sampling=always_end)) == [(end, "stop")]
    ended = generate_tokens(model, [1, 2], sampling=always_end, eos_token_ids=[], max_tokens=2)
    assert told(ended) == [(end, None), (end, "length")]


def test_without_a_seed_rows_differ(tiny: Qwen3ForCausalLM) -> None:
    stream: TokenStream = generate_tokens(tiny, [[1]] * 3, sampling=SamplingParams(temperature=100.0), max_tokens=20)
    assert len({tuple(row) for row in rows_of(stream)}) == 3


def test_buffers_that_the_cache_outgrew_are_given_back() -> None:
    model = random_model(context=2048)
    stream = generate_tokens(model, [1] * 250, sampling=SamplingParams(temperature=0), max_tokens=800)
    mx.clear_cache()
    for _ in stream:
        pass
    assert mx.get_cache_memory() <= 2 * buffer_bytes(model, CacheKind(), 1050)


def test_a_window_wider_than_the_context_does_not_lift_it() -> None:
    model = random_model(context=64)
    with pytest.raises(ContextLengthError, match="64"):
        generate_tokens(model, [1] * 64, cache=make_cache(model, max_kv_size=65))
    stream = generate_tokens(model, [1] * 60, cache=make_cache(model, max_kv_size=65), max_tokens=10)
    assert len(list(stream)) == 4
    assert len(list(generate_tokens(model, [1] * 70, cache=make_cache(model, max_kv_size=64), max_tokens=10))) == 10


def test_a_cache_is_a_cache() -> None:
    with pytest.raises(OptionError, match="make_cache"):
        generate_tokens(random_model(), [1], cache=cast(KVCache, []))


# Forced tokens

DETERMINED = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 1.0]),
    top_k=st.just(1),
    presence_penalty=st.sampled_from([0.0, 2.0]),
    frequency_penalty=st.sampled_from([0.0, 2.0]),
    repetition_penalty=st.sampled_from([1.0, 3.0]),
)
UNPENALISED = st.builds(SamplingParams, temperature=st.just(2.0), seed=st.integers(0, 1000))


def forced_by_the_book(
    model: Qwen3ForCausalLM,
    prompt: list[int],
    params: SamplingParams,
    count: int,
    ends: Collection[int],
    after: int,
    forced: list[int],
) -> list[int]:
    """Like `by_the_book`, but `forced` stands behind the first `after` tokens; penalties are those of the text."""
    sampler = Sampler([dataclasses.replace(params, presence_penalty=0, repetition_penalty=1)], [prompt], VOCAB_SIZE)
    reply: list[int] = []
    while len(reply) < count and not (reply and reply[-1] in ends):
        logits = model(mx.array([prompt + reply]))[0, -1]
        drawn = cast(int, sampler(logits[None]).item())
        if params.top_k == 1:
            drawn = cast(int, mx.argmax(token_logprobs(logits, params, prompt, reply)).item())
        reply.append(forced[len(reply) - after] if after <= len(reply) < after + len(forced) else drawn)
    return reply


@settings(max_examples=20, deadline=None)
@given(
    prompts=st.lists(PROMPT, min_size=1, max_size=4),
    params=st.lists(DETERMINED | UNPENALISED, min_size=4, max_size=4),
    forced=st.lists(st.tuples(st.integers(0, 6), st.lists(IDS, max_size=5)), min_size=4, max_size=4),
    ends=st.sets(IDS, max_size=8),
    is_gpu=st.booleans(),
)
def test_forced_tokens_in_every_row(
    tiny: Qwen3ForCausalLM,
    prompts: list[list[int]],
    params: list[SamplingParams],
    forced: list[tuple[int, list[int]]],
    ends: set[int],
    is_gpu: bool,
) -> None:
    rows = list(zip(prompts, params, forced, strict=False))
    with machine(tiny, 1 << 32, is_gpu=is_gpu):
        scheduler = new_scheduler(tiny)
        handles = [
            scheduler.submit(
                asked(prompt, 9, sampling=one, end_token_ids=frozenset(ends), constraints=forced_at(after, tokens))
            )
            for prompt, one, (after, tokens) in rows
        ]
        replies: list[list[GeneratedToken]] = [[] for _ in rows]
        while scheduler.step():
            for reply, handle in zip(replies, handles, strict=True):
                reply += taken(handle)
    assert [ids(reply) for reply in replies] == [
        forced_by_the_book(tiny, prompt, one, 9, ends, after, tokens) for prompt, one, (after, tokens) in rows
    ]
    for (after, tokens), reply in zip(forced, replies, strict=False):
        assert not any(one.is_forced for one in [*reply[:after], *reply[after + len(tokens) :]])


def forced_at(after: int, tokens: Sequence[int]) -> tuple[Any, ...]:
    return constrained(lambda: Forced({after + place: token for place, token in enumerate(tokens)}))


@pytest.mark.parametrize("is_gpu", [False, True])
def test_a_forced_end_token_ends(tiny: Qwen3ForCausalLM, is_gpu: bool) -> None:
    with machine(tiny, 1 << 32, is_gpu=is_gpu):
        scheduler = new_scheduler(tiny)
        common: dict[str, Any] = {"end_token_ids": frozenset([96])}
        handles = [
            scheduler.submit(asked([1], 4, **common)),
            scheduler.submit(asked([2], 4, constraints=forced_at(0, [5, 96, 7]), **common)),
        ]
        while scheduler.step():
            pass
    free, forced = map(taken, handles)
    assert [(one.token, one.finish_reason, one.is_forced) for one in forced] == [(5, None, True), (96, "stop", True)]
    assert ids(free) == by_the_book(tiny, [1], GREEDY, 4, [96])


@pytest.mark.parametrize("is_gpu", [False, True])
def test_forced_tokens_count_against_the_limit(
    tiny: Qwen3ForCausalLM, calls: list[tuple[int, ...]], is_gpu: bool
) -> None:
    with own_scheduler(tiny, is_gpu=is_gpu):
        forced = forced_at(0, [5, 6, 7, 8])
        stream = generate_tokens(tiny, [1], sampling=GREEDY, max_tokens=3, constraints=forced)
        assert told(stream) == [(5, None), (6, None), (7, "length")]
    # On a GPU each step was queued behind the token that was drawn, and is taken again.
    assert calls == [(1, 1)] * (5 if is_gpu else 3)


@pytest.mark.parametrize("is_gpu", [False, True])
def test_what_the_model_draws_itself_may_be_kept(tiny: Qwen3ForCausalLM, is_gpu: bool) -> None:
    plain = by_the_book(tiny, [3, 4], GREEDY, 6)
    for unless, expected in (
        ([plain[2]], plain),
        ([token for token in range(VOCAB_SIZE) if token != plain[2]], [*plain[:2], 50, 51]),
    ):
        with own_scheduler(tiny, is_gpu=is_gpu):
            constraints = constrained(lambda unless=unless: ForcedUnless(2, [50, 51], unless))  # type: ignore[misc]
            tokens = row_of(generate_tokens(tiny, [3, 4], sampling=GREEDY, max_tokens=6, constraints=constraints))
        assert tokens[: len(expected)] == expected


def test_damaged_weights_are_not_hidden_by_forced_tokens() -> None:
    damaged = random_model()
    damaged.model.norm.weight = damaged.model.norm.weight * mx.nan
    stream = generate_tokens(damaged, [1, 2], constraints=forced_at(0, [1]))
    with pytest.raises(GenerationError, match="NaN"):
        next(stream)


CPU = Device(name="a processor", is_gpu=False, memory=1 << 36, usable_memory=1 << 36)
GPU = dataclasses.replace(CPU, is_gpu=True)


@pytest.mark.parametrize("release", RELEASES)
def test_a_chunk_of_a_prompt_fits_the_work_space(release: str) -> None:
    config = ModelConfig.from_dict(RELEASES[release])
    chunk = fitting_prefill_chunk(config, CPU)
    assert 32 <= chunk <= 512
    assert chunk * config.hidden_size * 16 < 64 * 2**20
    if config.moe is None:
        assert chunk * (34 * config.num_attention_heads * config.head_dim + 11 * config.intermediate_size) < 64 * 2**20
    assert fitting_prefill_chunk(config, GPU) == 512


def test_wider_models_read_shorter_chunks() -> None:
    dense = [ModelConfig.from_dict(c) for c in RELEASES.values() if "num_experts" not in c]
    chunks = [fitting_prefill_chunk(c, CPU) for c in sorted(dense, key=lambda c: c.hidden_size * c.intermediate_size)]
    assert chunks == sorted(chunks, reverse=True)
    assert chunks[0] > chunks[-1]


def test_without_a_word_a_prompt_is_read_in_fitting_chunks(
    tiny: Qwen3ForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlxqwen.engine.scheduler.fitting_prefill_chunk", lambda config, device: 7)
    seen: list[int] = []
    real = Qwen3Model.__call__

    def counted(self: Qwen3Model, tokens: mx.array, *args: Any, **options: Any) -> mx.array:
        seen.append(tokens.shape[1])
        return real(self, tokens, *args, **options)

    monkeypatch.setattr(Qwen3Model, "__call__", counted)
    with own_scheduler(tiny):
        list(generate_tokens(tiny, list(range(18)), max_tokens=1))
    assert seen == [7, 7, 4]
