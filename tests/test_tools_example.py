"""The example of tools: its calculator calculates, and the demo uses it and the clock."""

from __future__ import annotations

import re
from typing import Any

import pytest
import tools_example
from tools_example import calculator, clock, transcript

from mlxqwen import Engine


@pytest.fixture(scope="module")
def engine(demo: tuple[Any, Any]) -> Engine:
    return Engine(*demo)


@pytest.mark.parametrize(
    ("expression", "result"),
    [("1234 * 56", "69104"), ("1 - 2 * -3", "7"), ("(1 + 2) / 4", "0.75"), ("0.5 + 0.25", "0.75")],
)
def test_the_calculator_knows_four_operations(expression: str, result: str) -> None:
    assert calculator(expression) == result


@pytest.mark.parametrize("expression", ["__import__('os')", "2 ** 9", "'a' * 3", "x", "f(1)", "[1]", "(lambda: 1)()"])
def test_the_calculator_calculates_and_does_nothing_else(expression: str) -> None:
    with pytest.raises(ValueError, match="cannot calculate"):
        calculator(expression)


def test_the_clock_shows_hours_and_minutes() -> None:
    assert re.fullmatch(r"[0-2]\d:[0-5]\d", clock())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("question", ["What is 1234 * 56?", "Calculate 1234 * 56."])
def test_the_demo_calculates_by_the_calculator(engine: Engine, question: str, seed: int) -> None:
    assert list(transcript(engine, question, {"calculator": calculator, "clock": clock}, seed)) == [
        f"Question: {question}",
        "Thought:  I will use the calculator.",
        'Call:     calculator {"expression": "1234 * 56"}',
        "Result:   69104",
        "Thought:  The calculator says 69104.",
        "Answer:   1234 * 56 = 69104.",
    ]


@pytest.mark.parametrize("seed", range(3))
def test_the_demo_tells_the_time_that_the_clock_shows(engine: Engine, seed: int) -> None:
    def clock() -> str:
        """Tell the time of day."""
        return "14:32"

    lines = list(transcript(engine, "What time is it?", {"clock": clock, "calculator": calculator}, seed))
    assert "Call:     clock {}" in lines
    assert lines[-1] == "Answer:   It is 14:32."


def test_a_tool_that_fails_is_told_to_the_model(engine: Engine) -> None:
    lines = list(transcript(engine, "What is 5032 * 61?", {"calculator": _broken}, seed=0))
    assert "Result:   Error: OSError: not available" in lines
    assert lines[-1] == "Answer:   The calculator does not work."


def _broken(expression: str) -> str:
    """Evaluate an arithmetic expression.

    Args:
        expression: The expression.
    """
    raise OSError("not available")


def test_the_command_answers_one_question_after_the_other(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["tools_example.py", "--seed", "1", "What is 77 * 4321?", "What time is it?"])
    tools_example.main()
    first, second, end = capsys.readouterr().out.split("\n\n")
    assert first.endswith("Answer:   77 * 4321 = 332717.")
    assert re.search(r"Answer:   It is [0-2]\d:[0-5]\d\.$", second)
    assert end == ""
