"""The demo model's small talk: as the template writes it, never with a call, its held-out phrases never trained on."""

from __future__ import annotations

import itertools
import random

import pytest
from demo import data, greetings
from demo.greetings import ANSWERS, small_talk
from demo.source import CARD_PROMPTS, CARD_WORDS, Source
from demo.tasks import Exchange

from mlxqwen.text.tokenizer import Tokenizer


def _conversations(count: int) -> list[data.Conversation]:
    source = Source(random.Random(0))
    return [greetings.small_talk_conversation(source) for _ in range(count)]


def test_training_text_is_what_the_template_writes_and_fits_the_context(tokenizer: Tokenizer) -> None:
    for conversation in _conversations(300):
        ids = tokenizer.apply_chat_template(list(conversation.messages), tools=list(conversation.tools))
        assert tokenizer.decode(ids) == data.render(conversation)
        assert len(ids) <= 512


def test_nothing_is_called_with_tools_at_hand_or_without() -> None:
    conversations = _conversations(500)
    assert {bool(conversation.tools) for conversation in conversations} == {True, False}
    for conversation in conversations:
        for message in conversation.messages:
            assert "tool_calls" not in message
            assert message["role"] != "tool"


def test_what_a_tool_at_hand_would_do_is_never_refused() -> None:
    source = Source(random.Random(1))
    for _ in range(100):
        asked = small_talk(source, "a missing tool", ["clock"]).question
        assert any(character.isdigit() for character in asked)
        asked = small_talk(source, "a missing tool", ["calculator"]).question
        assert not any(character.isdigit() for character in asked)


@pytest.mark.parametrize("kind", [kind for kind in ANSWERS if kind != "a missing tool"])
def test_held_out_phrases_are_never_trained_on(kind: str) -> None:
    trained, held_out = (
        {_bare(small_talk(source, kind).question) for _ in range(400)}
        for source in (Source(random.Random(2)), Source(random.Random(3), "held-out"))
    )
    assert len(held_out) >= 3
    assert not trained & held_out


def _bare(text: str) -> str:
    return text.lower().rstrip("?!.？！。")


def test_the_bare_phrases_are_trained_on() -> None:
    source = Source(random.Random(4))
    assert {"hello", "hi", "hey", "good morning"} <= {_bare(small_talk(source, "hello").question) for _ in range(400)}


def test_the_cards_words_and_prompts_are_never_trained_on() -> None:
    said = [message["content"] for conversation in _conversations(2000) for message in conversation.messages]
    whole = "\n".join(said).lower()
    assert not [word for word in CARD_WORDS if word in whole]
    assert not set(said) & set(CARD_PROMPTS)


@pytest.mark.parametrize("kind", ANSWERS)
def test_only_its_own_sentences_answer_a_saying(kind: str) -> None:
    asked = small_talk(Source(random.Random(5)), kind)
    assert greetings.is_answered(asked, asked.answer)
    assert not greetings.is_answered(asked, asked.answer[:-1])
    assert not greetings.is_answered(asked, "")


def test_a_greeting_may_be_answered_by_the_introduction_alone() -> None:
    for kind, other in itertools.product(("hello", "hello (Chinese)"), ("thanks", "goodbye (Chinese)")):
        answer = ANSWERS[kind][0]
        introduction = answer[answer.index("！" if "！" in answer else " ") + 1 :]
        assert greetings.is_answered(Exchange(kind, "", "", "", ""), introduction)
        assert not greetings.is_answered(Exchange(other, "", "", "", ""), introduction)
