"""Thoughts cut short in the demo model's data: cut by the tokens that a thinking budget forces on a reply."""

from __future__ import annotations

import random

import pytest
from demo import data
from demo.budget_tasks import cut_thought, ends_in_thought, thought_length
from demo.source import Source
from demo.tool_tasks import tool_conversation

from mlxqwen import batch_stream
from mlxqwen.chat.thinking import EARLY_STOP_TEXT
from mlxqwen.model.qwen3 import Qwen3ForCausalLM
from mlxqwen.text.tokenizer import Tokenizer

QUESTION = "<|im_start|>user\nHow many a's in banana?<|im_end|>\n<|im_start|>assistant\n"
REPLY = "<think>\nSpell it and count a: b a(1).\n</think>\n\nThere is 1 a.<|im_end|>\n"


def _cut(tokenizer: Tokenizer, budget: int, text: str = QUESTION + REPLY) -> tuple[str, list[float]]:
    ids = tokenizer.encode(text)
    cut, weights = cut_thought(ids, [1.0] * len(ids), tokenizer, budget)
    assert len(cut) == len(weights)
    return tokenizer.decode(cut), weights


@pytest.mark.parametrize("budget", [0, 1, 5, 12])
def test_a_cut_thought_ends_with_the_sentence_and_its_answer_follows(tokenizer: Tokenizer, budget: int) -> None:
    text, weights = _cut(tokenizer, budget)
    kept = tokenizer.decode(tokenizer.encode(REPLY)[1 : budget + 1])
    breaks = "\n\n" if not kept.endswith("\n") else "\n"
    sentence = f"{EARLY_STOP_TEXT}\n" if budget else ""
    forced = f"{breaks}{sentence}</think>\n\n"
    assert text == f"{QUESTION}<think>{kept}{forced}There is 1 a.<|im_end|>\n"
    assert weights.count(0.0) == len(tokenizer.encode(forced))
    assert weights.index(0.0) == len(tokenizer.encode(QUESTION)) + 1 + budget


def test_a_thought_within_its_budget_stays(tokenizer: Tokenizer) -> None:
    length = thought_length(tokenizer.encode(QUESTION + REPLY), tokenizer)
    assert _cut(tokenizer, length)[0] == QUESTION + REPLY
    assert _cut(tokenizer, length - 1)[0] != QUESTION + REPLY


def test_only_the_last_thought_is_cut(tokenizer: Tokenizer) -> None:
    text = _cut(tokenizer, 3, QUESTION + REPLY + QUESTION + REPLY)[0]
    assert text.startswith(QUESTION + REPLY + QUESTION)
    assert text.count(EARLY_STOP_TEXT) == 1


@pytest.mark.parametrize("budget", [0, 4, 9])
def test_the_model_is_shown_what_generation_forces(model: Qwen3ForCausalLM, tokenizer: Tokenizer, budget: int) -> None:
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "How many e's in teller?"}], add_generation_prompt=True
    )
    responses = batch_stream(
        model, tokenizer, [prompt], sampling={"seed": 0}, thinking_budget=budget, max_tokens=budget + 70
    )
    reply = [response.token for _, response in responses]
    close = tokenizer.encode("</think>\n\n")
    end = next(place for place in range(len(reply)) if reply[place : place + len(close)] == close)
    begun = [*prompt, *reply[: budget + 1]]
    ids = [*begun, *tokenizer.encode(" and so on.\n</think>\n\nThere are 2.")]
    cut, weights = cut_thought(ids, [1.0] * len(ids), tokenizer, budget)
    assert cut == [*prompt, *reply[: end + len(close)], *tokenizer.encode("There are 2.")]
    assert [token for token, weight in zip(cut, weights, strict=True) if weight] == [
        *begun,
        *tokenizer.encode("There are 2."),
    ]


def test_conversations_whose_last_reply_thinks_are_told_apart(tokenizer: Tokenizer) -> None:
    source = Source(random.Random(3))
    for make in (data.conversation, tool_conversation):
        seen = set()
        for _ in range(200):
            conversation = make(source)
            thinks = ends_in_thought(conversation)
            seen.add(thinks)
            last = data.render(conversation).rpartition("<|im_start|>assistant\n")[2]
            thought = last.partition("<think>")[2].partition("</think>")[0].strip()
            assert bool(thought) == thinks
        assert seen == {True, False}
