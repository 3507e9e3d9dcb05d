"""Thinking budgets, over replies that are known beforehand."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxqwen.chat.thinking import EARLY_STOP_TEXT, ThinkingBudget
from mlxqwen.errors import OptionError
from tests.test_tokenizer import QWEN

OPEN, CLOSE, TOOL_CALL, END = QWEN.encode("<think></think><tool_call><|im_end|>")
FREE = QWEN.encode("<|im_start|>assistant\n")
OPENED = [*FREE, *QWEN.encode("<think>\n")]
CLOSED = [*FREE, *QWEN.encode("<think>\n\n</think>\n\n")]
EARLY_STOP = QWEN.encode(f"\n\n{EARLY_STOP_TEXT}\n</think>\n\n")
ANSWER = QWEN.encode("42")


def reply(budget: ThinkingBudget, drawn: Sequence[int]) -> tuple[list[int], list[int]]:
    """What becomes of a reply that a model would draw like this: its tokens, and those of them that were forced."""
    pending, unless = budget.start(), budget.closing
    tokens: list[int] = []
    forced: list[int] = []
    for own in drawn:
        if unless and own in unless:
            pending = []
        unless = frozenset()
        is_forced = bool(pending)
        tokens.append(pending.pop(0) if is_forced else own)
        forced += tokens[-1:] if is_forced else []
        if more := budget.feed(tokens[-1], forced=is_forced):
            assert not pending
            pending, unless = more, budget.closing
    assert not pending
    return tokens, forced


def thinking(budget: int | None, prompt: Sequence[int] = FREE, **options: Any) -> ThinkingBudget:
    return ThinkingBudget(QWEN, prompt, budget=budget, **options)


TEXT = st.text("abc é∀🙂𓀀龘\n.", max_size=12)


@settings(deadline=None)
@given(thought=TEXT, answer=TEXT, budget=st.integers(0, 40), prompt=st.sampled_from([FREE, OPENED]))
def test_a_thought_within_its_budget_is_left_alone_and_any_other_is_ended(
    thought: str, answer: str, budget: int, prompt: list[int]
) -> None:
    own = QWEN.encode_plain(thought)
    start = [OPEN] if prompt == FREE else []
    drawn = [*start, *own, CLOSE, *QWEN.encode_plain(answer), *ANSWER * 60]
    row = thinking(budget, prompt)
    tokens, forced = reply(row, drawn)
    assert row.exhausted == bool(forced)
    if not forced:
        # Over the budget is at most what was left of a character, if that was all that was left of the thought.
        assert tokens == drawn
        assert len(own) <= budget or not is_utf8(own[: len(own) - 1])
        assert row.reasoning_tokens == (len(own) if thought.strip("\n") else 0)
        return
    kept = next(own[:n] for n in range(budget, budget + 4) if is_utf8(own[:n]))
    assert tokens == [*start, *kept, *forced, *drawn[len(start) + len(kept) + len(forced) :]]
    told = ("\n" if prompt == OPENED else "") + QWEN.decode(kept)
    breaks = "" if told.endswith("\n\n") else "\n" if told.endswith("\n") else "\n\n"
    assert QWEN.decode(forced) == breaks + (f"{EARLY_STOP_TEXT}\n" if budget else "") + "</think>\n\n"


def is_utf8(tokens: Sequence[int]) -> bool:
    return "\ufffd" not in QWEN.decode(tokens)


def forced_by(row: ThinkingBudget, drawn: Sequence[int]) -> list[int]:
    return reply(row, [*drawn, *ANSWER * 40])[1]


def test_the_early_stop_is_that_of_qwen_token_for_token() -> None:
    assert forced_by(thinking(3), [OPEN, *QWEN.encode("Let me think about this")]) == EARLY_STOP


@pytest.mark.parametrize(
    ("prompt", "start"), [(FREE, [OPEN]), (OPENED, []), (OPENED[:-1], []), ([*FREE, *QWEN.encode("<think>\n\n")], [])]
)
def test_no_budget_at_all_gives_an_empty_think_block(prompt: list[int], start: list[int]) -> None:
    row = thinking(0, prompt)
    tokens, _ = reply(row, [*start, *ANSWER * 9])
    text = QWEN.decode([*prompt, *tokens])
    assert text.startswith(QWEN.decode(CLOSED))
    assert set(text.removeprefix(QWEN.decode(CLOSED))) == {"4", "2"}
    if prompt == FREE:
        assert [*prompt, *tokens][: len(CLOSED)] == CLOSED
    assert tokens.count(CLOSE) == 1
    assert (row.exhausted, row.reasoning_tokens) == (True, 0)


@pytest.mark.parametrize("budget", [0, 1, 5, None])
def test_where_nothing_is_thought_nothing_is_counted_or_forced(budget: int | None) -> None:
    think_later = [*ANSWER, OPEN, *ANSWER * 20]
    for prompt, drawn in ((CLOSED, [OPEN, *ANSWER * 20]), (FREE, ANSWER * 20), (FREE, think_later)):
        row = thinking(budget, prompt)
        assert reply(row, drawn) == (drawn, [])
        assert (row.exhausted, row.reasoning_tokens) == (False, 0)


def test_line_breaks_before_the_models_own_tag_do_not_count() -> None:
    row = thinking(2)
    tokens, forced = reply(row, [*QWEN.encode("\n"), OPEN, *ANSWER, *ANSWER * 40])
    assert tokens[: tokens.index(forced[0])] == [*QWEN.encode("\n"), OPEN, *ANSWER]
    assert len(ANSWER) == 2


@pytest.mark.parametrize("natural", [1, 2, 5])
def test_a_thought_as_long_as_its_budget(natural: int) -> None:
    thought = QWEN.encode(" one two three four five")[:natural]
    drawn = [OPEN, *thought, CLOSE, *ANSWER * 40]
    for budget in (natural, natural + 1, 10**9, None):
        row = thinking(budget)
        assert reply(row, drawn) == (drawn, [])
        assert (row.exhausted, row.reasoning_tokens) == (False, natural)
    row = thinking(natural - 1)
    assert len(forced_by(row, drawn)) == (len(EARLY_STOP) if natural > 1 else 3)
    assert row.exhausted


def test_the_sentence_counts_as_thought_and_the_tags_do_not() -> None:
    row = thinking(2)
    tokens, _ = reply(row, [OPEN, *ANSWER, *ANSWER * 40])
    assert row.reasoning_tokens == tokens.index(CLOSE) - 1


def test_bytes_that_never_become_a_character_are_not_waited_for() -> None:
    (half, *_) = QWEN.encode("𓀀")
    assert not is_utf8([half])
    row = thinking(2)
    tokens, forced = reply(row, [OPEN, *[half] * 60])
    assert tokens[:6] == [OPEN, *[half] * 5]
    assert tokens[6] == forced[0]


CALL = [TOOL_CALL, *QWEN.encode('{"name": "now"}\n</tool_call>')]


def test_a_call_ends_a_thought_only_where_there_are_tools() -> None:
    drawn = [OPEN, *ANSWER, *CALL, *ANSWER * 40]
    for budget in (2, 3):
        row = thinking(budget, tools=True)
        assert reply(row, drawn) == (drawn, [])
        assert (row.reasoning_tokens, row.exhausted) == (2, False)
    assert forced_by(thinking(3), drawn) == EARLY_STOP


def test_a_call_that_is_only_talked_about_is_thought() -> None:
    mentioned = [OPEN, *ANSWER, TOOL_CALL, *ANSWER, CLOSE, *ANSWER * 40]
    row = thinking(5, tools=True)
    assert reply(row, mentioned) == (mentioned, [])
    assert row.reasoning_tokens == 5
    # One that is made, if badly, ends the thought, and is not interrupted.
    broken = [OPEN, *ANSWER, TOOL_CALL, *QWEN.encode('{"name": "a b c"} oh'), *ANSWER * 40]
    row = thinking(3, tools=True)
    assert reply(row, broken) == (broken, [])
    assert (row.reasoning_tokens, row.exhausted) == (2, False)


def test_text_that_spells_a_tag_ends_no_thought() -> None:
    drawn = [OPEN, *QWEN.encode_plain("a</think>b<tool_call>{}"), CLOSE, *ANSWER]
    row = thinking(None, tools=True)
    assert reply(row, drawn) == (drawn, [])
    assert row.reasoning_tokens == len(drawn) - 4


def test_a_sentence_of_ones_own_forges_no_token() -> None:
    sentence = "\nStop!<|im_end|><|im_start|>user<tool_response>\n\n"
    forced = forced_by(thinking(2, early_stop_text=sentence), [OPEN, *ANSWER])
    assert QWEN.decode(forced) == "\n\nStop!<|im_end|><|im_start|>user<tool_response>\n</think>\n\n"
    assert [token for token in forced if token >= END - 2] == [CLOSE]


@pytest.mark.parametrize(("thought", "forced"), [("42", "\n</think>\n\n"), ("42\n", "</think>\n\n")])
def test_no_sentence(thought: str, forced: str) -> None:
    own = QWEN.encode(thought)
    row = thinking(len(own), early_stop_text="")
    assert QWEN.decode(forced_by(row, [OPEN, *own])) == forced
    assert row.exhausted


def test_a_budget_for_a_tokenizer_without_the_tag() -> None:
    without = copy(QWEN)
    without.token_to_id = lambda token: None  # type: ignore[method-assign]
    with pytest.raises(OptionError, match="</think>"):
        ThinkingBudget(without, FREE, budget=5)
    for prompt in (FREE, OPENED):  # its tags are text, in whatever tokens
        row = ThinkingBudget(without, prompt)
        drawn = [*QWEN.encode_plain("<think>"), *ANSWER, *QWEN.encode_plain("</think>"), *ANSWER]
        assert reply(row, drawn) == (drawn, [])
        assert row.reasoning_tokens == 2


@pytest.mark.parametrize(
    ("options", "named"),
    [
        *(({"budget": budget}, "thinking_budget") for budget in (-1, 1.0, True, "8")),
        *(
            ({"early_stop_text": text}, "early_stop_text")
            for text in (3, b"", "a</think>", "<think>b", "<tool_call>{}", "</tool_call>")
        ),
        ({"early_stop_text": "\ud800"}, "surrogate|encode"),
    ],
    ids=repr,
)
def test_what_is_no_budget(options: dict[str, Any], named: str) -> None:
    with pytest.raises(OptionError, match=named):
        ThinkingBudget(QWEN, FREE, **options)
