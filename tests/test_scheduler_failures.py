"""Interrupts and exceptions in a step: what is rolled back, who fails, and that all others get their very tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import pytest

from mlxqwen.engine.handle import Handle
from mlxqwen.engine.request import Request
from mlxqwen.engine.scheduler import Scheduler
from mlxqwen.engine.speculation.draft_model import DraftModel
from mlxqwen.engine.speculation.prompt_lookup import PromptLookup
from mlxqwen.errors import GenerationError
from mlxqwen.model.attention import Attention
from mlxqwen.model.qwen3 import DecoderLayer, Qwen3ForCausalLM
from mlxqwen.sampling.params import SamplingParams
from mlxqwen.sampling.sampler import Sampler
from tests.conftest import VOCAB_SIZE, random_model
from tests.scheduling import KINDS, Forced, Only, alone, asked, constrained, ids, machine, new_scheduler, taken

SEEDED = SamplingParams(seed=3, temperature=1.5, presence_penalty=1.0, repetition_penalty=1.1)


@pytest.fixture(scope="module")
def model() -> Qwen3ForCausalLM:
    return random_model(context=512)


@pytest.fixture(scope="module")
def alone_by_kind(model: Qwen3ForCausalLM) -> dict[str, list[list[int]]]:
    """What `requests(kind)` get where nobody else runs."""
    return {kind: [alone(model, request) for request in requests(kind)] for kind in KINDS}


class Bomb:
    """Raises at the `at`-th call of what it is put into."""

    def __init__(self, error: BaseException, at: int) -> None:
        self.error = error
        self.left = at
        self.went_off = False

    def wrap(self, patch: pytest.MonkeyPatch, owner: Any, name: str, *, behind: bool) -> None:
        real = getattr(owner, name)

        def wrapped(*args: Any, **options: Any) -> Any:
            if behind:
                found = real(*args, **options)
                self.count()
                return found
            self.count()
            return real(*args, **options)

        patch.setattr(owner, name, wrapped)

    def count(self) -> None:
        self.left -= 1
        if self.left == 0:
            self.went_off = True
            raise self.error


PLACES: dict[str, tuple[Any, str, bool]] = {
    "before attention": (Attention, "attend", False),
    "behind attention": (Attention, "attend", True),
    "behind a layer": (DecoderLayer, "__call__", True),
    "before a draw": (Sampler, "__call__", False),
    "behind a draw": (Sampler, "__call__", True),
    "in the head": (Qwen3ForCausalLM, "logits", True),
}


def finish(scheduler: Scheduler, handles: Sequence[Handle], error: type[BaseException]) -> tuple[list[list[int]], int]:
    """Steps until nothing is left to do, on where `error` comes out of one → the tokens of each, and how often."""
    found: list[list[int]] = [[] for _ in handles]
    raised = 0
    worked = True
    while worked:
        try:
            worked = scheduler.step()
        except error:
            raised += 1
        for tokens, handle in zip(found, handles, strict=True):
            tokens += ids(taken(handle))
    return found, raised


def requests(kind: str, *, guesses: bool = False) -> list[Request]:
    """Rows that are read in several chunks, join, and end at different times."""
    drafter: Any = {"drafter": PromptLookup()} if guesses else {}
    common: Any = {"cache": KINDS[kind], "prefill_chunk": 16, **drafter}
    prompts = [[1, 2, 3, 1, 2], [n % 7 for n in range(40)], [n % VOCAB_SIZE for n in range(30)]]
    forced = constrained(lambda: Forced({1: 7, 4: 8}))
    return [
        asked(prompts[0], 14, sampling=SEEDED, **common),
        asked(prompts[1], 6, **common),
        asked(prompts[2], 9, sampling=SEEDED, constraints=forced, **common),
    ]


@pytest.mark.parametrize("is_gpu", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", PLACES)
def test_an_interrupt_is_as_if_the_step_had_not_begun(
    model: Qwen3ForCausalLM, alone_by_kind: dict[str, list[list[int]]], place: str, kind: str, is_gpu: bool
) -> None:
    """Wherever it comes: in a prompt, beside one, in a step of several rows, in one queued ahead."""
    expected = alone_by_kind[kind]
    for at in (1, 2, 4, 7, 12, 17):
        with machine(model, 1 << 30, is_gpu=is_gpu), pytest.MonkeyPatch.context() as patch:
            bomb = Bomb(KeyboardInterrupt(), at)
            owner, name, behind = PLACES[place]
            bomb.wrap(patch, owner, name, behind=behind)
            scheduler = new_scheduler(model)
            handles = [scheduler.submit(request) for request in requests(kind)]
            found, raised = finish(scheduler, handles, KeyboardInterrupt)
            assert raised == bomb.went_off
            assert bomb.went_off or at > 4
            assert found == expected, at


@pytest.mark.parametrize("is_gpu", [False, True])
@pytest.mark.parametrize("kind", ["linear", "ring"])
@pytest.mark.parametrize("place", PLACES)
def test_an_interrupt_while_guesses_are_checked(
    model: Qwen3ForCausalLM, alone_by_kind: dict[str, list[list[int]]], place: str, kind: str, is_gpu: bool
) -> None:
    request = requests(kind, guesses=True)[0]
    expected = alone_by_kind[kind][0]
    for at in range(1, 12, 2):
        with machine(model, 1 << 30, is_gpu=is_gpu), pytest.MonkeyPatch.context() as patch:
            bomb = Bomb(KeyboardInterrupt(), at)
            owner, name, behind = PLACES[place]
            bomb.wrap(patch, owner, name, behind=behind)
            scheduler = new_scheduler(model)
            found, raised = finish(scheduler, [scheduler.submit(request)], KeyboardInterrupt)
            assert raised == bomb.went_off
            assert bomb.went_off or at > 2
            assert found == [expected], at


@pytest.mark.parametrize("method", ["read", "propose"])
def test_an_interrupt_in_a_draft_model_loses_nobody(
    model: Qwen3ForCausalLM, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    draft = DraftModel(model)
    request = asked([1, 2, 3, 4], 10, drafter=draft)
    expected = alone(model, asked([1, 2, 3, 4], 10))
    bomb = Bomb(KeyboardInterrupt(), 1)
    bomb.wrap(monkeypatch, DraftModel, method, behind=False)
    scheduler = new_scheduler(model)
    found, raised = finish(scheduler, [scheduler.submit(request)], KeyboardInterrupt)
    assert raised == 1
    assert found == [expected]


def test_an_interrupt_while_the_store_copies_loses_nobody(
    model: Qwen3ForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    bomb = Bomb(KeyboardInterrupt(), 1)
    scheduler = new_scheduler(model, store=1 << 30)
    bomb.wrap(monkeypatch, type(scheduler.store), "put", behind=False)
    request = asked(range(40), 5)
    found, raised = finish(scheduler, [scheduler.submit(request)], KeyboardInterrupt)
    assert raised == 1
    assert found == [alone(model, request)]


# Exceptions


@pytest.mark.parametrize("is_gpu", [False, True])
@pytest.mark.parametrize("kind", ["linear", "ring of 8 bits"])
def test_an_exception_fails_the_rows_of_its_pass_and_what_waits_goes_on(
    model: Qwen3ForCausalLM, alone_by_kind: dict[str, list[list[int]]], kind: str, is_gpu: bool
) -> None:
    expected = alone_by_kind[kind]
    for at in range(1, 30, 3):
        with machine(model, 1 << 30, is_gpu=is_gpu), pytest.MonkeyPatch.context() as patch:
            bomb = Bomb(RuntimeError("no memory"), at)
            bomb.wrap(patch, Attention, "attend", behind=False)
            scheduler = new_scheduler(model, max_running=2)
            handles = [scheduler.submit(request) for request in requests(kind)]
            found, raised = finish(scheduler, handles, RuntimeError)
            assert raised == 0
            failed = [handle.error is not None for handle in handles]
            assert any(failed) == bomb.went_off
            assert not all(failed)
            for tokens, reply, handle in zip(found, expected, handles, strict=True):
                assert tokens == (reply if handle.error is None else reply[: len(tokens)])
                if handle.error is not None:
                    assert isinstance(handle.error, RuntimeError)
                    assert handle.is_over
            assert scheduler.cache_bytes == 0


@pytest.mark.parametrize("is_gpu", [False, True])
@pytest.mark.parametrize("name", ["mask", "settle", "advance"])
def test_a_constraint_that_raises_ends_its_own_reply_alone(
    model: Qwen3ForCausalLM, monkeypatch: pytest.MonkeyPatch, name: str, is_gpu: bool
) -> None:
    class Breaks(Only):
        def __init__(self) -> None:
            super().__init__(range(VOCAB_SIZE))

    def explode(self: Breaks, *_: int) -> None:
        if len(self.seen) == 2:
            raise RuntimeError("a constraint's own")
        return getattr(Only, name)(self, *_)

    setattr(Breaks, name, explode)
    with machine(model, 1 << 30, is_gpu=is_gpu):
        scheduler = new_scheduler(model)
        free = [asked([place], 6, sampling=SEEDED) for place in (1, 2)]
        handles = [scheduler.submit(request) for request in free]
        broken = scheduler.submit(asked([3], 6, constraints=constrained(Breaks)))
        found, raised = finish(scheduler, [*handles, broken], RuntimeError)
        assert raised == 0
        assert found[:2] == [alone(model, request) for request in free]
        assert isinstance(broken.error, RuntimeError)
        assert found[2] == alone(model, asked([3], 6))[: len(found[2])]


# Logits that are not numbers


class NanFor:
    """Makes the logits of whoever said a token NaN from then on."""

    def __init__(self, model: Qwen3ForCausalLM, token: int) -> None:
        self.weight = model.model.embed_tokens.weight
        spoiled = mx.array(self.weight)
        spoiled[token] = mx.nan
        self.model, self.spoiled = model, spoiled

    def __enter__(self) -> None:
        self.model.model.embed_tokens.weight = self.spoiled

    def __exit__(self, *_: object) -> None:
        self.model.model.embed_tokens.weight = self.weight


@pytest.mark.parametrize("is_gpu", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("at", [0, 1, 3])
def test_a_row_of_nan_fails_alone(kind: str, is_gpu: bool, at: int) -> None:
    own = random_model(context=512)
    spoiled = VOCAB_SIZE - 1
    never: Any = {"sampling": SamplingParams(seed=4, logit_bias={spoiled: -100.0}), "cache": KINDS[kind]}
    good = [asked([place], 7, **never) for place in (1, 2, 3)]
    expected = [alone(own, request) for request in good]
    forced = constrained(lambda: Forced({at - 1: spoiled}))
    prompt = [4, spoiled] if at == 0 else [4]
    bad = asked(prompt, 7, constraints=forced, cache=KINDS[kind])
    with NanFor(own, spoiled), machine(own, 1 << 30, is_gpu=is_gpu):
        scheduler = new_scheduler(own)
        handles = [scheduler.submit(request) for request in (good[0], bad, *good[1:])]
        found, raised = finish(scheduler, handles, GenerationError)
    assert raised == 0
    assert isinstance(handles[1].error, GenerationError)
    assert "NaN" in str(handles[1].error)
    assert len(found[1]) == at
    assert [found[0], *found[2:]] == expected


@pytest.mark.parametrize("drafter", [None, PromptLookup()])
def test_a_lone_reply_of_nan_fails(drafter: PromptLookup | None) -> None:
    own = random_model()
    with NanFor(own, 5):
        scheduler = new_scheduler(own)
        handle = scheduler.submit(
            asked([1, 1, 1, 1], 9, constraints=constrained(lambda: Forced({4: 5})), drafter=drafter)
        )
        (found,), _ = finish(scheduler, [handle], GenerationError)
    assert len(found) == 5
    with pytest.raises(GenerationError, match="NaN"):
        handle.next_token()


def test_errors_say_where_they_were_raised_once(model: Qwen3ForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = Bomb(RuntimeError("no memory"), 8)
    bomb.wrap(monkeypatch, Attention, "attend", behind=False)
    scheduler = new_scheduler(model)
    handles = [scheduler.submit(asked([place], 6)) for place in (1, 2, 3)]
    finish(scheduler, handles, RuntimeError)
    for handle in handles:
        assert isinstance(handle.error, RuntimeError)
        assert len([note for note in handle.error.__notes__ if "raised in" in note]) == 1
