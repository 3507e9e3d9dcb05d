"""The benchmark's measures of guesses, on the demo model: counts and shares, no times."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from benchmarks import accuracy, agreement, speculating
from benchmarks.accuracy import Way

from mlxqwen.engine.engine import Engine
from mlxqwen.engine.speculation.draft_model import DraftModel
from mlxqwen.engine.speculation.prompt_lookup import PromptLookup
from mlxqwen.engine.token_stream import generate_tokens
from mlxqwen.files.hub import DEMO_FOLDER
from mlxqwen.model.loading import load_model
from mlxqwen.sampling.params import SamplingParams

GREEDY = SamplingParams(temperature=0.0)


@pytest.fixture(scope="module")
def engine() -> Engine:
    """Of the demo model."""
    return Engine.load()


def test_the_same_model_guesses_every_token_right(engine: Engine) -> None:
    """All guesses are accepted but those behind the end of the reply, and a pass settles several tokens."""
    prompts, draft = speculating.questions(engine, ["banana"]), load_model(DEMO_FOLDER)
    savings = speculating.measure(engine, prompts, lambda: DraftModel(draft), GREEDY, turns=1)
    assert savings.drafted - 8 <= savings.accepted <= savings.tokens
    assert savings.passes < savings.tokens / 2
    assert len(savings.ratios) == 1


def test_lookup_guesses_an_answer_that_is_in_the_prompt(engine: Engine) -> None:
    first, again = (
        speculating.measure(
            engine, speculating.questions(engine, ["banana"], answered_before=before), PromptLookup, GREEDY, turns=1
        )
        for before in (False, True)
    )
    assert again.tokens == first.tokens
    assert again.passes < first.passes / 2


def test_another_reply_with_guesses_is_an_error(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    real = generate_tokens
    calls: Iterator[int] = iter((8, 9))
    monkeypatch.setattr(
        speculating,
        "generate_tokens",
        lambda *args, **options: real(*args, **{**options, "max_tokens": next(calls)}),
    )
    with pytest.raises(ValueError, match="another reply than without guesses"):
        speculating.measure(engine, speculating.questions(engine, ["banana"]), PromptLookup, GREEDY, turns=1)


def test_the_line_of_a_table_by_hand() -> None:
    assert speculating.Savings(10, 8, 6, 4, [1.0, 3.0, 2.0]).cells() == ("10", "8", "75%", "0.40", "2.00")
    assert speculating.Savings(10, 0, 0, 10, [1.0]).cells()[2] == "–"


def test_a_model_agrees_with_itself_always_and_with_itself_in_two_bits_less(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agreement, "_TOKENS", 12)
    monkeypatch.setattr(agreement, "_SEEDS", 2)
    prompts, params = speculating.questions(engine, ["banana"]), SamplingParams(temperature=1.0, seed=3)
    same, most = agreement.agreement(engine.model, engine.model, prompts, params)
    assert same == 1.0
    assert most == pytest.approx(1.0, abs=1e-5)
    _, less = agreement.agreement(engine.model, speculating.draft_model(2), prompts, params)
    assert 0.0 < less < 0.999


def test_replies_with_lookup_are_the_same(engine: Engine) -> None:
    assert agreement.same_reply_counts(engine, 2, SamplingParams(temperature=1.0)) == 2


def test_the_line_of_a_conversion(tmp_path: Path) -> None:
    source, target, bits, error, *marks = accuracy.converted(Way("bf16", 8), tmp_path / "8", count=2)
    assert (source, target) == ("BF16", "8-bit")
    assert 8.5 < float(bits) < 8.6
    assert 0.1 < float(error.removesuffix(" %")) < 1
    assert marks == ["100 %", "100 %"]
