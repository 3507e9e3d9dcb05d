"""What a conversation reads again and what it does not: counts, equality with fresh runs, ways back.

The most that a turn can know is the front that its prompt shares with what was read before. It reads the rest, and at
most a block of tokens more.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from mlxqwen import Conversation, Done, Engine, make_cache
from mlxqwen.cache.blocks import BLOCK
from mlxqwen.engine.events import Event
from mlxqwen.engine.prefixes import common_prefix
from mlxqwen.engine.schedulers import scheduler_of
from mlxqwen.engine.token_stream import generate_tokens
from mlxqwen.errors import CacheError, GenerationError, OptionError
from mlxqwen.model.qwen3 import Qwen3ForCausalLM
from mlxqwen.sampling.params import SamplingParams
from mlxqwen.text.tokenizer import Tokenizer
from tests.conftest import random_model
from tests.scripted_model import ScriptedModel, scripted_engine
from tests.test_tokenizer import QWEN

CACHES: list[dict[str, Any]] = [{}, {"max_kv_size": 64}, {"kv_bits": 8}, {"max_kv_size": 48, "keep": 2, "kv_bits": 8}]
QUESTIONS = ("How many r's in strawberry?", "Really? /no_think", "And in blueberry? /think", "Thanks.")
CALL = '<tool_call>\n{"name": "clock", "arguments": {"zone": "UTC"}}\n</tool_call>'
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "clock",
            "description": "Tells the time.",
            "parameters": {"type": "object", "properties": {"zone": {"type": "string"}}},
        },
    }
]


# Of models that never think: prompts end where their answers stand in history.
PLAIN_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(params=[None, "off"], ids=["store", "pins"])
def scripted(small: tuple[Qwen3ForCausalLM, Tokenizer], request: pytest.FixtureRequest) -> tuple[Engine, ScriptedModel]:
    """With a store for all, and with nothing kept but what open conversations pin."""
    return scripted_engine(*small, prefix_cache=request.param)


def done_of(events: Iterator[Event]) -> Done:
    *_, done = events
    assert isinstance(done, Done)
    return done


def say(engine: Engine, model: ScriptedModel, text: str) -> list[int]:
    """Script a reply, end token included."""
    tokens = engine.tokenizer.encode(f"{text}<|im_end|>")
    model.say(tokens)
    return tokens


def fresh(engine: Engine, messages: Sequence[Any], cache: dict[str, Any], **options: Any) -> Done:
    return done_of(engine.stream(messages, cache=make_cache(engine.model, **cache), **options))


class Turns:
    """What the turns of a conversation have read, beside it.

    Attributes:
        text: all that the last turn that counts has read: its prompt, and its reply without the last token.
    """

    def __init__(self, conversation: Conversation, model: ScriptedModel) -> None:
        self.conversation = conversation
        self.model = model
        self.text: list[int] = []

    def check(self, events: Iterator[Event], *, back: int = 0, **options: Any) -> Done:
        """Take a turn to its end: it reads what it says it reads, and no more than a block of what it could know.

        Args:
            back: how many tokens before what could be known a ring goes on.
            options: of the turn, as far as its prompt depends on them.
        """
        self.model.read = 0
        done = done_of(events)
        said = self.conversation.messages[:-1]
        given = {**self.conversation.options, **options}
        prompt = self.conversation.engine.prompt(
            said, **{name: given[name] for name in ("thinking", "tools") if name in given}
        )
        usage = done.usage
        assert usage.prompt_tokens == len(prompt)
        assert self.model.read == usage.prompt_tokens - usage.cached_tokens
        known = min(common_prefix(self.text, prompt), len(prompt) - 1)
        assert known - back - BLOCK < usage.cached_tokens
        self.text = [*prompt, *done.tokens[:-1]]
        return done


# Counts and equality


@pytest.mark.parametrize(
    ("cache", "options"),
    [
        *((cache, {}) for cache in CACHES),
        ({"kv_bits": 4}, {}),
        ({}, {"sampling": {"temperature": 0}}),
        ({}, {"thinking_budget": 5}),
        ({}, {"thinking": False}),
        ({"max_kv_size": 64}, {"thinking": False}),
    ],
    ids=str,
)
def test_every_turn_is_that_of_a_fresh_run_and_reads_what_is_new(
    scripted: tuple[Engine, ScriptedModel], cache: dict[str, Any], options: dict[str, Any]
) -> None:
    engine, model = scripted
    options = {"seed": 5, "max_tokens": 18, **options}
    conversation = Conversation(engine, system="Be brief.", **cache, **options)
    turns = Turns(conversation, model)
    for turn, question in enumerate(QUESTIONS):
        done = turns.check(conversation.stream(question))
        assert (done.usage.cached_tokens > 0) == (turn > 0)
        again = fresh(engine, conversation.messages[:-1], cache, **options)
        assert (done.tokens, done.reply, done.finish_reason) == (again.tokens, again.reply, again.finish_reason)
        assert again.usage.cached_tokens == 0
    assert len(conversation.messages) == 1 + 2 * len(QUESTIONS)


def test_a_thought_costs_the_answer_behind_it_read_once_more(scripted: tuple[Engine, ScriptedModel]) -> None:
    engine, model = scripted
    conversation = Conversation(engine)
    thought, answer = "<think>\nIt is about letters, and there are three.\n</think>\n\n", "There are three."
    say(engine, model, thought + answer)
    first = done_of(conversation.stream("How many?"))
    assert first.reply.reasoning is not None
    header = len(engine.prompt([{"role": "user", "content": "How many?"}]))
    assert first.usage.prompt_tokens == header

    model.read = 0
    say(engine, model, "Yes.")
    second = done_of(conversation.stream("Sure?"))
    new = len(
        engine.tokenizer.encode(f"{answer}<|im_end|>\n<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n")
    )
    assert second.usage.cached_tokens == header // BLOCK * BLOCK
    assert model.read == new + header % BLOCK


def test_an_answer_that_history_repeats_is_not_read_again(
    scripted: tuple[Engine, ScriptedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of models that never think: their prompts end where their answers stand in history."""
    engine, model = scripted
    monkeypatch.setitem(engine.tokenizer.chat_templates, "default", PLAIN_TEMPLATE)
    caches: list[dict[str, Any]] = [{}, {"max_kv_size": 32}]
    for cache in caches:
        conversation = Conversation(engine, **cache)
        turns = Turns(conversation, model)
        say(engine, model, "There are three of them, if you count with care and look at each one of them.")
        turns.check(conversation.stream("How many?"))
        held = len(turns.text)
        assert held > 32
        say(engine, model, "Yes.")
        second = turns.check(conversation.stream("Sure?"))
        # A ring is kept where the reply ended, to the token.
        assert second.usage.cached_tokens == (held if cache else held // BLOCK * BLOCK)
        # Anew it is answered from the mark, or from the last whole block.
        retried = turns.check(conversation.retry(max_tokens=1))
        if cache:
            assert retried.usage.cached_tokens == retried.usage.prompt_tokens - 1


@pytest.mark.parametrize("cache", CACHES, ids=str)
def test_calls_of_tools_and_what_was_thought_before_them_are_not_read_again(
    scripted: tuple[Engine, ScriptedModel], cache: dict[str, Any]
) -> None:
    engine, model = scripted
    conversation = Conversation(engine, tools=TOOLS, **cache)
    turns = Turns(conversation, model)
    say(engine, model, f"<think>\nI need the time.\n</think>\n\n{CALL}")
    first = turns.check(conversation.stream("What time is it?"))
    first_text = turns.text
    assert first.finish_reason == "tool_calls"
    (call,) = conversation.messages[-1]["tool_calls"]
    assert (call["type"], call["function"]["name"]) == ("function", "clock")

    result = {"role": "tool", "tool_call_id": call["id"], "content": "12:00"}
    say(engine, model, "<think>\nNoon.\n</think>\n\nIt is noon.")
    second = turns.check(conversation.stream(result))
    assert common_prefix(first_text, turns.text) == len(first_text)
    if "max_kv_size" in cache:
        assert second.usage.cached_tokens == len(first_text)
    assert [message["role"] for message in conversation.messages] == ["user", "assistant", "tool", "assistant"]

    # The next question leaves out all that was thought, back to the first header.
    say(engine, model, "<think>\n\n</think>\n\nYou are welcome.")
    third = turns.check(conversation.stream("Thanks."), back=1)
    start = first.usage.prompt_tokens
    assert third.usage.cached_tokens in ((start // BLOCK * BLOCK,) if "max_kv_size" not in cache else (start - 1,))


def test_penalties_know_the_part_of_the_prompt_that_is_not_read(scripted: tuple[Engine, ScriptedModel]) -> None:
    engine, _ = scripted
    options: dict[str, Any] = {"sampling": {"repetition_penalty": 1.8, "seed": 3}, "max_tokens": 30, "thinking": False}
    conversation = Conversation(engine, **options)
    for question in QUESTIONS:
        done = done_of(conversation.stream(question))
        assert done.tokens == fresh(engine, conversation.messages[:-1], {}, **options).tokens
    # A penalty that saw only the new part would have said something else at least once.
    prompt = engine.prompt(conversation.messages[:-1], thinking=False)
    params = SamplingParams(repetition_penalty=1.8, seed=3)
    cache = make_cache(engine.model)
    list(generate_tokens(engine.model, prompt[:-4], max_tokens=1, cache=cache))
    blind = list(generate_tokens(engine.model, prompt[-4:], max_tokens=30, cache=cache, sampling=params))
    cache.trim(len(prompt) - 4)
    seeing = generate_tokens(
        engine.model, prompt, max_tokens=30, cache=cache, cached_tokens=len(prompt) - 4, sampling=params
    )
    whole = generate_tokens(engine.model, prompt, max_tokens=30, sampling=params)
    told = [one.token for _, one in seeing]
    assert told == [one.token for _, one in whole]
    assert told != [one.token for _, one in blind]


def test_changed_history_is_read_from_where_it_differs(
    scripted: tuple[Engine, ScriptedModel],
) -> None:
    engine, model = scripted
    options: dict[str, Any] = {"seed": 1, "max_tokens": 20}
    conversation = Conversation(engine, system="Be brief.", **options)
    turns = Turns(conversation, model)
    for question in QUESTIONS[:2]:
        turns.check(conversation.stream(question))

    def check(*, shares: Sequence[Any]) -> None:
        """The next turn is that of a fresh run, and reads all but what it shares with what was read."""
        before = turns.text
        done = turns.check(conversation.stream("And now?"))
        known = min(common_prefix(before, turns.text), done.usage.prompt_tokens - 1)
        assert known >= len(shares)
        if not scheduler_of(engine.model).store.keeps:
            assert done.usage.cached_tokens == known // BLOCK * BLOCK
        assert done.tokens == fresh(engine, conversation.messages[:-1], {}, **options).tokens

    system = engine.tokenizer.encode("<|im_start|>system\n")
    conversation.messages[1]["content"] = "How many r's in raspberry?"
    check(shares=[*system, *engine.tokenizer.encode("Be brief.<|im_end|>\n<|im_start|>user\nHow many r's in")])
    conversation.system = "Be long."
    check(shares=[*system, *engine.tokenizer.encode("Be")])
    conversation.undo()
    check(shares=system)
    conversation.drop_oldest()
    check(shares=system)
    conversation.system = None
    check(shares=[])
    conversation.messages[:] = []
    check(shares=[])


@pytest.mark.parametrize("window", [None, 64])
@pytest.mark.parametrize("store", [None, "off"])
def test_counts_with_the_tokenizer_and_template_of_the_releases(window: int | None, store: str | None) -> None:
    engine, model = scripted_engine(random_model(vocab_size=QWEN.vocab_size, context=1024), QWEN, prefix_cache=store)
    conversation = Conversation(engine, max_kv_size=window)
    turns = Turns(conversation, model)

    def is_all(done: Done, known: int) -> bool:
        """Of a ring to the token that its last question can be answered anew from; else in whole blocks."""
        return done.usage.cached_tokens == (known // BLOCK * BLOCK if window is None else known)

    back = 0 if window is None else 1
    say(engine, model, f"<think>\nI need the time.\n</think>\n\n{CALL}")
    first = turns.check(conversation.stream("What time is it?", tools=TOOLS), tools=TOOLS)
    (call,) = first.reply.tool_calls
    say(engine, model, "<think>\nNoon.\n</think>\n\nIt is noon.")
    result = {"role": "tool", "tool_call_id": call.id, "content": "12:00"}
    second = turns.check(conversation.stream(result, tools=TOOLS), tools=TOOLS)
    assert is_all(second, first.usage.prompt_tokens + first.usage.completion_tokens - 1)
    say(engine, model, "Bye.")
    third = turns.check(
        conversation.stream("Thanks.", tools=TOOLS, thinking=False), back=1, tools=TOOLS, thinking=False
    )
    assert is_all(third, first.usage.prompt_tokens - back)
    say(engine, model, "<think>\nBye?\n</think>\n\nBye.")
    empty_block = len(QWEN.encode("<think>\n\n</think>\n\n"))
    fourth = turns.check(conversation.stream("Bye.", tools=TOOLS), back=1, tools=TOOLS)
    assert is_all(fourth, third.usage.prompt_tokens - empty_block)


# What keeps what was read


def test_what_open_conversations_have_read_stays_and_goes_with_them(
    small: tuple[Qwen3ForCausalLM, Tokenizer],
) -> None:
    """A store of a few blocks has long let go of it."""
    engine, model = scripted_engine(*small, prefix_cache="25KB")
    store = scheduler_of(engine.model).store
    conversations = [Conversation(engine, system=f"{n}. Be brief. " * 8, thinking=False) for n in range(4)]
    turns = [Turns(conversation, model) for conversation in conversations]
    for question in QUESTIONS[:2]:
        for one in turns:
            one.check(one.conversation.stream(question, max_tokens=8, seed=1))
    assert store.held_nbytes > 2 * store.capacity
    for one in turns[1:]:
        one.conversation.clear()
    del conversations, turns, one
    gc.collect()
    assert store.held_nbytes <= store.capacity


def test_a_conversation_whose_steps_another_thread_takes(
    small: tuple[Qwen3ForCausalLM, Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reply's end may be told before it is in the store."""
    engine, model = scripted_engine(*small, prefix_cache="off")
    first = threading.Thread(target=lambda: engine.chat([{"role": "user", "content": "Hello"}], max_tokens=1))
    first.start()
    first.join()
    monkeypatch.setitem(engine.tokenizer.chat_templates, "default", PLAIN_TEMPLATE)
    for cache in CACHES:
        conversation = Conversation(engine, seed=2, max_tokens=24, **cache)
        turns = Turns(conversation, model)
        for question in QUESTIONS:
            say(engine, model, "There are three of them, if you count with care and look at each one.")
            done = turns.check(conversation.stream(question), back=1)
            assert (done.usage.cached_tokens > 0) == (question != QUESTIONS[0])


def test_a_conversation_that_was_cleared_holds_nothing(small: tuple[Qwen3ForCausalLM, Tokenizer]) -> None:
    engine, _ = scripted_engine(*small, prefix_cache="off")
    for cache in CACHES:
        conversation = Conversation(engine, system="Be brief.", max_tokens=8, **cache)
        for question in QUESTIONS[:2]:
            conversation.chat(question)
        store = scheduler_of(engine.model).store
        assert store.held_nbytes > 0
        conversation.clear()
        gc.collect()
        assert store.held_nbytes == 0
        assert done_of(conversation.stream(QUESTIONS[0])).usage.cached_tokens == 0


def test_conversations_share_what_they_have_in_common(small: tuple[Qwen3ForCausalLM, Tokenizer]) -> None:
    engine, _ = scripted_engine(*small)
    system = "You count letters, and answer in one short sentence, whatever else is said to you."
    first, second = (Conversation(engine, system=system, max_tokens=8, seed=1) for _ in range(2))
    assert done_of(first.stream(QUESTIONS[0])).usage.cached_tokens == 0
    shared = common_prefix(
        engine.prompt(first.messages[:2]), engine.prompt([first.messages[0], {"role": "user", "content": QUESTIONS[2]}])
    )
    done = done_of(second.stream(QUESTIONS[2]))
    assert done.usage.cached_tokens == shared // BLOCK * BLOCK > 0
    assert done.tokens == fresh(engine, second.messages[:-1], {}, max_tokens=8, seed=1).tokens


# Rings


def test_a_ring_reads_a_long_conversation_once(scripted: tuple[Engine, ScriptedModel]) -> None:
    engine, model = scripted
    conversation = Conversation(engine, max_kv_size=48, seed=2, max_tokens=30, prefill_chunk=7)
    turns = Turns(conversation, model)
    total = 0
    for turn in range(6):
        done = turns.check(conversation.stream(f"{QUESTIONS[turn % 3]} For the {turn}. time!"), back=1)
        again = fresh(engine, conversation.messages[:-1], {"max_kv_size": 48}, seed=2, max_tokens=30)
        assert done.tokens == again.tokens
        total += done.usage.prompt_tokens - done.usage.cached_tokens
    assert done.usage.prompt_tokens > 3 * 48
    assert total < done.usage.prompt_tokens * 1.1 + 6 * BLOCK


@pytest.mark.parametrize("length", range(40, 90, 7))
def test_a_ring_that_fills_up_within_a_prompt_can_be_gone_back_to(
    small: tuple[Qwen3ForCausalLM, Tokenizer], length: int
) -> None:
    """Wherever the window of 64 ends: within the prompt, in its last tokens, in the reply."""
    engine, model = scripted_engine(*small, prefix_cache="off")
    conversation = Conversation(engine, max_kv_size=64, max_tokens=40, seed=3)
    turns = Turns(conversation, model)
    opening = engine.prompt([{"role": "user", "content": ""}])
    say(engine, model, "<think>\nIt is about letters, and there are three of them, I think.\n</think>\n\nThree.")
    turns.check(conversation.stream("r" + " r" * (length - len(opening) - 1)))
    model.say([])
    done = turns.check(conversation.stream("Sure?"), back=1)
    again = fresh(engine, conversation.messages[:-1], {"max_kv_size": 64}, max_tokens=40, seed=3)
    assert done.tokens == again.tokens


# The cache below conversations


def test_a_prefix_that_is_no_prefix_is_refused(model: Qwen3ForCausalLM) -> None:
    cache = make_cache(model)
    list(generate_tokens(model, [1, 2, 3], cache=cache, max_tokens=1))
    for count in (-1, 3, True, "2", 1.0):
        with pytest.raises(OptionError, match=r"cached_tokens: found .*, expected an integer from 0 to 2"):
            generate_tokens(model, [1, 2, 3], cache=cache, cached_tokens=count)
    with pytest.raises(CacheError, match="cache of 3 tokens: cannot go back to the first 4"):
        generate_tokens(model, [1, 2, 3, 4, 5], cache=cache, cached_tokens=4)
    ring = make_cache(model, max_kv_size=8)
    list(generate_tokens(model, list(range(20)), cache=ring, max_tokens=1))
    with pytest.raises(CacheError, match="cannot go back to the first 10"):
        generate_tokens(model, list(range(20)), cache=ring, cached_tokens=10)
    assert (cache.offset, ring.offset) == (3, 20)


def test_nothing_is_forgotten_before_generation_starts(model: Qwen3ForCausalLM) -> None:
    cache = make_cache(model)
    greedy: dict[str, Any] = {"sampling": SamplingParams(temperature=0), "max_tokens": 1}
    list(generate_tokens(model, [1, 2, 3, 4], cache=cache, max_tokens=1))
    stream = generate_tokens(model, [1, 2, 9], cache=cache, cached_tokens=2, **greedy)
    assert cache.offset == 4
    ((_, one),) = stream
    ((_, alone),) = generate_tokens(model, [1, 2, 9], **greedy)
    assert (one.token, cache.offset) == (alone.token, 3)


def test_rows_may_share_their_front(model: Qwen3ForCausalLM) -> None:
    prompts = [[5, 6, 7, 8], [5, 6, 9], [5, 6, 7, 8, 9, 10]]
    cache = make_cache(model, batch_size=3)
    list(generate_tokens(model, [[5, 6]] * 3, cache=cache, max_tokens=1))
    cache.trim(2)
    options: dict[str, Any] = {"max_tokens": 4, "eos_token_ids": [], "sampling": SamplingParams(temperature=0)}
    rows: list[list[int]] = [[], [], []]
    for row, one in generate_tokens(model, prompts, cache=cache, cached_tokens=2, **options):
        rows[row].append(one.token)
    assert rows == [[one.token for _, one in generate_tokens(model, prompt, **options)] for prompt in prompts]


def test_a_failed_turn_leaves_a_ring_in_its_tool_loop_where_it_was(scripted: tuple[Engine, ScriptedModel]) -> None:
    """Another question goes back, and what was read before it must not be lost."""
    engine, model = scripted
    conversation = Conversation(engine, tools=TOOLS, max_kv_size=48)
    turns = Turns(conversation, model)
    say(engine, model, f"<think>\nI need the time.\n</think>\n\n{CALL}")
    turns.check(conversation.stream("What time is it?"))
    assert len(turns.text) > 48
    for _ in range(2):
        model.say([])
        model.fail_after = 3
        with pytest.raises(GenerationError):
            list(conversation.stream("Never mind."))
        model.fail_after = None
    (call,) = conversation.messages[-1]["tool_calls"]
    held = len(turns.text)
    result = {"role": "tool", "tool_call_id": call["id"], "content": "12:00"}
    done = turns.check(conversation.stream(result, max_tokens=3))
    assert done.usage.cached_tokens == held


def test_a_ring_goes_back_to_no_mark_of_another_history(scripted: tuple[Engine, ScriptedModel]) -> None:
    engine, model = scripted
    conversation = Conversation(engine, tools=TOOLS, system="Be brief.", max_kv_size=48)
    say(engine, model, f"<think>\nI need the time.\n</think>\n\n{CALL}")
    conversation.chat("What time is it?")
    conversation.system = "Be long."
    model.say([])
    done = done_of(conversation.stream("Never mind.", seed=1, max_tokens=8))
    assert done.usage.cached_tokens == 0
    again = fresh(engine, conversation.messages[:-1], {"max_kv_size": 48}, tools=TOOLS, seed=1, max_tokens=8)
    assert done.tokens == again.tokens
