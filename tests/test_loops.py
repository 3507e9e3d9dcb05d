"""The loop detector: against the rule computed from scratch, and on texts that are no loops."""

from __future__ import annotations

import random
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxqwen.engine.loops import LoopDetector
from mlxqwen.errors import OptionError
from mlxqwen.text.tokenizer import Tokenizer


def looping_period(tokens: Sequence[int], min_tokens: int, repeats: int, max_period: int) -> int | None:
    """The rule, period by period."""
    for period in range(1, max_period + 1):
        length = period
        while length < len(tokens) and tokens[-1 - length] == tokens[-1 - length + period]:
            length += 1
        if length <= len(tokens) and length >= min_tokens and length >= repeats * period:
            return period
    return None


def first_alarm(tokens: Sequence[int], detector: LoopDetector) -> int | None:
    """How many tokens the detector has seen when it says that they loop."""
    return next((count for count, token in enumerate(tokens, start=1) if detector.feed(token)), None)


SMALL = st.fixed_dictionaries(
    {"min_tokens": st.integers(1, 30), "repeats": st.integers(3, 6), "max_period": st.integers(1, 10)}
)


@settings(max_examples=300, deadline=None)
@given(
    pieces=st.lists(st.tuples(st.lists(st.integers(0, 2), min_size=1, max_size=11), st.integers(1, 12)), max_size=8),
    rule=SMALL,
)
def test_the_rule_by_any_other_way(pieces: list[tuple[list[int], int]], rule: dict[str, int]) -> None:
    tokens = [token for piece, times in pieces for token in piece * times]
    expected = next(
        (count for count in range(1, len(tokens) + 1) if looping_period(tokens[:count], **rule) is not None), None
    )
    detector = LoopDetector(**rule)
    assert first_alarm(tokens, detector) == expected
    assert detector.period == (None if expected is None else looping_period(tokens[:expected], **rule))


@pytest.mark.parametrize("period", [1, 2, 3, 7, 127, 128, 129, 130, 255, 256, 500, 511, 512, 513, 1000, 1023, 1024])
@pytest.mark.parametrize("before", [0, 1, 255, 300, 5000])
def test_a_loop_is_found_at_the_very_token(period: int, before: int) -> None:
    numbers = random.Random(period + before)
    text = [numbers.randrange(10, 50_000) for _ in range(before)]
    cycle = [numbers.randrange(10, 50_000) for _ in range(period - 1)] + [period % 10]  # in no text before it
    detector = LoopDetector()
    needed = max(512, 4 * period)
    assert first_alarm(text + cycle * (needed // period + 1), detector) == before + needed
    assert detector.period == period


def test_cycles_longer_than_the_longest_are_none() -> None:
    numbers = random.Random(0)
    cycle = [numbers.randrange(50_000) for _ in range(1025)]
    assert first_alarm(cycle * 12, LoopDetector()) is None


def test_a_loop_that_never_quite_repeats_is_none() -> None:
    numbers = random.Random(1)
    cycle = [numbers.randrange(50_000) for _ in range(100)]
    rounds = [[*cycle, n] for n in range(100)]
    assert first_alarm([token for one in rounds for token in one], LoopDetector()) is None


def test_memory_and_work_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    from mlxqwen.engine import loops

    looked_at: list[int] = []
    smallest_periods = loops._smallest_periods

    def counted(tokens: Sequence[int]) -> list[int]:
        looked_at.append(len(tokens))
        return smallest_periods(tokens)

    monkeypatch.setattr(loops, "_smallest_periods", counted)
    detector = LoopDetector()
    numbers = random.Random(2)
    assert first_alarm([numbers.randrange(50_000) for _ in range(20_000)], detector) is None
    assert max(looked_at) == 4 * 1024
    assert sum(looked_at) <= 16 * 20_000
    assert len(detector._tokens) <= 4 * 1024 + 256


STDLIB = Path(textwrap.__file__).parent
TEXTS = {
    "numbers": ", ".join(map(str, range(1, 1001))),
    "enumeration": "".join(f"{n}. An item of the list.\n" for n in range(1, 1001)),
    "table": "".join(f"| {n} | {n * n} | {n**3} |\n| --- | --- | --- |\n" for n in range(1, 300)),
    "equal lines": "I must not talk in class.\n" * 20,
    "a rule": "=" * 400,
    "zeros": "[" + "0, " * 80 + "0]",
    "a matrix": "\n".join(" ".join("1" if row == column else "0" for column in range(30)) for row in range(30)),
    "json": "".join(f'{{"id": {n}, "name": "item", "tags": [], "active": true}},\n' for n in range(200)),
}


@pytest.mark.parametrize("name", TEXTS)
def test_texts_that_are_no_loops(tokenizer: Tokenizer, name: str) -> None:
    assert first_alarm(tokenizer.encode(TEXTS[name]), LoopDetector()) is None


@pytest.mark.parametrize(
    "module", ["encodings/cp1252", "encodings/iso8859_8", "html/entities", "textwrap", "keyword", "token", "string"]
)
def test_sources_are_no_loops(tokenizer: Tokenizer, module: str) -> None:
    text = (STDLIB / f"{module}.py").read_text(encoding="utf-8")
    assert first_alarm(tokenizer.encode(text), LoopDetector()) is None


def test_this_licence_is_no_loop(tokenizer: Tokenizer) -> None:
    text = (Path(__file__).parents[1] / "LICENSE").read_text(encoding="utf-8")
    assert first_alarm(tokenizer.encode(text), LoopDetector()) is None
    assert first_alarm(tokenizer.encode(text * 2), LoopDetector()) is None


def test_texts_that_are_loops(tokenizer: Tokenizer) -> None:
    sentence = "Wait, let me check that again. "
    for text in (sentence * 200, "1 + 1 = 2, so " * 200, f"Let me think.\n{sentence * 200}"):
        assert first_alarm(tokenizer.encode(text), LoopDetector()) is not None


@pytest.mark.parametrize(
    ("option", "values"),
    [("min_tokens", [0, -1, 1.5, True]), ("repeats", [2, 0, 3.5]), ("max_period", [0, None, "8"])],
)
def test_rules_out_of_range(option: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(OptionError, match=option):
            LoopDetector(**{option: value})
