"""`prefix_cache=` and `prompt_cache=` of `Engine`: what replies share in one run, and from one run to the next.

The folder itself is tested in `test_disk_tier`, the store in `test_prefix_store`.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_map

from mlxqwen import Conversation, Done, Engine, make_cache
from mlxqwen.cache.blocks import BLOCK
from mlxqwen.engine.events import Event
from mlxqwen.engine.schedulers import scheduler_of
from mlxqwen.errors import CacheError, GenerationError, MlxqwenError, OptionError
from mlxqwen.model.qwen3 import Qwen3ForCausalLM
from mlxqwen.text.tokenizer import Tokenizer
from tests.conftest import random_model
from tests.scripted_model import ScriptedModel, scripted_engine

CACHES: list[dict[str, Any]] = [{}, {"max_kv_size": 24}, {"kv_bits": 8}, {"kv_bits": 4}]
QUESTIONS = ("How many r's in strawberry?", "What is 2 + 2?", "Reverse the word tree.")
SYSTEM = {"role": "system", "content": "You count letters, add numbers and reverse words, and do nothing else."}
GREEDY: dict[str, Any] = {"sampling": {"temperature": 0}, "max_tokens": 24, "thinking": False}

Loaded = tuple[Qwen3ForCausalLM, Tokenizer]


def ask(text: str, *before: dict[str, Any]) -> list[dict[str, Any]]:
    return [SYSTEM, *before, {"role": "user", "content": text}]


def done_of(events: Iterator[Event]) -> Done:
    *_, done = events
    assert isinstance(done, Done)
    return done


def whole_blocks(tokens: int) -> int:
    """Of a prompt that was read before: the last token is read again."""
    return (tokens - 1) // BLOCK * BLOCK


def run_of(small: Loaded, folder: Path, **options: Any) -> tuple[Engine, ScriptedModel]:
    """What another process would begin with: the same weights in another model object, and an empty store."""
    engine, model = scripted_engine(*small, prompt_cache=folder, **options)
    assert scheduler_of(engine.model).store.nbytes == 0
    return engine, model


# From one run to the next


@pytest.mark.parametrize("options", [{"seed": 3, "max_tokens": 24}, GREEDY], ids=["seeded", "greedy"])
@pytest.mark.parametrize("cache", CACHES, ids=str)
def test_replies_are_those_of_fresh_runs(
    small: Loaded, tmp_path: Path, cache: dict[str, Any], options: dict[str, Any]
) -> None:
    said: list[dict[str, Any]] = []
    for turn, question in enumerate((*QUESTIONS, QUESTIONS[0])):
        engine, model = run_of(small, tmp_path / "folder")
        with engine:
            messages = ask(question, *said)
            done = done_of(engine.stream(messages, **cache, **options))
            assert model.read == done.usage.prompt_tokens - done.usage.cached_tokens
            if "max_kv_size" not in cache:  # a window that has slid is kept in memory alone
                assert (done.usage.cached_tokens > 0) == (turn > 0)
            fresh = done_of(engine.stream(messages, cache=make_cache(engine.model, **cache), **options))
            assert (done.tokens, done.finish_reason) == (fresh.tokens, fresh.finish_reason)
        said += [messages[-1], {"role": "assistant", "content": done.reply.content}]


def test_what_one_run_has_read_the_next_does_not(small: Loaded, tmp_path: Path) -> None:
    counts = []
    for _ in range(2):
        engine, _ = run_of(small, tmp_path / "folder")
        with engine:
            counts.append([done_of(engine.stream(ask(text), **GREEDY)).usage for text in QUESTIONS])
    for first, second in zip(*counts, strict=True):
        assert second.cached_tokens == whole_blocks(first.prompt_tokens) >= first.cached_tokens


def test_the_reply_is_kept_for_what_follows_it(small: Loaded, tmp_path: Path) -> None:
    engine, model = run_of(small, tmp_path / "folder")
    tools = [{"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}}}]
    model.say(engine.tokenizer.encode('<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call><|im_end|>'))
    with engine:
        first = done_of(engine.stream(ask("What time is it?"), tools=tools))
    (call,) = first.reply.tool_calls
    messages = ask("What time is it?")
    messages += [
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": "1", "type": "function", "function": {"name": call.name, "arguments": "{}"}}],
        },
        {"role": "tool", "tool_call_id": "1", "content": "12:00"},
    ]
    engine, _ = run_of(small, tmp_path / "folder")
    with engine:
        second = done_of(engine.stream(messages, tools=tools, max_tokens=1))
    known = first.usage.prompt_tokens + first.usage.completion_tokens - 1
    assert known - BLOCK < second.usage.cached_tokens <= known


def test_conversations_and_batches_go_on_with_it(small: Loaded, tmp_path: Path) -> None:
    engine, _ = run_of(small, tmp_path / "folder")
    with engine:
        done_of(engine.stream(ask(QUESTIONS[0]), **GREEDY))
    engine, model = run_of(small, tmp_path / "folder")
    with engine:
        first = done_of(Conversation(engine, messages=[SYSTEM], **GREEDY).stream(QUESTIONS[0]))
        assert first.usage.cached_tokens == whole_blocks(first.usage.prompt_tokens)
    engine, model = run_of(small, tmp_path / "folder")
    with engine:
        for _, done in engine.batch([ask(text) for text in QUESTIONS], batch_size=3, **GREEDY):
            assert done.usage.cached_tokens > 0
        assert model.read < sum(len(engine.prompt(ask(text), thinking=False)) for text in QUESTIONS)


@pytest.mark.parametrize("cache", [{}, {"kv_bits": 8}], ids=str)
def test_it_goes_with_speculation(small: Loaded, tmp_path: Path, cache: dict[str, Any]) -> None:
    """Guesses that were wrong are not in the folder."""
    said: list[dict[str, Any]] = []
    for turn, question in enumerate(QUESTIONS[:2]):
        engine, _ = run_of(small, tmp_path / "folder", speculative="lookup")
        with engine:
            messages = ask(question, *said)
            done = done_of(engine.stream(messages, **cache, **GREEDY))
            assert (done.usage.cached_tokens > 0) == (turn > 0)
            plain = done_of(Engine(*small).stream(messages, cache=make_cache(small[0], **cache), **GREEDY))
            assert done.tokens == plain.tokens
        said += [messages[-1], {"role": "assistant", "content": done.reply.content}]


def test_one_changed_number_everywhere_is_another_model(tokenizer: Tokenizer, tmp_path: Path) -> None:
    def cached(change: Callable[[mx.array], mx.array]) -> int:
        model = random_model(vocab_size=tokenizer.vocab_size, context=256)
        model.update(tree_map(change, model.parameters()))
        with Engine(model, tokenizer, prompt_cache=tmp_path / "folder") as engine:
            return done_of(engine.stream(ask(QUESTIONS[0]), max_tokens=1)).usage.cached_tokens

    assert cached(lambda array: array) == 0
    assert cached(lambda array: array * 1.01) == 0
    assert cached(lambda array: array) > 0


def test_weights_that_are_replaced_while_it_runs(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Numbers of the old ones serve no reply of the new ones, and the other way round."""
    model = random_model(vocab_size=tokenizer.vocab_size, context=256)
    weights = model.parameters()
    with Engine(model, tokenizer, prompt_cache=tmp_path / "folder") as engine:

        def usage() -> tuple[int, tuple[int, ...]]:
            done = done_of(engine.stream(ask(QUESTIONS[0]), **GREEDY))
            return done.usage.cached_tokens, done.tokens

        before, again = usage(), usage()
        assert (before[0], again[0] > 0, again[1]) == (0, True, before[1])
        model.update(tree_map(lambda array: array * 0.5, weights))
        changed = usage()
        fresh = done_of(engine.stream(ask(QUESTIONS[0]), cache=make_cache(model), **GREEDY))
        assert changed == (0, fresh.tokens)
        model.update(weights)
        assert usage() == (again[0], before[1])  # from the folder


def test_a_reply_that_fails_or_is_left_leaves_what_was_read(small: Loaded, tmp_path: Path) -> None:
    for way in ("close", "NaN", "interrupt"):
        engine, model = run_of(small, tmp_path / way)
        with engine:
            events: Any = engine.stream(ask(QUESTIONS[0]), **GREEDY)
            if way == "NaN":
                model.fail_after = 3
                with pytest.raises(GenerationError):
                    list(events)
            else:
                next(events)
                if way == "close":
                    events.close()
                else:
                    with pytest.raises(KeyboardInterrupt):
                        events.throw(KeyboardInterrupt)
        engine, model = run_of(small, tmp_path / way)
        with engine:
            done = done_of(engine.stream(ask(QUESTIONS[0]), **GREEDY))
            assert done.usage.cached_tokens == whole_blocks(done.usage.prompt_tokens)
            fresh = done_of(engine.stream(ask(QUESTIONS[0]), cache=make_cache(engine.model), **GREEDY))
            assert done.tokens == fresh.tokens


def test_nothing_of_a_full_window_is_kept_in_the_folder(small: Loaded, tmp_path: Path) -> None:
    """In memory it is, for a conversation that goes on from there."""
    cache: dict[str, Any] = {"max_kv_size": 24}
    engine, _ = run_of(small, tmp_path / "folder")
    with engine:
        first = done_of(engine.stream(ask(QUESTIONS[0]), **cache, **GREEDY))
        assert first.usage.prompt_tokens > 24
        again = done_of(engine.stream(ask(QUESTIONS[0]), **cache, **GREEDY))
        assert again.usage.cached_tokens == again.usage.prompt_tokens - 1
    engine, _ = run_of(small, tmp_path / "folder")
    with engine:
        other = done_of(engine.stream(ask(QUESTIONS[0]), **cache, **GREEDY))
        assert other.usage.cached_tokens <= 24
        assert other.tokens == first.tokens == again.tokens


# In one run


@pytest.mark.parametrize("cache", CACHES, ids=str)
@pytest.mark.parametrize("size", [None, "12KB", "off"])
def test_a_store_of_any_size_changes_no_reply(small: Loaded, cache: dict[str, Any], size: str | None) -> None:
    engine, model = scripted_engine(*small, prefix_cache=size)
    for question in (*QUESTIONS, *QUESTIONS):
        model.read = 0
        done = done_of(engine.stream(ask(question), **cache, **GREEDY))
        assert model.read == done.usage.prompt_tokens - done.usage.cached_tokens
        fresh = done_of(engine.stream(ask(question), cache=make_cache(engine.model, **cache), **GREEDY))
        assert (done.tokens, fresh.usage.cached_tokens) == (fresh.tokens, 0)
        store = scheduler_of(engine.model).store
        assert store.held_nbytes == store.nbytes <= store.capacity
        if size == "off":
            assert done.usage.cached_tokens == 0
    if size is None and "max_kv_size" not in cache:
        assert done.usage.cached_tokens == whole_blocks(done.usage.prompt_tokens)


def test_a_salt_keeps_prompts_apart(small: Loaded) -> None:
    engine, _ = scripted_engine(*small)

    def cached(salt: str) -> int:
        return done_of(engine.stream(ask(QUESTIONS[0]), salt=salt, **GREEDY)).usage.cached_tokens

    assert cached("one") == 0
    assert cached("other") == 0
    assert cached("one") == cached("other") > 0
    with pytest.raises(OptionError, match="salt: found int, expected text"):
        engine.stream(ask(QUESTIONS[0]), salt=3)  # type: ignore[arg-type]


def test_a_cache_of_the_callers_own_shares_nothing(small: Loaded) -> None:
    engine, model = scripted_engine(*small)
    done_of(engine.stream(ask(QUESTIONS[0]), **GREEDY))
    for _ in range(2):
        model.read = 0
        own = done_of(engine.stream(ask(QUESTIONS[0]), cache=make_cache(engine.model), **GREEDY))
        assert (own.usage.cached_tokens, model.read) == (0, own.usage.prompt_tokens)


# What cannot be


@pytest.mark.parametrize(
    ("size", "problem"),
    [
        (0, "prefix_cache: found 0, expected an integer from 1"),
        (-1, "prefix_cache: found -1, expected an integer from 1"),
        (1.5, "prefix_cache: found 1.5, expected an integer from 1"),
        (True, "prefix_cache: found True, expected an integer from 1"),
        ("0", "prefix_cache: found '0', expected a size above 0"),
        ("-2GB", "prefix_cache: found '-2GB', expected a size above 0"),
        ("much", "prefix_cache: found 'much', expected a size above 0"),
        (10**18, "prefix_cache: found 1000000000000000000, expected at most the "),
        ("900TB", "prefix_cache: found 900TB, expected at most the "),
    ],
)
def test_sizes_that_cannot_be(small: Loaded, size: Any, problem: str) -> None:
    makers: Sequence[Callable[[], Engine]] = (
        lambda: Engine(*small, prefix_cache=size),
        lambda: Engine.load(prefix_cache=size),
    )
    for make in makers:
        with pytest.raises(OptionError) as caught:
            make()
        assert caught.value.problem.startswith(problem)
        assert '"2GB"' in caught.value.hint
        assert '"off"' in caught.value.hint


@pytest.mark.parametrize(("size", "capacity"), [("2 MB", 2_000_000), ("1.5KiB", 1536), (4096, 4096), ("off", 0)])
def test_sizes_that_can_be(small: Loaded, size: int | str, capacity: int) -> None:
    engine, _ = scripted_engine(*small, prefix_cache=size)
    assert scheduler_of(engine.model).store.capacity == capacity


def test_folders_that_cannot_be(small: Loaded, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("Mine.")
    (tmp_path / "link").symlink_to(tmp_path)
    for name, problem in (
        ("file", "a file, expected a folder"),
        ("link", "a link, expected a folder"),
        ("none/folder", "there is no folder"),
        ("a\0b", "cannot be written to"),
    ):
        makers: Sequence[Callable[[], Engine]] = (
            lambda name=name: Engine(*small, prompt_cache=tmp_path / name),  # type: ignore[misc]
            lambda name=name: Engine.load(prompt_cache=str(tmp_path / name)),  # type: ignore[misc]
        )
        for make in makers:
            with pytest.raises(CacheError, match=problem):
                make()
    assert (tmp_path / "file").read_text() == "Mine."


# The end


def test_an_engine_that_is_closed(small: Loaded, tmp_path: Path) -> None:
    engine, _ = run_of(small, tmp_path / "folder")
    conversation = Conversation(engine, max_tokens=3)
    running = engine.stream(ask(QUESTIONS[0]), **GREEDY)
    next(running)
    engine.close()
    engine.close()
    assert os.listdir(tmp_path / "folder") != []
    with pytest.raises(OptionError, match="closed before this reply was over"):
        list(running)
    uses: Sequence[Callable[[], Any]] = (
        lambda: engine.stream(ask("Hello")),
        lambda: engine.chat(ask("Hello")),
        lambda: engine.reply("Hello"),
        lambda: engine.batch([ask("Hello")]),
        lambda: engine.run_tools(ask("Hello"), {}),
        lambda: conversation.chat("Hello"),
    )
    for use in uses:
        with pytest.raises(MlxqwenError, match=r"close\(\)"):
            use()


def test_threads_share_what_was_read(small: Loaded) -> None:
    engine, _ = scripted_engine(*small)
    expected = [
        done_of(engine.stream(ask(text), cache=make_cache(engine.model), **GREEDY)).tokens for text in QUESTIONS
    ]
    found: dict[int, Done] = {}

    def answer(number: int) -> None:
        found[number] = done_of(engine.stream(ask(QUESTIONS[number % 3]), **GREEDY))

    threads = [threading.Thread(target=answer, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[number].tokens for number in range(6)] == expected * 2
    front = [done.usage.cached_tokens for done in found.values()]
    assert front.count(0) == 1  # the others waited for the system message, and found it
