"""Speculative decoding: against plain decoding with the same seed, token by token."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_map

from mlxqwen.cache import KVCache, make_cache
from mlxqwen.engine.generation import GeneratedToken
from mlxqwen.engine.speculation.draft_model import DraftModel
from mlxqwen.engine.speculation.drafter import Drafter, DraftLength
from mlxqwen.engine.speculation.prompt_lookup import PromptLookup
from mlxqwen.engine.token_stream import TokenStream, generate_tokens
from mlxqwen.errors import CacheError, ContextLengthError, GenerationError, OptionError
from mlxqwen.model.qwen3 import Qwen3ForCausalLM, Qwen3Model
from mlxqwen.sampling.params import SamplingParams
from mlxqwen.sampling.sampler import Sampler
from tests.conftest import CONTEXT, VOCAB_SIZE, random_model
from tests.reference_sampling import assert_drawn_from, probabilities
from tests.scheduling import ForcedUnless, asked, constrained, own_scheduler, taken
from tests.tolerance import to_numpy, worst

GREEDY = SamplingParams(temperature=0)
IDS = st.integers(0, VOCAB_SIZE - 1)
PROMPT = st.lists(IDS, min_size=1, max_size=20)
SEEDED = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 1.0, 2.0]),
    top_k=st.sampled_from([0, 5]),
    top_p=st.sampled_from([1.0, 0.9]),
    min_p=st.sampled_from([0.0, 0.05]),
    presence_penalty=st.sampled_from([0.0, 2.0]),
    frequency_penalty=st.sampled_from([0.0, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    seed=st.integers(0, 2**64 - 1),
)


class KnowsTheReply:
    """Guesses what will be said, but for the places of the reply that it gets wrong."""

    def __init__(self, prompt: Sequence[int], reply: Sequence[int], wrong: set[int]) -> None:
        right = [(token + (place in wrong)) % VOCAB_SIZE for place, token in enumerate(reply)]
        self._text = [*prompt, *right]

    def propose(self, text: Sequence[int], count: int, sampler: Sampler) -> list[int]:
        return self._text[len(text) : len(text) + count]


class NoIdea:
    """Never guesses."""

    def propose(self, text: Sequence[int], count: int, sampler: Sampler) -> list[int]:
        return []


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each step takes that a model takes from here on."""
    lengths: list[int] = []
    step = Qwen3Model.__call__

    def recorded(self: Qwen3Model, tokens: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        lengths.append(tokens.shape[1])
        return step(self, tokens, *args, **kwargs)

    monkeypatch.setattr(Qwen3Model, "__call__", recorded)
    return lengths


def tokens_of(stream: TokenStream) -> list[int]:
    return [one.token for _, one in stream]


def told(stream: TokenStream) -> list[tuple[int, str | None, bool]]:
    """What guesses change nothing of."""
    return [without_counts(one) for _, one in stream]


def without_counts(one: GeneratedToken) -> tuple[int, str | None, bool]:
    return one.token, one.finish_reason, one.is_forced


def counts_of(last: GeneratedToken) -> tuple[int, int]:
    """Tokens that were guessed, and those of them that were right."""
    return last.drafted_tokens, last.accepted_tokens


def speculate_tokens(model: Qwen3ForCausalLM, prompt: Sequence[int], drafter: Drafter, **options: Any) -> TokenStream:
    return generate_tokens(model, prompt, drafter=drafter, **options)


def held(cache: KVCache) -> list[mx.array]:
    """The keys and values of all filled slots, decoded."""
    slots = cache.placement.slots_for(cache.offset)
    stored = [[part[..., :slots, :] for part in parts] for layer in cache for parts in (layer.keys, layer.values)]
    if cache.kv_bits is None:
        return [parts[0] for parts in stored]
    return [
        mx.dequantize(codes, scales, biases, group_size=cache.kv_group_size, bits=cache.kv_bits)
        for codes, scales, biases in stored
    ]


def disturbed(model: Qwen3ForCausalLM, amount: float) -> Qwen3ForCausalLM:
    """A model that mostly agrees: each weight off by about `amount` of itself."""
    copy = random_model()
    keys = iter(mx.random.split(mx.random.key(5), 64))
    noisy = tree_map(lambda w: w * (1 + amount * mx.random.normal(w.shape, key=next(keys))), model.parameters())
    copy.update(noisy)
    return copy


# The reply is that of plain decoding


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(data=st.data(), prompt=PROMPT, params=SEEDED, count=st.integers(1, 30), drafts=st.integers(1, 9))
def test_a_reply_is_that_of_the_seed_whatever_is_guessed(
    tiny: Qwen3ForCausalLM, data: st.DataObject, prompt: list[int], params: SamplingParams, count: int, drafts: int
) -> None:
    window = data.draw(st.sampled_from([None, 6, 16]), label="window")
    kv_bits = data.draw(st.sampled_from([None, 8]), label="kv_bits")
    ends = data.draw(st.sets(IDS, max_size=8), label="ends")
    plain_cache, cache = (make_cache(tiny, max_kv_size=window, keep=2, kv_bits=kv_bits) for _ in range(2))
    how: dict[str, Any] = {"sampling": params, "max_tokens": count, "eos_token_ids": ends}
    expected = told(generate_tokens(tiny, prompt, cache=plain_cache, **how))
    wrong = data.draw(st.sets(st.integers(0, count)), label="wrong")
    drafter = KnowsTheReply(prompt, [token for token, _, _ in expected], wrong)
    found = [one for _, one in speculate_tokens(tiny, prompt, drafter, draft_tokens=drafts, cache=cache, **how)]
    assert list(map(without_counts, found)) == expected
    assert cache.offsets == plain_cache.offsets
    for ours, theirs in zip(held(cache), held(plain_cache), strict=True):
        assert worst(ours, theirs) <= (1e-3 if kv_bits is None else 1.0)  # or one code of a number
    drafted, accepted = counts_of(found[-1])
    assert accepted <= drafted


@settings(max_examples=40, deadline=None)
@given(data=st.data(), prompt=PROMPT, params=SEEDED)
def test_forced_tokens_and_an_end_anywhere_leave_what_plain_decoding_leaves(
    tiny: Qwen3ForCausalLM, data: st.DataObject, prompt: list[int], params: SamplingParams
) -> None:
    """Forced in the middle of what was guessed right, left alone where the model says one of `unless`, then ended."""
    at = data.draw(st.integers(0, 12), label="forced behind so many")
    forced = data.draw(st.lists(IDS, max_size=12), label="forced")
    unless = data.draw(st.sets(IDS, max_size=20), label="unless")
    last = data.draw(st.integers(1, 25), label="ended at")
    window = data.draw(st.sampled_from([None, 9]), label="window")
    caches = [make_cache(tiny, max_kv_size=window, keep=2) for _ in range(2)]
    constraints = constrained(lambda: ForcedUnless(at, forced, unless))
    how: dict[str, Any] = {"sampling": params, "max_tokens": last, "constraints": constraints}
    expected = told(generate_tokens(tiny, prompt, cache=caches[0], **how))
    wrong = data.draw(st.sets(st.integers(0, 25)))
    drafter = KnowsTheReply(prompt, [token for token, _, _ in expected], wrong)
    assert told(speculate_tokens(tiny, prompt, drafter, cache=caches[1], **how)) == expected
    assert caches[0].offsets == caches[1].offsets
    replies = [tokens_of(generate_tokens(tiny, [5], sampling=GREEDY, max_tokens=5, cache=cache)) for cache in caches]
    assert replies[0] == replies[1]


def test_a_stream_that_is_stopped_before_it_begins_reads_nothing(tiny: Qwen3ForCausalLM, passes: list[int]) -> None:
    cache = make_cache(tiny)
    stream = speculate_tokens(tiny, [1, 2, 3], PromptLookup(), cache=cache)
    stream.stop(0)
    assert list(stream) == []
    assert cache.offset == 0
    assert passes == []


@pytest.mark.parametrize("window", [None, 8])
def test_a_stream_left_in_the_middle_of_right_guesses_holds_what_was_told(
    tiny: Qwen3ForCausalLM, window: int | None
) -> None:
    cache = make_cache(tiny, max_kv_size=window, keep=2)
    reply = tokens_of(generate_tokens(tiny, [1, 2, 3], sampling=GREEDY, max_tokens=20))
    if window is not None:
        ring = make_cache(tiny, max_kv_size=window, keep=2)
        reply = tokens_of(generate_tokens(tiny, [1, 2, 3], sampling=GREEDY, max_tokens=20, cache=ring))
    stream = speculate_tokens(
        tiny, [1, 2, 3], KnowsTheReply([1, 2, 3], reply, set()), sampling=GREEDY, cache=cache, draft_tokens=9
    )
    assert [next(stream)[1].token for _ in range(9)] == reply[:9]
    stream.close()
    place = cache.offset - 3  # tokens of the reply that it holds; some more may have been right than were taken
    assert 8 <= place < 18
    rest = generate_tokens(tiny, reply[place : place + 1], sampling=GREEDY, max_tokens=2, cache=cache)
    assert tokens_of(rest) == reply[place + 1 : place + 3]


@pytest.mark.parametrize("params", [GREEDY, SamplingParams(seed=3), SamplingParams(seed=3, repetition_penalty=1.2)])
@pytest.mark.parametrize("window", [None, 12])
def test_the_drafters_of_the_package_change_no_token(
    tiny: Qwen3ForCausalLM, params: SamplingParams, window: int | None
) -> None:
    prompt = [1, 2, 3, 4, 1, 2, 3, 4]
    caches = [make_cache(tiny, max_kv_size=window) for _ in range(4)]
    expected = tokens_of(generate_tokens(tiny, prompt, sampling=params, max_tokens=40, cache=caches.pop()))
    close, strange = DraftModel(disturbed(tiny, 0.02)), DraftModel(disturbed(tiny, 1.0), max_kv_size=20, kv_bits=8)
    for drafter in (PromptLookup(), close, strange):
        stream = speculate_tokens(tiny, prompt, drafter, sampling=params, max_tokens=40, cache=caches.pop())
        found = [one for _, one in stream]
        assert [one.token for one in found] == expected
        if drafter is close:
            drafted, accepted = counts_of(found[-1])
            assert accepted > drafted / 4


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 100), limit=st.integers(1, 60))
def test_the_context_and_the_limit_end_a_reply_where_they_would(tiny: Qwen3ForCausalLM, seed: int, limit: int) -> None:
    params, prompt = SamplingParams(seed=seed), list(range(30))
    expected = told(generate_tokens(tiny, prompt, sampling=params, max_tokens=limit))
    drafter = KnowsTheReply(prompt, [token for token, _, _ in expected] + [7] * 40, set())
    found = told(speculate_tokens(tiny, prompt, drafter, sampling=params, max_tokens=limit))
    assert found == expected
    assert found[-1][1] == "length"
    assert len(found) == min(limit, CONTEXT - 30)


def test_what_a_cache_holds_is_not_read_again(tiny: Qwen3ForCausalLM, passes: list[int]) -> None:
    cache = make_cache(tiny)
    first = tokens_of(speculate_tokens(tiny, [1, 2, 3], PromptLookup(), sampling=GREEDY, max_tokens=10, cache=cache))
    passes.clear()
    prompt, done = [1, 2, 3, *first, 4, 5], []
    stream = speculate_tokens(
        tiny,
        prompt,
        NoIdea(),
        sampling=GREEDY,
        max_tokens=3,
        cache=cache,
        cached_tokens=12,
        prefill_chunk=2,
        on_prefill=lambda *progress: done.append(progress),
    )
    assert tokens_of(stream) == tokens_of(generate_tokens(tiny, prompt, sampling=GREEDY, max_tokens=3))
    assert passes[:2] == [2, 1]
    assert done == [(0, 3), (2, 3), (3, 3)]


# Passes of the model, and what is counted


def test_right_guesses_save_passes(tiny: Qwen3ForCausalLM, passes: list[int]) -> None:
    reply = tokens_of(generate_tokens(tiny, [1, 2], sampling=GREEDY, max_tokens=30))
    passes.clear()
    stream = speculate_tokens(tiny, [1, 2], KnowsTheReply([1, 2], reply, set()), sampling=GREEDY, max_tokens=30)
    found = [one for _, one in stream]
    assert [one.token for one in found] == reply
    # The prompt; then one token and 4 guesses, one and 8, ... so that the limit is met by the token behind the last.
    assert passes == [2, 5, 9, 9, 6]
    assert counts_of(found[-1]) == (25, 25)


def test_wrong_guesses_are_given_up(tiny: Qwen3ForCausalLM, passes: list[int]) -> None:
    reply = tokens_of(generate_tokens(tiny, [1, 2], sampling=GREEDY, max_tokens=50))
    passes.clear()
    drafter = KnowsTheReply([1, 2], reply, set(range(50)))
    stream = speculate_tokens(tiny, [1, 2], drafter, sampling=GREEDY, max_tokens=50)
    found = [one for _, one in stream]
    assert [one.token for one in found] == reply
    # Four guesses and one, then one behind pauses of 1, 2, 4, 8 and 16 passes.
    guesses = [place for place, length in enumerate(passes[1:]) if length > 1]
    assert guesses == [0, 1, 3, 6, 11, 20, 37]
    assert counts_of(found[-1]) == (10, 0)


def test_forced_tokens_are_no_right_guesses(tiny: Qwen3ForCausalLM) -> None:
    forced = [7, 8, 9, 10, 11]
    plain = tokens_of(generate_tokens(tiny, [1, 2], sampling=GREEDY, max_tokens=6))
    constraints = constrained(lambda: ForcedUnless(1, forced, []))
    drafter = KnowsTheReply([1, 2], [plain[0], *forced], set())
    found = [
        one
        for _, one in speculate_tokens(tiny, [1, 2], drafter, sampling=GREEDY, max_tokens=6, constraints=constraints)
    ]
    assert [one.token for one in found] == [plain[0], *forced]
    assert found[-1].drafted_tokens > 0
    assert found[-1].accepted_tokens == sum(not one.is_forced for one in found[1:])


def test_with_several_replies_nothing_is_guessed_and_each_is_what_it_is_alone(
    tiny: Qwen3ForCausalLM, passes: list[int]
) -> None:
    """Guesses begin once one reply is left, behind what the others have had in common with it."""
    reply = tokens_of(generate_tokens(tiny, [1, 2], sampling=GREEDY, max_tokens=30))
    other = tokens_of(generate_tokens(tiny, [3], sampling=GREEDY, max_tokens=10))
    passes.clear()
    with own_scheduler(tiny) as scheduler:
        handles = [
            scheduler.submit(asked([1, 2], 30, drafter=KnowsTheReply([1, 2], reply, set()))),
            scheduler.submit(asked([3], 10, drafter=KnowsTheReply([3], other, set()))),
        ]
        found: list[list[GeneratedToken]] = [[], []]
        while scheduler.step():
            for one, handle in zip(found, handles, strict=True):
                one += taken(handle)
    assert [[one.token for one in tokens] for tokens in found] == [reply, other]
    assert counts_of(found[1][-1]) == (0, 0)
    assert passes[:10] == [2, *[1] * 9]
    assert passes[10] == 5
    drafted, accepted = counts_of(found[0][-1])
    assert drafted == accepted > 10


def test_draft_lengths_follow_what_was_right() -> None:
    length = DraftLength(10)
    found = []
    for drafted, accepted in [(4, 4), (8, 8), (10, 6), (7, 0), (1, 1), (2, 2)]:
        found.append(length.next())
        length.record(drafted, accepted)
    assert [*found, length.next()] == [4, 8, 10, 7, 1, 2, 4]


# Statistics


@pytest.mark.slow
@pytest.mark.parametrize(
    ("params", "drafter"),
    [
        (SamplingParams(), PromptLookup(1)),
        (SamplingParams(temperature=0.7, top_k=3), KnowsTheReply([1, 2, 1, 2], [3, 3, 3], set())),
        (SamplingParams(top_p=0.9, min_p=0.1), PromptLookup(1)),
        (SamplingParams(presence_penalty=2.0, frequency_penalty=1.0), PromptLookup(1)),
        (SamplingParams(repetition_penalty=1.5, temperature=1.5), KnowsTheReply([1, 2, 1, 2], [4, 4, 4], set())),
    ],
    ids=["as it is", "top-k", "top-p and min-p", "presence and frequency", "repetition"],
)
def test_replies_follow_the_distribution(params: SamplingParams, drafter: Drafter) -> None:
    """Hundreds of replies of three tokens, against the probabilities of all such replies in float64."""
    small, prompt = random_model(vocab_size=5, layers=1), [1, 2, 1, 2]
    expected = np.ones(5**3)
    for reply in itertools.product(range(5), repeat=3):
        for place, token in enumerate(reply):
            logits = to_numpy(small(mx.array([[*prompt, *reply[:place]]]))[0, -1])
            expected[np.ravel_multi_index(reply, (5, 5, 5))] *= probabilities(logits, params, prompt, reply[:place])[
                token
            ]
    found = []
    for seed in range(400):
        seeded = dataclasses.replace(params, seed=seed)
        drawn = tokens_of(speculate_tokens(small, prompt, drafter, sampling=seeded, max_tokens=3))
        found.append(int(np.ravel_multi_index(tuple(drawn), (5, 5, 5))))
    assert_drawn_from(expected, found)


# What cannot be


def test_a_draft_model_of_another_vocabulary_is_refused(tiny: Qwen3ForCausalLM) -> None:
    draft = DraftModel(random_model(vocab_size=98))
    with pytest.raises(
        OptionError, match=r"^draft model: found a vocabulary of 98 tokens, expected the model's own of 97"
    ):
        speculate_tokens(tiny, [1], draft)


@pytest.mark.parametrize("token", [VOCAB_SIZE, -1, True, 1.0])
def test_a_drafter_that_guesses_no_token_is_refused(tiny: Qwen3ForCausalLM, token: Any) -> None:
    drafter: Any = type("Bad", (), {"propose": lambda *_: [token]})()
    stream = speculate_tokens(tiny, [1], drafter)
    next(stream)
    with pytest.raises(OptionError, match=rf"^draft: found {token!r}, expected token ids from 0 to 96"):
        next(stream)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": []}, "prompt: found no tokens"),
        ({"prompt": [97]}, "prompt: found 97"),
        ({"drafter": 3}, "speculative: found 3"),
        ({"draft_tokens": 0}, "draft_tokens: found 0"),
        ({"max_tokens": True}, "max_tokens: found True"),
        ({"prefill_chunk": 0}, "prefill_chunk: found 0"),
        ({"sampling": {}}, "sampling: found dict"),
        ({"cache": []}, "cache: found list"),
        ({"cached_tokens": 1}, "cached_tokens: found 1"),
    ],
    ids=str,
)
def test_options_that_cannot_be_are_refused(tiny: Qwen3ForCausalLM, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=f"^{message}"):
        speculate_tokens(tiny, **{"prompt": [1], "drafter": NoIdea(), **arguments})


def test_what_cannot_be_without_guesses_cannot_be_with_them(tiny: Qwen3ForCausalLM) -> None:
    with pytest.raises(CacheError, match=r"^cache: made for 2 rows, found 1 prompts"):
        speculate_tokens(tiny, [1], NoIdea(), cache=make_cache(tiny, batch_size=2))
    with pytest.raises(ContextLengthError, match=r"^prompt: 64 tokens"):
        speculate_tokens(tiny, [1] * CONTEXT, NoIdea())


def test_a_model_of_no_numbers_ends_with_an_error_and_a_draft_model_of_none_guesses_nothing(
    tiny: Qwen3ForCausalLM,
) -> None:
    broken = random_model()
    broken.model.norm.weight = broken.model.norm.weight * mx.nan
    with pytest.raises(GenerationError, match="NaN"):
        next(speculate_tokens(broken, [1, 2], PromptLookup()))
    expected = tokens_of(generate_tokens(tiny, [1, 2], sampling=GREEDY, max_tokens=10))
    found = [one for _, one in speculate_tokens(tiny, [1, 2], DraftModel(broken), sampling=GREEDY, max_tokens=10)]
    assert [one.token for one in found] == expected
    assert found[-1].drafted_tokens == 0
