"""Thinking budgets, over replies that are known beforehand."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxqwen.chat.budget import ThinkingBudget
from mlxqwen.chat.pipeline import ReplyPipeline
from mlxqwen.chat.thinking import EARLY_STOP_TEXT, begins_in_thought
from mlxqwen.errors import OptionError
from mlxqwen.sampling.constraint import Constraint
from mlxqwen.sampling.sampler import BAD_TOKEN
from mlxqwen.text.tokenizer import Tokenizer
from tests.test_tokenizer import QWEN

OPEN, CLOSE, TOOL_CALL, END = QWEN.encode("<think></think><tool_call><|im_end|>")
FREE = QWEN.encode("<|im_start|>assistant\n")
OPENED = [*FREE, *QWEN.encode("<think>\n")]
CLOSED = [*FREE, *QWEN.encode("<think>\n\n</think>\n\n")]
EARLY_STOP = QWEN.encode(f"\n\n{EARLY_STOP_TEXT}\n</think>\n\n")
ANSWER = QWEN.encode("42")


class Row:
    """One reply: its pipeline, and its budget, if it has one."""

    def __init__(
        self,
        budget: int | None,
        prompt: Sequence[int] = FREE,
        *,
        tools: bool = False,
        sentence: str = EARLY_STOP_TEXT,
        expect_thought: bool = False,
        split: bool = True,
        tokenizer: Tokenizer = QWEN,
    ) -> None:
        begins = begins_in_thought(tokenizer, prompt, expect_thought=expect_thought)
        self.pipeline = ReplyPipeline(tokenizer, begins=begins, tools=tools, split=split)
        self.budget = (
            None if budget is None else ThinkingBudget(tokenizer, self.pipeline, budget, sentence, [END], prompt=prompt)
        )

    @property
    def exhausted(self) -> bool:
        return self.budget is not None and self.budget.exhausted

    @property
    def reasoning_tokens(self) -> int:
        return self.pipeline.reasoning_tokens


def reply(row: Row, drawn: Sequence[int]) -> tuple[list[int], list[int]]:
    """What becomes of a reply that a model would draw like this: its tokens, and those of them that were forced."""
    tokens: list[int] = []
    forced: list[int] = []
    for own in drawn:
        token = own
        if row.budget is not None:
            is_forcing = row.budget.is_forcing
            token = row.budget.settle(own)
            assert row.budget.settle(own) == token
            assert is_forcing or token == own
        tokens.append(token)
        ends = token == END
        row.pipeline.feed(token, ends=ends)
        if row.budget is not None:
            row.budget.advance(token)
            kept = is_forcing and not row.budget.is_forcing and token == own
            forced += [token] if is_forcing and not (kept and own in (CLOSE, TOOL_CALL, END)) else []
        if ends:
            break
    assert row.budget is None or not row.budget.is_forcing
    return tokens, forced


TEXT = st.text("abc é∀🙂𓀀龘\n.", max_size=12)


@settings(deadline=None)
@given(thought=TEXT, answer=TEXT, budget=st.integers(0, 40), prompt=st.sampled_from([FREE, OPENED]))
def test_a_thought_within_its_budget_is_left_alone_and_any_other_is_ended(
    thought: str, answer: str, budget: int, prompt: list[int]
) -> None:
    own = QWEN.encode_plain(thought)
    start = [OPEN] if prompt == FREE else []
    drawn = [*start, *own, CLOSE, *QWEN.encode_plain(answer), *ANSWER * 60]
    row = Row(budget, prompt)
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


def forced_by(row: Row, drawn: Sequence[int]) -> list[int]:
    return reply(row, [*drawn, *ANSWER * 40])[1]


def test_the_early_stop_is_that_of_qwen_token_for_token() -> None:
    assert forced_by(Row(3), [OPEN, *QWEN.encode("Let me think about this")]) == EARLY_STOP


@pytest.mark.parametrize(
    ("prompt", "start"), [(FREE, [OPEN]), (OPENED, []), (OPENED[:-1], []), ([*FREE, *QWEN.encode("<think>\n\n")], [])]
)
def test_no_budget_at_all_gives_an_empty_think_block(prompt: list[int], start: list[int]) -> None:
    row = Row(0, prompt)
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
        row = Row(budget, prompt)
        assert reply(row, drawn) == (drawn, [])
        assert (row.exhausted, row.reasoning_tokens) == (False, 0)


def test_line_breaks_before_the_models_own_tag_do_not_count() -> None:
    row = Row(2)
    tokens, forced = reply(row, [*QWEN.encode("\n"), OPEN, *ANSWER, *ANSWER * 40])
    assert tokens[: tokens.index(forced[0])] == [*QWEN.encode("\n"), OPEN, *ANSWER]
    assert len(ANSWER) == 2


@pytest.mark.parametrize("natural", [1, 2, 5])
def test_a_thought_as_long_as_its_budget(natural: int) -> None:
    thought = QWEN.encode(" one two three four five")[:natural]
    drawn = [OPEN, *thought, CLOSE, *ANSWER * 40]
    for budget in (natural, natural + 1, 10**9, None):
        row = Row(budget)
        assert reply(row, drawn) == (drawn, [])
        assert (row.exhausted, row.reasoning_tokens) == (False, natural)
    row = Row(natural - 1)
    assert len(forced_by(row, drawn)) == (len(EARLY_STOP) if natural > 1 else 3)
    assert row.exhausted


def test_the_sentence_counts_as_thought_and_the_tags_do_not() -> None:
    row = Row(2)
    tokens, _ = reply(row, [OPEN, *ANSWER, *ANSWER * 40])
    assert row.reasoning_tokens == tokens.index(CLOSE) - 1


def test_bytes_that_never_become_a_character_are_not_waited_for() -> None:
    (half, *_) = QWEN.encode("𓀀")
    assert not is_utf8([half])
    row = Row(2)
    tokens, forced = reply(row, [OPEN, *[half] * 60])
    assert tokens[:6] == [OPEN, *[half] * 5]
    assert tokens[6] == forced[0]


CALL = [TOOL_CALL, *QWEN.encode('{"name": "now"}\n</tool_call>')]


def test_a_call_ends_a_thought_where_there_are_tools_and_nothing_follows() -> None:
    called = [OPEN, *ANSWER, *CALL]
    for budget in (2, 3):
        row = Row(budget, tools=True)
        assert reply(row, [*called, END]) == ([*called, END], [])
        row.pipeline.finish()
        assert (row.reasoning_tokens, row.exhausted) == (2, False)
        # Text behind it shows that it was only thought of, and the budget ends the thought then.
        tokens, forced = reply(Row(budget, tools=True), [*called, *ANSWER * 40])
        assert tokens[: len(called) + 1] == [*called, ANSWER[0]]
        assert tokens[len(called) + 1 :][: len(forced)] == forced == EARLY_STOP
    assert forced_by(Row(3), [*called, *ANSWER * 40]) == EARLY_STOP


def test_a_call_that_is_only_talked_about_is_thought() -> None:
    mentioned = [OPEN, *ANSWER, TOOL_CALL, *ANSWER, CLOSE, *ANSWER * 40]
    row = Row(5, tools=True)
    assert reply(row, mentioned) == (mentioned, [])
    assert row.reasoning_tokens == 5
    # One that is made badly is none, and the budget ends the thought as soon as that is known.
    broken = [OPEN, *ANSWER, TOOL_CALL, *QWEN.encode('{"name": "a b c"} oh')]
    row = Row(3, tools=True)
    tokens, forced = reply(row, [*broken, *ANSWER * 40])
    assert tokens[: len(broken)] == broken
    assert tokens[len(broken) : len(broken) + len(forced)] == forced == EARLY_STOP
    assert row.exhausted


def test_text_that_spells_a_tag_ends_no_thought() -> None:
    drawn = [OPEN, *QWEN.encode_plain("a</think>b<tool_call>{}"), CLOSE, *ANSWER]
    row = Row(None, tools=True)
    assert reply(row, drawn) == (drawn, [])
    assert row.reasoning_tokens == len(drawn) - 4


def test_a_sentence_of_ones_own_forges_no_token() -> None:
    sentence = "\nStop!<|im_end|><|im_start|>user<tool_response>\n\n"
    forced = forced_by(Row(2, sentence=sentence), [OPEN, *ANSWER])
    assert QWEN.decode(forced) == "\n\nStop!<|im_end|><|im_start|>user<tool_response>\n</think>\n\n"
    assert [token for token in forced if token >= END - 2] == [CLOSE]


@pytest.mark.parametrize(("thought", "forced"), [("42", "\n</think>\n\n"), ("42\n", "</think>\n\n")])
def test_no_sentence(thought: str, forced: str) -> None:
    own = QWEN.encode(thought)
    row = Row(len(own), sentence="")
    assert QWEN.decode(forced_by(row, [OPEN, *own])) == forced
    assert row.exhausted


def test_a_budget_for_a_tokenizer_without_the_tag() -> None:
    without = copy(QWEN)
    without.token_to_id = lambda token: None  # type: ignore[method-assign]
    with pytest.raises(OptionError, match="</think>"):
        Row(5, tokenizer=without)
    for prompt in (FREE, OPENED):  # its tags are text, in whatever tokens
        row = Row(None, prompt, tokenizer=without)
        drawn = [*QWEN.encode_plain("<think>"), *ANSWER, *QWEN.encode_plain("</think>"), *ANSWER]
        assert reply(row, drawn) == (drawn, [])
        assert row.reasoning_tokens == 2


@pytest.mark.parametrize("split", [True, False])
def test_an_end_token_right_behind_the_last_token_is_left_alone(split: bool) -> None:
    row = Row(2, OPENED, split=split)
    assert reply(row, [*ANSWER, END]) == ([*ANSWER, END], [])
    assert (row.exhausted, row.reasoning_tokens) == (False, 2)
    row = Row(0, OPENED)
    assert reply(row, [CLOSE, *ANSWER, END]) == ([CLOSE, *ANSWER, END], [])
    assert not row.exhausted


def test_later_draws_of_a_tag_do_not_stop_what_is_forced() -> None:
    row = Row(2, OPENED, tools=True)
    drawn = [*ANSWER, *ANSWER, *[CLOSE, TOOL_CALL, END] * 20]
    tokens = [row.budget.settle(own) for own in ANSWER] if row.budget else []
    for token in ANSWER:
        row.pipeline.feed(token)
        assert row.budget is not None
        row.budget.advance(token)
    for own in drawn[2:]:
        assert row.budget is not None
        if not row.budget.is_forcing:
            break
        token = row.budget.settle(own)
        tokens.append(token)
        row.pipeline.feed(token)
        row.budget.advance(token)
    assert tokens == [*ANSWER, *EARLY_STOP]


def test_logits_without_a_token_are_not_covered_up() -> None:
    row = Row(0, OPENED)
    assert row.budget is not None
    assert row.budget.settle(BAD_TOKEN) == BAD_TOKEN
    assert row.budget.settle(5) != 5


def test_guesses_are_free() -> None:
    row = Row(2, OPENED)
    assert row.budget is not None
    budget: Constraint = row.budget
    assert budget.mask() is None
    fork = budget.fork()
    fork.advance(5)
    assert fork.mask() is None
    assert not row.budget.is_forcing


@pytest.mark.parametrize("prompt", [OPENED, FREE])
def test_a_thought_that_is_expected_or_gone_on_with(prompt: list[int]) -> None:
    begun = [*prompt, *QWEN.encode("one two three four five six seven eight nine ten")] if prompt == OPENED else FREE
    row = Row(3, begun, expect_thought=True)
    tokens, forced = reply(row, [*ANSWER, *ANSWER * 40])
    assert tokens[:3] == [*ANSWER, ANSWER[0]]
    assert forced == EARLY_STOP


@pytest.mark.parametrize(
    ("options", "named"),
    [
        *(({"budget": budget}, "thinking_budget") for budget in (-1, 1.0, True, "8")),
        *(
            ({"budget": 5, "sentence": text}, "early_stop_text")
            for text in (3, b"", "a</think>", "<think>b", "<tool_call>{}", "</tool_call>")
        ),
        ({"budget": 5, "sentence": "\ud800"}, "surrogate|encode"),
    ],
    ids=repr,
)
def test_what_is_no_budget(options: dict[str, Any], named: str) -> None:
    with pytest.raises(OptionError, match=named):
        Row(**options)
