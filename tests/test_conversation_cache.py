"""What a conversation reads again and what it does not: counts, equality with fresh runs, ways back."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from typing import Any

import mlx.core as mx
import pytest

from mlxqwen import Conversation, Done, Engine, make_cache
from mlxqwen.cache import KVCache
from mlxqwen.cache.prefix import PrefixCache, common_prefix
from mlxqwen.cache.snapshot import Snapshot
from mlxqwen.engine.events import Event
from mlxqwen.engine.generation import generate_tokens
from mlxqwen.errors import CacheError, GenerationError, OptionError
from mlxqwen.model.qwen3 import Qwen3ForCausalLM
from mlxqwen.sampling.params import SamplingParams
from mlxqwen.text.tokenizer import Tokenizer
from tests.conftest import random_model
from tests.scripted_model import ScriptedModel, scripted_engine
from tests.test_tokenizer import QWEN
from tests.tolerance import assert_close

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


@pytest.fixture
def scripted(demo: tuple[Qwen3ForCausalLM, Tokenizer]) -> tuple[Engine, ScriptedModel]:
    return scripted_engine(*demo)


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


def held(conversation: Conversation) -> tuple[int, ...]:
    return tuple(conversation._held._tokens)


def assert_holds(cache: KVCache, tokens: Sequence[int], model: Qwen3ForCausalLM) -> None:
    """The cache holds exactly what reading `tokens` at once leaves in a new one (of unquantized numbers)."""
    assert cache.offset == len(tokens)
    if not tokens:
        return
    new = make_cache(model, max_kv_size=cache.max_kv_size, keep=cache.keep)
    model.model(mx.array([tokens]), new)
    slots = cache.placement.slots_for(len(tokens))
    for ours, theirs in zip(cache, new, strict=True):
        assert_close(ours.keys[0][..., :slots, :], theirs.keys[0][..., :slots, :])
        assert_close(ours.values[0][..., :slots, :], theirs.values[0][..., :slots, :])


# Counts and equality


@pytest.mark.parametrize(
    ("cache", "options"),
    [
        *((cache, {}) for cache in CACHES),
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
    options = {"seed": 5, "max_tokens": 30, **options}
    conversation = Conversation(engine, system="Be brief.", **cache, **options)
    for turn, question in enumerate(QUESTIONS):
        before, model.read = held(conversation), 0
        done = done_of(conversation.stream(question))
        assert model.read == done.usage.prompt_tokens - done.usage.cached_tokens
        assert done.usage.cached_tokens == len(before)
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
    assert (first.usage.prompt_tokens, conversation.cache.offset) == (header, header)

    model.read = 0
    say(engine, model, "Yes.")
    second = done_of(conversation.stream("Sure?"))
    new = len(
        engine.tokenizer.encode(f"{answer}<|im_end|>\n<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n")
    )
    assert (second.usage.cached_tokens, model.read) == (header, new)


def test_an_answer_that_history_repeats_is_not_read_again(
    demo: tuple[Qwen3ForCausalLM, Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of models that never think: their prompts end where their answers stand in history."""
    engine, model = scripted_engine(*demo)
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    monkeypatch.setitem(engine.tokenizer.chat_templates, "default", template)
    caches: list[dict[str, Any]] = [{}, {"max_kv_size": 32}]
    for cache in caches:
        conversation = Conversation(engine, **cache)
        reply = say(engine, model, "There are three of them, if you count with care and look at each one of them.")
        first = done_of(conversation.stream("How many?"))
        assert conversation.cache.offset == first.usage.prompt_tokens + len(reply) - 1
        model.read = 0
        say(engine, model, "Yes.")
        second = done_of(conversation.stream("Sure?"))
        end = engine.tokenizer.encode("<|im_end|>\n<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n")
        assert model.read == len(end) == second.usage.prompt_tokens - second.usage.cached_tokens
        # Anew it is answered from the mark, or by going back.
        model.read = 0
        retried = done_of(conversation.retry(max_tokens=1))
        assert model.read == retried.usage.prompt_tokens - retried.usage.cached_tokens == 1
        assert conversation.cache.offset > 32


@pytest.mark.parametrize("cache", CACHES, ids=str)
def test_calls_of_tools_and_what_was_thought_before_them_are_not_read_again(
    scripted: tuple[Engine, ScriptedModel], cache: dict[str, Any]
) -> None:
    engine, model = scripted
    conversation = Conversation(engine, tools=TOOLS, **cache)
    reply = say(engine, model, f"<think>\nI need the time.\n</think>\n\n{CALL}")
    first = done_of(conversation.stream("What time is it?"))
    assert first.finish_reason == "tool_calls"
    (call,) = conversation.messages[-1]["tool_calls"]
    assert (call["type"], call["function"]["name"]) == ("function", "clock")
    assert conversation.cache.offset == first.usage.prompt_tokens + len(reply) - 1

    result = {"role": "tool", "tool_call_id": call["id"], "content": "12:00"}
    prompt = engine.prompt([*conversation.messages, result], tools=TOOLS)
    model.read = 0
    say(engine, model, "<think>\nNoon.\n</think>\n\nIt is noon.")
    second = done_of(conversation.stream(result))
    assert second.usage.cached_tokens == first.usage.prompt_tokens + len(reply) - 1
    assert model.read == len(prompt) - second.usage.cached_tokens
    assert [message["role"] for message in conversation.messages] == ["user", "assistant", "tool", "assistant"]

    # The next question leaves out all that was thought, back to the first header.
    model.read = 0
    say(engine, model, "<think>\n\n</think>\n\nYou are welcome.")
    third = done_of(conversation.stream("Thanks."))
    start = first.usage.prompt_tokens
    assert third.usage.cached_tokens in ((start,) if "max_kv_size" not in cache else (start - 1,))


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
    told = [one.token for one in seeing]
    assert told == [one.token for one in whole]
    assert told != [one.token for one in blind]


def test_changed_history_is_read_from_where_it_differs(scripted: tuple[Engine, ScriptedModel]) -> None:
    engine, model = scripted
    options: dict[str, Any] = {"seed": 1, "max_tokens": 20}
    conversation = Conversation(engine, system="Be brief.", **options)
    for question in QUESTIONS[:2]:
        conversation.chat(question)

    def check(*, shares: Sequence[Any]) -> None:
        """The next turn is that of a fresh run, and reads all but what the held ids share with the prompt."""
        before = held(conversation)
        prompt = engine.prompt([*conversation.messages, {"role": "user", "content": "And now?"}])
        model.read = 0
        done = done_of(conversation.stream("And now?"))
        assert done.usage.cached_tokens == min(common_prefix(before, prompt), len(prompt) - 1)
        assert model.read == len(prompt) - done.usage.cached_tokens
        assert done.usage.cached_tokens >= len(shares)
        assert done.tokens == fresh(engine, conversation.messages[:-1], {}, **options).tokens
        assert_holds(conversation.cache, held(conversation), engine.model)

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


def test_a_cache_that_was_used_elsewhere_is_read_anew(scripted: tuple[Engine, ScriptedModel]) -> None:
    engine, _ = scripted
    conversation = Conversation(engine, seed=1, max_tokens=10)
    conversation.chat(QUESTIONS[0])
    list(generate_tokens(engine.model, [1, 2, 3], cache=conversation.cache, max_tokens=3))
    done = done_of(conversation.stream(QUESTIONS[1]))
    assert done.usage.cached_tokens == 0
    assert done.tokens == fresh(engine, conversation.messages[:-1], {}, seed=1, max_tokens=10).tokens


@pytest.mark.parametrize("window", [None, 64])
def test_counts_with_the_tokenizer_and_template_of_the_releases(window: int | None) -> None:
    engine, model = scripted_engine(random_model(vocab_size=QWEN.vocab_size, context=1024), QWEN)
    conversation = Conversation(engine, max_kv_size=window)
    back = 0 if window is None else 1  # a ring goes back to where the last question can be answered anew
    say(engine, model, f"<think>\nI need the time.\n</think>\n\n{CALL}")
    first = done_of(conversation.stream("What time is it?", tools=TOOLS))
    (call,) = first.reply.tool_calls
    say(engine, model, "<think>\nNoon.\n</think>\n\nIt is noon.")
    result = {"role": "tool", "tool_call_id": call.id, "content": "12:00"}
    second = done_of(conversation.stream(result, tools=TOOLS))
    assert second.usage.cached_tokens == first.usage.prompt_tokens + first.usage.completion_tokens - 1
    say(engine, model, "Bye.")
    third = done_of(conversation.stream("Thanks.", tools=TOOLS, thinking=False))
    assert third.usage.cached_tokens == first.usage.prompt_tokens - back
    say(engine, model, "<think>\nBye?\n</think>\n\nBye.")
    empty_block = len(QWEN.encode("<think>\n\n</think>\n\n"))
    fourth = done_of(conversation.stream("Bye.", tools=TOOLS))
    assert fourth.usage.cached_tokens == third.usage.prompt_tokens - empty_block
    assert conversation.cache.offset == fourth.usage.prompt_tokens - back


# Rings


def test_a_ring_reads_a_long_conversation_once(scripted: tuple[Engine, ScriptedModel]) -> None:
    engine, model = scripted
    conversation = Conversation(engine, max_kv_size=48, seed=2, max_tokens=30, prefill_chunk=7)
    total = 0
    for turn in range(6):
        before, model.read = conversation.cache.offset, 0
        done = done_of(conversation.stream(f"{QUESTIONS[turn % 3]} For the {turn}. time!"))
        assert before == done.usage.cached_tokens
        read = model.read
        assert read == done.usage.prompt_tokens - before
        again = fresh(engine, conversation.messages[:-1], {"max_kv_size": 48}, seed=2, max_tokens=30)
        assert done.tokens == again.tokens
        # Chunks of one length end less than one token for each of them before the place that was aimed at.
        assert 0 < done.usage.prompt_tokens - conversation.cache.offset <= -(-read // 6)
        assert_holds(conversation.cache, held(conversation), engine.model)
        total += read
    assert conversation.cache.offset > 3 * 48
    assert total < conversation.cache.offset * 1.1


@pytest.mark.parametrize("kv_bits", [None, 8])
def test_what_snapshots_set_aside(model: Qwen3ForCausalLM, kv_bits: int | None) -> None:
    """Of a line the tokens behind `start`, of a ring the window, and that only once it is written to."""
    tokens = mx.array([[5, 6, 7, 8] * 20])
    line = make_cache(model, kv_bits=kv_bits)
    model.model(tokens, line)
    slots = line[0].keys[0].shape[-2]
    for start, count in ((0, 80), (70, 10), (80, 0), (99, 0)):
        assert Snapshot(line, start).nbytes * slots == line.nbytes * count

    ring = make_cache(model, max_kv_size=512, kv_bits=kv_bits)
    for _ in range(8):
        model.model(tokens, ring)
        mx.eval(ring.state)
    gc.collect()
    held_bytes = mx.get_active_memory()
    snapshot = Snapshot(ring)
    mx.eval([part for pair in snapshot._parts for stored in pair for part in stored])
    assert mx.get_active_memory() == held_bytes
    for _ in range(3):
        model.model(mx.array([[3]]), ring)
        mx.eval(ring.state)
    assert 0.8 * ring.nbytes <= mx.get_active_memory() - held_bytes <= 1.2 * ring.nbytes
    assert snapshot.nbytes == ring.nbytes


@pytest.mark.parametrize("cache", CACHES, ids=str)
def test_a_snapshot_can_be_gone_back_to_again_and_again(model: Qwen3ForCausalLM, cache: dict[str, Any]) -> None:
    def ahead() -> mx.array:
        return model.logits(model.model(mx.array([[9, 10, 11]]), ours))

    ours = make_cache(model, **cache)
    model.model(mx.array([[5, 6, 7, 8] * 20]), ours)
    snapshot = Snapshot(ours, 70)
    expected = ahead()
    mx.eval(expected)
    for step in range(3):
        if ours.max_kv_size is None:
            ours.trim(70)
        model.model(mx.array([[3] * (step + 1) * 5]), ours)
        snapshot.restore()
        assert (ours.offset, snapshot.offset) == (80, 80)
        assert_close(ahead(), expected)
    empty = make_cache(model, **cache)
    nothing = Snapshot(empty)
    model.model(mx.array([[1, 2]]), empty)
    nothing.restore()
    assert empty.offset == 0


# The cache below conversations


def test_a_prefix_that_is_no_prefix_is_refused(model: Qwen3ForCausalLM) -> None:
    cache = make_cache(model)
    list(generate_tokens(model, [1, 2, 3], cache=cache, max_tokens=1))
    for count in (-1, 3, True, "2", 1.0):
        with pytest.raises(OptionError, match=r"cached_tokens: found .*, expected an integer from 0 to 2"):
            generate_tokens(model, [1, 2, 3], cache=cache, cached_tokens=count)  # type: ignore[arg-type]
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
    (one,) = stream
    (alone,) = generate_tokens(model, [1, 2, 9], **greedy)
    assert (one.token, cache.offset) == (alone.token, 3)


def test_rows_may_share_their_front(model: Qwen3ForCausalLM) -> None:
    prompts = [[5, 6, 7, 8], [5, 6, 9], [5, 6, 7, 8, 9, 10]]
    cache = make_cache(model, batch_size=3)
    list(generate_tokens(model, [[5, 6]] * 3, cache=cache, max_tokens=1))
    cache.trim(2)
    options: dict[str, Any] = {"max_tokens": 4, "eos_token_ids": [], "sampling": SamplingParams(temperature=0)}
    rows: list[list[int]] = [[], [], []]
    for one in generate_tokens(model, prompts, cache=cache, cached_tokens=2, **options):
        rows[one.row].append(one.token)
    assert rows == [[one.token for one in generate_tokens(model, prompt, **options)] for prompt in prompts]


def test_a_failed_turn_leaves_a_ring_in_its_tool_loop_where_it_was(scripted: tuple[Engine, ScriptedModel]) -> None:
    """It goes back to a mark for another question, and must get forth again."""
    engine, model = scripted
    conversation = Conversation(engine, tools=TOOLS, max_kv_size=48)
    say(engine, model, f"<think>\nI need the time.\n</think>\n\n{CALL}")
    conversation.chat("What time is it?")
    before = held(conversation)
    assert len(before) > 48
    for _ in range(2):
        model.say([])
        model.fail_after = 3
        with pytest.raises(GenerationError):
            list(conversation.stream("Never mind."))
        model.fail_after = None
        assert held(conversation) == before
        assert_holds(conversation.cache, before, engine.model)
    (call,) = conversation.messages[-1]["tool_calls"]
    done = done_of(conversation.stream({"role": "tool", "tool_call_id": call["id"], "content": "12:00"}, max_tokens=3))
    assert done.usage.cached_tokens == len(before)


def test_a_ring_goes_back_to_no_mark_of_another_history(scripted: tuple[Engine, ScriptedModel]) -> None:
    engine, model = scripted
    conversation = Conversation(engine, tools=TOOLS, system="Be brief.", max_kv_size=48)
    say(engine, model, f"<think>\nI need the time.\n</think>\n\n{CALL}")
    conversation.chat("What time is it?")
    assert conversation.cache.offset > 48
    conversation.system = "Be long."
    model.say([])
    done = done_of(conversation.stream("Never mind.", seed=1, max_tokens=8))
    assert done.usage.cached_tokens == 0
    again = fresh(engine, conversation.messages[:-1], {"max_kv_size": 48}, tools=TOOLS, seed=1, max_tokens=8)
    assert done.tokens == again.tokens
    assert_holds(conversation.cache, held(conversation), engine.model)


def test_an_interrupted_roll_back_is_made_up_for(model: Qwen3ForCausalLM) -> None:
    prefix = PrefixCache(make_cache(model))
    assert prefix.begin([1, 2, 3]) == 0
    list(generate_tokens(model, [1, 2, 3], cache=prefix.cache, cached_tokens=0, max_tokens=1))
    prefix.commit([1, 2, 3], 3)
    assert (prefix.begin([1, 2, 9, 9]), prefix._tokens) == (2, [])
    list(generate_tokens(model, [1, 2, 9, 9], cache=prefix.cache, cached_tokens=2, max_tokens=1))
    # Neither committed nor rolled back.
    assert prefix.begin([1, 2, 3, 4]) == 3
    prefix.roll_back()
    assert_holds(prefix.cache, [1, 2, 3], model)
    assert prefix._tokens == [1, 2, 3]
