"""The constraint of a grammar among other replies: with guesses, budgets, preemption, padding, and bad luck."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from mlxqwen import Engine
from mlxqwen.chat.pipeline import ReplyPipeline
from mlxqwen.chat.structured import trial
from mlxqwen.chat.structured.constraint import GrammarConstraint
from mlxqwen.chat.structured.reply_rules import reply_constraint
from mlxqwen.chat.structured.response_format import read_response_format
from mlxqwen.chat.structured.tool_choice import read_tool_choice
from mlxqwen.engine.request import Request
from mlxqwen.engine.text_generation import end_token_ids, text_request
from mlxqwen.errors import GenerationError
from mlxqwen.model.qwen3 import Qwen3ForCausalLM
from mlxqwen.sampling.constraint import Mask
from mlxqwen.text.tokenizer import Tokenizer
from tests.scheduling import alone, ids, machine, new_scheduler, run, taken
from tests.structured_schemas import SCHEMAS, record

pytest.importorskip("llguidance")

FORM = record(a={"type": "integer", "minimum": 0, "maximum": 99}, b={"enum": ["x", "yy"]}, c={"type": "boolean"})
QUESTION = [{"role": "user", "content": "How many r's in strawberry?"}]
WILD = {"temperature": 1.5, "top_p": 1, "top_k": 0, "seed": 4}


class KnowsTheReply:
    """Guesses what will be said."""

    def __init__(self, text: Sequence[int]) -> None:
        self._text = list(text)

    def propose(self, text: Sequence[int], count: int, sampler: object) -> list[int]:
        return self._text[len(text) : len(text) + count]


def factory(
    model: Qwen3ForCausalLM, tokenizer: Tokenizer, form: object
) -> Callable[[ReplyPipeline | None], GrammarConstraint]:
    made = reply_constraint(
        tokenizer,
        model.config.vocab_size,
        end_token_ids(model, tokenizer),
        read_response_format(form),
        read_tool_choice(None, None, True),
    )
    assert made is not None
    return made


def asked(demo: tuple[Qwen3ForCausalLM, Tokenizer], form: object = FORM, **options: Any) -> Request:
    """A request whose reply thinks, and then keeps to a form."""
    model, tokenizer = demo
    prompt = Engine(model, tokenizer).prompt(QUESTION)
    constraints = () if form is None else (factory(model, tokenizer, form),)
    options = {"max_tokens": 120, "sampling": WILD, **options}
    return text_request(model, tokenizer, prompt, constraints=constraints, **options)


@pytest.mark.parametrize("is_gpu", [False, True])
def test_constrained_beside_free_rows(demo: tuple[Qwen3ForCausalLM, Tokenizer], is_gpu: bool) -> None:
    model, _ = demo
    requests = [asked(demo), asked(demo, None, max_tokens=40), asked(demo, SCHEMAS["anyOf"], thinking_budget=5)]
    expected = [alone(model, request) for request in requests]
    with machine(model, 1 << 32, is_gpu=is_gpu):
        scheduler = new_scheduler(model)
        assert run(scheduler, [scheduler.submit(request) for request in requests]) == expected


@pytest.mark.parametrize("budget", [None, 4])
def test_guesses_change_nothing(demo: tuple[Qwen3ForCausalLM, Tokenizer], budget: int | None) -> None:
    """Right guesses, and some that the grammar does not have: in the thought, at its end, and in the answer."""
    model, tokenizer = demo
    request = asked(demo, thinking_budget=budget)
    expected = alone(model, request)
    wrong = tokenizer.encode("!<|im_end|>]</think>{")
    mixed = [wrong[place % len(wrong)] if place % 4 == 3 else token for place, token in enumerate(expected)]
    for guessed in (expected, mixed):
        scheduler = new_scheduler(model)
        drafter = KnowsTheReply([*request.prompt, *guessed])
        handle = scheduler.submit(asked(demo, thinking_budget=budget, speculative=drafter))
        tokens = []
        while scheduler.step():
            tokens += taken(handle)
        assert ids(tokens) == expected
        assert tokens[-1].accepted_tokens > 10
        if guessed is expected and budget is None:
            assert tokens[-1].accepted_tokens == tokens[-1].drafted_tokens


def test_a_guess_that_is_too_costly_to_check_ends_no_reply(
    demo: tuple[Qwen3ForCausalLM, Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = demo
    request = asked(demo)
    expected = alone(model, request)
    whole_mask = GrammarConstraint.mask

    def costly_for_forks(self: GrammarConstraint) -> Mask | None:
        if self._pipeline is None and self._matcher is not None:
            raise GenerationError("constraint: the grammar cannot be followed further: too many items")
        return whole_mask(self)

    monkeypatch.setattr(GrammarConstraint, "mask", costly_for_forks)
    scheduler = new_scheduler(model)
    handle = scheduler.submit(asked(demo, speculative=KnowsTheReply([*request.prompt, *expected])))
    tokens = []
    while scheduler.step():
        tokens += taken(handle)
    assert handle.error is None
    assert ids(tokens) == expected
    assert tokens[-1].accepted_tokens > 0


def allowed(constraint: GrammarConstraint, vocab_size: int) -> set[int]:
    mask = constraint.mask()
    assert mask is not None
    bits = np.unpackbits(np.array(mask).view(np.uint8), bitorder="little")[:vocab_size]
    return set(np.flatnonzero(bits).tolist())


def test_special_tokens_and_padding_are_never_allowed(babbler: Qwen3ForCausalLM, tokenizer: Tokenizer) -> None:
    """Oracle: the bytes of each allowed token continue the text to a prefix of what fits."""
    size = babbler.config.vocab_size
    ends = set(end_token_ids(babbler, tokenizer))
    constraint = factory(babbler, tokenizer, {"choice": ["cat", "car", "do"]})(None)
    text = ""
    for piece in ("c", "a", "t"):
        fitting = {choice[len(text) :] for choice in ("cat", "car", "do") if choice.startswith(text)}
        expected = {
            n
            for n in range(tokenizer.vocab_size)
            if n not in tokenizer.added_token_ids
            and (spelled := tokenizer.token_bytes(n).decode("latin-1"))
            and any(rest.startswith(spelled) for rest in fitting)
        }
        found = allowed(constraint, size)
        # Where the grammar leaves one text, llguidance keeps to the tokens that the tokenizer makes of it.
        assert found <= expected
        assert found == expected or len(fitting) == 1
        (token,) = tokenizer.encode(piece)
        constraint.advance(token)
        text += piece
    assert allowed(constraint, size) == ends
    constraint.advance(min(ends))
    assert allowed(constraint, size) == ends


def test_a_token_that_does_not_fit_is_an_error(demo: tuple[Qwen3ForCausalLM, Tokenizer]) -> None:
    model, tokenizer = demo
    constraint = factory(model, tokenizer, FORM)(None)
    (token,) = tokenizer.encode("!")
    for one in (constraint.fork(), constraint):
        with pytest.raises(GenerationError, match=f"constraint: found token {token}"):
            one.advance(token)


def test_a_fork_goes_its_own_way(demo: tuple[Qwen3ForCausalLM, Tokenizer]) -> None:
    model, tokenizer = demo
    constraint = factory(model, tokenizer, {"regex": "ab|cd"})(None)
    a, b, c = (tokenizer.encode(letter)[0] for letter in "abc")
    constraint.fork().advance(c)
    constraint.advance(a)
    before = allowed(constraint, model.config.vocab_size)
    fork = constraint.fork()
    fork.advance(b)
    assert allowed(constraint, model.config.vocab_size) == before == {b}


def test_a_grammar_that_costs_too_much_fails_its_reply_alone(
    demo: tuple[Qwen3ForCausalLM, Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each letter may or may not begin what has to follow: the states of the expression have no end."""
    model, _ = demo
    monkeypatch.setattr(trial, "MAX_LEXER_STATES", 60)
    requests = [asked(demo, {"regex": "[ab]*a[ab]{40}"}, thinking_budget=0), asked(demo, max_tokens=30)]
    expected = alone(model, requests[1])
    scheduler = new_scheduler(model)
    costly, other = (scheduler.submit(request) for request in requests)
    assert run(scheduler, [costly, other])[1] == expected
    with pytest.raises(GenerationError, match=r"^constraint: the grammar cannot be followed further: .*states"):
        costly.next_token()


def test_preempted_and_read_again(demo: tuple[Qwen3ForCausalLM, Tokenizer]) -> None:
    """In the thought and in the answer."""
    model, tokenizer = demo
    request = asked(demo, thinking_budget=6)
    expected = alone(model, request)
    scheduler = new_scheduler(model)
    handle = scheduler.submit(request)
    tokens: list[int] = []
    preempted = 0
    while scheduler.step():
        tokens += ids(taken(handle))
        if len(tokens) >= 5 * preempted + 5 and scheduler.running:
            scheduler._preempt(scheduler.running[0])
            preempted += 1
    assert tokens + ids(taken(handle)) == expected
    assert preempted > 3
    assert json.loads(tokenizer.decode(expected, skip_special_tokens=True).rpartition("</think>")[2])
