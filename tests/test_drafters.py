"""What guesses: lookups against a search through the whole text, a draft model against itself alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxqwen.engine.speculation import prompt_lookup
from mlxqwen.engine.speculation.draft_model import DraftModel
from mlxqwen.engine.speculation.drafter import as_drafter
from mlxqwen.engine.speculation.prompt_lookup import PromptLookup
from mlxqwen.engine.token_stream import generate_tokens
from mlxqwen.errors import OptionError
from mlxqwen.model.qwen3 import Qwen3ForCausalLM, Qwen3Model
from mlxqwen.sampling.params import SamplingParams
from mlxqwen.sampling.sampler import Sampler
from tests.conftest import VOCAB_SIZE
from tests.scheduling import asked, new_scheduler, taken

GREEDY = SamplingParams(temperature=0)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The tokens of each step that a model takes from here on."""
    steps: list[list[int]] = []
    step = Qwen3Model.__call__

    def recorded(self: Qwen3Model, tokens: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        steps.append(cast(list[int], tokens[0].tolist()))
        return step(self, tokens, *args, **kwargs)

    monkeypatch.setattr(Qwen3Model, "__call__", recorded)
    return steps


def sampler(params: SamplingParams = GREEDY, prompt: Sequence[int] = ()) -> Sampler:
    return Sampler([params], [prompt], VOCAB_SIZE)


# Prompt lookup


def searched(text: Sequence[int], shortest: int, count: int) -> list[int]:
    """What followed the latest of the longest matches, and again where the text ends."""
    matches = {}
    for place in range(shortest, len(text)):
        length = next((n for n in range(min(place, 16)) if text[place - 1 - n] != text[-1 - n]), min(place, 16))
        if length >= shortest:
            matches[place] = length
    if not matches:
        return []
    best = max(place for place, length in matches.items() if length == max(matches.values()))
    copy = list(text)
    for n in range(count):
        copy.append(copy[best + n])
    return copy[len(text) :]


@settings(max_examples=80, deadline=None)
@given(
    text=st.lists(st.integers(0, 3), min_size=1, max_size=40),
    more=st.lists(st.lists(st.integers(0, 3), max_size=6), max_size=5),
    shortest=st.integers(1, 3),
    count=st.integers(1, 12),
)
def test_a_lookup_is_a_search_through_the_whole_text(
    text: list[int], more: list[list[int]], shortest: int, count: int
) -> None:
    lookup = PromptLookup(shortest)
    for new in [[], *more]:
        text += new
        for _ in range(2):
            assert lookup.propose(text, count, sampler()) == searched(text, shortest, count)


def test_a_lookup_knows_one_text_at_a_time() -> None:
    lookup, first, second = PromptLookup(), [1, 2, 3, 1, 2], [5, 1, 2, 4, 1, 2]
    assert lookup.propose(first, 1, sampler()) == [3]
    assert lookup.propose(second, 1, sampler()) == [4]
    assert lookup.propose(first, 1, sampler()) == [3]
    del second[3:]
    assert lookup.propose(second, 1, sampler()) == []


def test_what_is_looked_at_and_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[int] = []
    match = PromptLookup._match

    def counted(self: PromptLookup, text: Sequence[int], place: int) -> int:
        looked.append(place)
        return match(self, text, place)

    monkeypatch.setattr(PromptLookup, "_match", counted)
    text = [token for n in range(2000) for token in (8, 9, n % 90 + 10)] + [8, 9]
    assert PromptLookup().propose(text, 1, sampler()) == [1999 % 90 + 10]
    assert len(looked) == 32
    monkeypatch.setattr(prompt_lookup, "_MOST_INDEXED", 100)
    lookup, text = PromptLookup(), [1, 2, 3, *[4 + n % 60 for n in range(120)], 1, 2]
    assert lookup.propose(text, 1, sampler()) == []  # the beginning is forgotten
    text += [77, *[4 + n % 60 for n in range(30)], 1, 2]
    assert lookup.propose(text, 1, sampler()) == [77]


# Draft models


@settings(max_examples=20, deadline=None)
@given(
    text=st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=12),
    news=st.lists(st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=5), max_size=4),
    count=st.integers(1, 5),
    params=st.sampled_from([GREEDY, SamplingParams(seed=1), SamplingParams(seed=1, presence_penalty=1.0)]),
)
def test_a_draft_model_guesses_what_it_would_say_itself(
    tiny: Qwen3ForCausalLM, text: list[int], news: list[list[int]], count: int, params: SamplingParams
) -> None:
    draft = DraftModel(tiny, prefill_chunk=5)
    lent = sampler(params, text)
    for new in [[], *news]:
        text += new
        expected, alone, state = list(text), sampler(params, text), lent.state
        alone.restore(state)
        for _ in range(count):
            expected.append(cast(int, alone(tiny(mx.array([expected]))[:, -1]).item()))
        assert draft.propose(text, count, lent) == expected[len(text) :]
        alone.restore(state)
        flat = mx.zeros((1, VOCAB_SIZE))
        assert [lent(flat).item() for _ in range(3)] == [alone(flat).item() for _ in range(3)]  # it was left as it was


def test_a_draft_model_reads_what_is_new(tiny: Qwen3ForCausalLM, read: list[list[int]]) -> None:
    draft, text = DraftModel(tiny), [1, 2, 3, 4]
    first = draft.propose(text, 3, sampler())
    assert read == [[1, 2, 3, 4], [first[0]], [first[1]]]
    read.clear()
    text += [*first, 5]  # all were right; the last of them was never read
    second = draft.propose(text, 2, sampler())
    assert read == [[first[2], 5], [second[0]]]
    read.clear()
    text += [(second[0] + 1) % VOCAB_SIZE]
    draft.propose(text, 1, sampler())
    assert read == [text[-1:]]
    read.clear()
    draft.propose([1, 2, 9], 1, sampler())  # another text, which begins in the same way
    assert read == [[9]]


def test_a_draft_model_reads_a_prompt_along_with_the_model(tiny: Qwen3ForCausalLM, read: list[list[int]]) -> None:
    draft, prompt = DraftModel(tiny), list(range(1, 11))
    told: list[tuple[int, int]] = []
    stream = generate_tokens(
        tiny,
        prompt,
        drafter=draft,
        draft_tokens=3,
        sampling=GREEDY,
        max_tokens=2,
        prefill_chunk=4,
        on_prefill=lambda done, total: told.append((done, total)),
    )
    _, first = next(stream)
    pieces = [prompt[:4], prompt[4:8], prompt[8:]]
    assert read[:6] == [piece for piece in pieces for _ in range(2)]
    assert told == [(0, 10), (4, 10), (8, 10), (10, 10)]
    read.clear()
    draft.propose([*prompt, first.token], 1, sampler(prompt=prompt))
    assert read in ([], [[first.token]])  # of the prompt nothing is read again


def test_a_draft_model_that_has_read_nothing_catches_up_a_chunk_a_step(
    tiny: Qwen3ForCausalLM, read: list[list[int]]
) -> None:
    """As where others ran beside the prompt; what it guesses then is what it would have guessed before."""
    draft, text = DraftModel(tiny, prefill_chunk=4), list(range(1, 11))
    assert [draft.catch_up(text) for _ in range(3)] == [False, False, True]
    assert read == [text[:4], text[4:8]]
    guessed = draft.propose(text, 2, sampler(prompt=text))
    assert read == [text[:4], text[4:8], text[8:], guessed[:1]]
    assert guessed == DraftModel(tiny).propose(text, 2, sampler(prompt=text))
    text += [*guessed, *range(20, 25)]
    read.clear()
    assert [draft.catch_up(text) for _ in range(2)] == [False, True]
    assert read == [text[11:15]]
    assert DraftModel(tiny, max_kv_size=8, prefill_chunk=4).catch_up(text)  # read from its latest half, when it guesses


def test_a_running_reply_gets_a_token_for_each_chunk_that_its_draft_model_catches_up(
    tiny: Qwen3ForCausalLM, read: list[list[int]]
) -> None:
    draft, prompt = DraftModel(tiny, prefill_chunk=4), list(range(1, 19))
    scheduler = new_scheduler(tiny)
    other = scheduler.submit(asked([3], 3))  # while it runs, the draft model reads nothing
    one = scheduler.submit(asked(prompt, 12, drafter=draft, draft_tokens=3))
    while not other.is_over:
        scheduler.step()
        taken(other)
    read.clear()
    before = one.token_count + len(taken(one))
    chunks = 0
    while True:
        scheduler.step()
        if [len(piece) for piece in read] != [4, 1]:
            break
        chunks += 1
        read.clear()
    assert chunks >= 4
    assert before + chunks <= one.token_count + len(taken(one)) <= before + chunks + 4


def test_a_draft_model_reads_a_prompt_that_is_too_long_for_it_at_its_end(
    tiny: Qwen3ForCausalLM, read: list[list[int]]
) -> None:
    draft, prompt = DraftModel(tiny, max_kv_size=9), list(range(1, 21))
    draft.read(prompt, 10)
    assert read == []
    draft.read(prompt, 20)
    assert read == [[17, 18, 19, 20]]
    DraftModel(tiny, max_kv_size=1).read(prompt, 20)
    assert len(read) == 1


def test_a_text_longer_than_the_cache_is_read_from_its_latest_half_now_and_then(
    tiny: Qwen3ForCausalLM, read: list[list[int]]
) -> None:
    draft, text = DraftModel(tiny, max_kv_size=12), list(range(9))
    assert len(draft.propose(text, 3, sampler())) == 3
    text += [20]
    read.clear()
    draft.propose(text, 3, sampler())
    assert read[0] == text[-4:]
    for token in range(30, 60):
        text += [token]
        assert len(draft.propose(text, 3, sampler())) == 3
        assert draft._cache.offset <= 12
    assert sum(map(len, read)) < 30 * 6
    read.clear()
    draft.propose([1, 2], 3, sampler())  # a short text again
    assert read[0] == [1, 2]


def test_a_cache_without_room_gives_no_guess(tiny: Qwen3ForCausalLM, read: list[list[int]]) -> None:
    assert DraftModel(tiny, max_kv_size=1).propose([1, 2, 3], 4, sampler()) == []
    assert read == []


@pytest.mark.parametrize("arguments", [{"max_kv_size": 0}, {"prefill_chunk": 0}, {"kv_bits": 5}], ids=str)
def test_options_of_a_draft_model_that_cannot_be_are_refused(tiny: Qwen3ForCausalLM, arguments: dict[str, int]) -> None:
    with pytest.raises(OptionError, match=f"^{next(iter(arguments))}: found"):
        DraftModel(tiny, **cast(Any, arguments))


def test_a_drafter_is_one_that_guesses_and_no_class(tiny: Qwen3ForCausalLM) -> None:
    draft = DraftModel(tiny)
    assert as_drafter(draft) is draft
    assert isinstance(as_drafter("lookup"), PromptLookup)
    for wrong in (DraftModel, PromptLookup, "guess", tiny, None):
        with pytest.raises(OptionError, match=r"^speculative: found"):
            as_drafter(wrong)
