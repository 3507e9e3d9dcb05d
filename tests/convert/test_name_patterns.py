"""Expressions for names of modules against Python's own, and what they may take."""

from __future__ import annotations

import random
import re

import pytest
from transformers.quantizers.quantizers_utils import should_convert_module

from mlxqwen_convert.exemptions import Exemptions
from mlxqwen_convert.name_patterns import NamePattern, Work

NAMES = [
    "model.layers.0.mlp.down_proj", "model.layers.11.mlp.down_proj", "model.layers.1.mlp.experts.7.up_proj",
    "model.layers.1.mlp.gate", "model.layers.1.mlp.gate_proj", "model.layers.1.self_attn.q_proj", "lm_head",
    "model.embed_tokens", "model.norm",
]  # fmt: skip
# Entries that are literal names, expressions or both, as configs have them.
ENTRIES = [
    "lm_head", "model.layers.1", "mlp.gate", "down_proj", "model.layers.1.mlp",
    r"model\.layers\.\d+\.mlp\.down_proj", "model.layers.0.*", ".*gate$", r"model\.layers\.(0|11)\.", r"^model\.norm$",
    r".*\.(down|up)_proj",
    r"model\.layers\.[0-9]{1,2}\.mlp", r"(?:model\.)?layers", r".*experts.*", r"[^.]+", r"\w+\.norm",
    r"model\.layers\.1{2}", r"x?", r".+?norm", r"model.layers.(?P<number>\d)\.mlp", r".*self_attn\..*|lm_head",
]  # fmt: skip


@pytest.mark.parametrize("entry", ENTRIES)
def test_lists_name_what_transformers_leaves_unconverted(entry: str) -> None:
    listed = Exemptions("modules_to_not_convert", [entry])
    for name in NAMES:
        assert listed.names(name) is not should_convert_module(name, [entry]), name
    assert listed.notes() == []


def test_random_expressions_match_as_pythons_do() -> None:
    random_ = random.Random(0)
    pieces = [
        "a",
        "b",
        ".",
        "\\.",
        "(",
        "(?:",
        ")",
        "|",
        "*",
        "+",
        "?",
        "{1,2}",
        "{2}",
        "{2,}",
        "[ab]",
        "[^a]",
        "[a-b.]",
        "\\d",
    ]
    compared = 0
    while compared < 6_000:
        text = "".join(random_.choices(pieces, k=random_.randint(1, 9)))
        try:
            pattern = NamePattern(text, Work(1_000_000))
        except ValueError:
            continue
        whole = re.compile(rf"(?:{text})(?:(?<=\.)|(?=\.|$))")
        for _ in range(6):
            name = "".join(random_.choices("ab.1", k=random_.randint(0, 6)))
            assert pattern.matches(name) == (whole.match(name) is not None), (text, name)
            compared += 1


def test_expressions_that_python_would_try_for_ages_take_few_steps() -> None:
    work = Work(100_000)
    assert not NamePattern("(a+)+(a|a)*(a?){30}$", work).matches("a" * 5_000 + "b")
    assert work.left > 0


@pytest.mark.parametrize(
    "text", ["(?=a)", "(?!a)", "(?i)a", r"\1", r"\b", "(", ")", "[a", "a{", "a{3,2}", "*", "a**", "x" * 600]
)
def test_what_is_not_known_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"\S"):
        NamePattern(text, Work(1_000))


@pytest.mark.parametrize("text", ["(" * 40 + "a" + ")" * 40, "((((a{9}){9}){9}){9}){9}", "(a|b|c|d){999}"])
def test_expressions_have_a_size(text: str) -> None:
    with pytest.raises(ValueError, match=r"more than|deeper than"):
        NamePattern(text, Work(10_000_000))


def test_long_lists_are_compared_at_dots() -> None:
    names = [f"model.layers.{number}.mlp.gate" for number in range(5_000)]
    listed = Exemptions("modules_to_not_convert", [*names, "down_proj"])
    assert listed.names("model.layers.4999.mlp.gate")
    assert listed.names("model.layers.1.mlp.down_proj")
    assert not listed.names("model.layers.5000.mlp.gate")
    assert not listed.names("model.layers.1.mlp.up_proj")


def test_a_dot_at_the_end_names_what_is_below() -> None:
    listed = Exemptions("modules_to_not_convert", ["model.layers.1."])
    assert listed.names("model.layers.1.mlp.gate")
    assert not listed.names("model.layers.11.mlp.gate")


def test_all_expressions_of_a_list_have_steps_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlxqwen_convert.exemptions._MOST_STEPS", 20_000)
    listed = Exemptions("modules_to_not_convert", [f"(.*{letter}.*){{20}}" for letter in "abcdefghij" * 12])
    for number in range(3_000):
        listed.names(f"model.layers.{number}.mlp.{number * 7919 % 65_537:x}")
    assert "has entries that are not read" in listed.notes()[0]
