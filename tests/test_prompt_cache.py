"""Prompts that are kept in a file: what is read again, what a file holds, and what it survives."""

from __future__ import annotations

import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlx.utils import tree_map

from mlxqwen import Conversation, Done, Engine, PromptCache, make_cache
from mlxqwen.cache import KVCache
from mlxqwen.cache.prefix import common_prefix
from mlxqwen.device import Device
from mlxqwen.engine.events import Event
from mlxqwen.engine.prompt_cache import weights_digest
from mlxqwen.errors import CacheError, GenerationError, InsufficientMemoryError, MlxqwenError, OptionError
from mlxqwen.files.checkpoint import load_safetensors, read_header, save_safetensors
from mlxqwen.model.qwen3 import Qwen3ForCausalLM
from mlxqwen.text.tokenizer import Tokenizer
from tests.conftest import random_model
from tests.scripted_model import ScriptedModel, scripted_engine
from tests.test_conversation_cache import assert_holds

CACHES: list[dict[str, Any]] = [{}, {"max_kv_size": 64}, {"kv_bits": 8}, {"max_kv_size": 48, "keep": 2, "kv_bits": 8}]
SYSTEM = {
    "role": "system",
    "content": "You count letters with great care, and you tell no more than you are asked for.",
}
QUESTIONS = ("How many r's in strawberry?", "What is 2 + 2?", "How many e's in eleven?")
GREEDY: dict[str, Any] = {"sampling": {"temperature": 0}, "max_tokens": 24}


@pytest.fixture
def scripted(demo: tuple[Qwen3ForCausalLM, Tokenizer]) -> tuple[Engine, ScriptedModel]:
    return scripted_engine(*demo)


def ask(text: str, *before: dict[str, Any]) -> list[dict[str, Any]]:
    return [SYSTEM, *before, {"role": "user", "content": text}]


def done_of(events: Iterator[Event]) -> Done:
    *_, done = events
    assert isinstance(done, Done)
    return done


def stored_ids(path: Path) -> list[int]:
    return [int(token) for token in read_header(path)[1]["user.tokens"].split(",")]


def answer(engine: Engine, path: Path, messages: Sequence[Any], cache: dict[str, Any], **options: Any) -> Done:
    """What one run does."""
    prompt_cache = PromptCache(path, engine.model, **cache)
    done = done_of(engine.stream(messages, cache=prompt_cache, **options))
    prompt_cache.save()
    return done


# What is read again


@pytest.mark.parametrize("options", [{"seed": 3, "max_tokens": 24}, GREEDY], ids=["seeded", "greedy"])
@pytest.mark.parametrize("cache", CACHES, ids=str)
def test_replies_are_those_of_fresh_runs(
    scripted: tuple[Engine, ScriptedModel], tmp_path: Path, cache: dict[str, Any], options: dict[str, Any]
) -> None:
    engine, model = scripted
    file = tmp_path / "file"
    said: list[dict[str, Any]] = []
    for turn, question in enumerate((*QUESTIONS, QUESTIONS[0])):
        messages = ask(question, *said)
        model.read = 0
        done = answer(engine, file, messages, cache, **options)
        assert model.read == done.usage.prompt_tokens - done.usage.cached_tokens
        assert (done.usage.cached_tokens > 0) == (turn > 0)
        fresh = done_of(engine.stream(messages, cache=make_cache(engine.model, **cache), **options))
        assert (done.tokens, done.finish_reason) == (fresh.tokens, fresh.finish_reason)
        said += [messages[-1], {"role": "assistant", "content": done.reply.content}]


@pytest.mark.parametrize("cache", CACHES, ids=str)
def test_it_goes_with_speculation(
    demo: tuple[Qwen3ForCausalLM, Tokenizer], tmp_path: Path, cache: dict[str, Any]
) -> None:
    """Guesses that were wrong are not in the file."""
    engine = Engine(*demo, speculative="lookup")
    said: list[dict[str, Any]] = []
    for turn, question in enumerate(QUESTIONS[:2]):
        messages = ask(question, *said)
        done = answer(engine, tmp_path / "file", messages, cache, **GREEDY)
        assert (done.usage.cached_tokens > 0) == (turn > 0)
        assert (
            done.tokens == done_of(Engine(*demo).stream(messages, cache=make_cache(demo[0], **cache), **GREEDY)).tokens
        )
        said += [messages[-1], {"role": "assistant", "content": done.reply.content}]
        if "kv_bits" not in cache:
            assert_holds(
                PromptCache(tmp_path / "file", demo[0], **cache).held.cache, stored_ids(tmp_path / "file"), demo[0]
            )


def test_a_new_file_is_its_owners_alone_and_keeps_the_rights_it_is_given(
    scripted: tuple[Engine, ScriptedModel], tmp_path: Path
) -> None:
    engine, file = scripted[0], tmp_path / "file"
    messages = ask("A")
    first = answer(engine, file, messages, {}, **GREEDY)
    assert file.stat().st_mode & 0o777 == 0o600
    file.chmod(0o640)
    grown = ask("B", messages[-1], {"role": "assistant", "content": first.reply.content})
    before = file.stat().st_ino
    answer(engine, file, grown, {}, **GREEDY)
    assert file.stat().st_ino != before
    assert file.stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("cache", [{}, {"kv_bits": 8}, {"max_kv_size": 128}], ids=str)
def test_many_questions_share_the_front_of_the_first(
    scripted: tuple[Engine, ScriptedModel], tmp_path: Path, cache: dict[str, Any]
) -> None:
    """However many other ones are asked, the file stays as the first has made it."""
    engine, model = scripted
    file = tmp_path / "file"
    front = common_prefix(engine.prompt(ask("A")), engine.prompt(ask("B")))
    first = answer(engine, file, ask(QUESTIONS[0]), cache, **GREEDY)
    made = file.read_bytes()
    assert first.usage.cached_tokens == 0
    assert stored_ids(file) == engine.prompt(ask(QUESTIONS[0]))
    for question in (*QUESTIONS[1:], *QUESTIONS[1:]):
        model.read = 0
        done = answer(engine, file, ask(question), cache, **GREEDY)
        assert front <= done.usage.cached_tokens < front + 4
        assert model.read == done.usage.prompt_tokens - done.usage.cached_tokens
        assert file.read_bytes() == made
    model.read = 0
    again = answer(engine, file, ask(QUESTIONS[0]), cache, **GREEDY)
    assert (model.read, again.tokens) == (1, first.tokens)


def test_a_conversation_makes_the_file_grow(scripted: tuple[Engine, ScriptedModel], tmp_path: Path) -> None:
    engine, model = scripted
    file = tmp_path / "file"
    said: list[dict[str, Any]] = []
    held: list[int] = []
    for question in QUESTIONS:
        model.say(engine.tokenizer.encode("<think>\nLet me see.\n</think>\n\nThree.<|im_end|>"))
        messages = ask(question, *said)
        done = answer(engine, file, messages, {})
        assert done.usage.cached_tokens == len(held)
        held = stored_ids(file)
        assert held == engine.prompt(messages)  # up to the thought, which history leaves out
        said += [messages[-1], {"role": "assistant", "content": done.reply.content}]


def test_calls_of_tools_are_kept_for_their_results(scripted: tuple[Engine, ScriptedModel], tmp_path: Path) -> None:
    engine, model = scripted
    tools = [{"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}}}]
    model.say(engine.tokenizer.encode('<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call><|im_end|>'))
    done = answer(engine, tmp_path / "file", ask("What time is it?"), {}, tools=tools)
    assert done.finish_reason == "tool_calls"
    assert len(stored_ids(tmp_path / "file")) == done.usage.prompt_tokens + done.usage.completion_tokens - 1


def test_conversations_go_on_with_it(scripted: tuple[Engine, ScriptedModel], tmp_path: Path) -> None:
    engine, model = scripted
    answer(engine, tmp_path / "file", ask(QUESTIONS[0]), {}, **GREEDY)
    prompt_cache = PromptCache(tmp_path / "file", engine.model)
    conversation = Conversation(engine, messages=[SYSTEM], prompt_cache=prompt_cache, **GREEDY)
    model.read = 0
    first = done_of(conversation.stream(QUESTIONS[0]))
    assert (model.read, first.usage.prompt_tokens - first.usage.cached_tokens) == (1, 1)
    conversation.clear()
    other = done_of(conversation.stream(QUESTIONS[1]))
    assert other.usage.cached_tokens > len(engine.tokenizer.encode(str(SYSTEM["content"])))
    assert not prompt_cache.save()
    conversation.clear()
    conversation.chat(QUESTIONS[0])
    conversation.chat(QUESTIONS[1])
    assert prompt_cache.save()
    assert stored_ids(tmp_path / "file") == engine.prompt(conversation.messages[:-1])


def test_options_of_a_cache_are_those_of_its_file(tiny: Qwen3ForCausalLM, tokenizer: Tokenizer, tmp_path: Path) -> None:
    engine = Engine(random_model(vocab_size=tokenizer.vocab_size), tokenizer)
    prompt_cache = PromptCache(tmp_path / "file", engine.model)
    with pytest.raises(OptionError, match="prompt_cache: found beside options of a cache"):
        Conversation(engine, prompt_cache=prompt_cache, max_kv_size=32)
    with pytest.raises(OptionError, match="prompt_cache: found KVCache, expected what PromptCache"):
        Conversation(engine, prompt_cache=make_cache(engine.model))  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="cache: found str, expected what PromptCache"):
        engine.stream(ask("Hello"), cache="file")  # type: ignore[arg-type]
    with pytest.raises(CacheError, match="made for another model"):
        engine.stream(ask("Hello"), cache=PromptCache(tmp_path / "file", tiny))


def test_one_reply_at_a_time(scripted: tuple[Engine, ScriptedModel], tmp_path: Path) -> None:
    engine, _ = scripted
    prompt_cache = PromptCache(tmp_path / "file", engine.model)
    first = engine.stream(ask(QUESTIONS[0]), cache=prompt_cache, **GREEDY)
    next(first)
    second = done_of(engine.stream(ask(QUESTIONS[1]), cache=prompt_cache, **GREEDY))
    with pytest.raises(OptionError, match="prompt cache: found in use for another reply"):
        list(first)
    assert second.tokens == done_of(engine.stream(ask(QUESTIONS[1]), **GREEDY)).tokens
    assert list(prompt_cache.held.tokens) == engine.prompt(ask(QUESTIONS[1]))


# Windows


def test_a_full_window_is_gone_on_with_and_not_gone_back_from(
    scripted: tuple[Engine, ScriptedModel], tmp_path: Path
) -> None:
    engine, model = scripted
    cache, file = {"max_kv_size": 24}, tmp_path / "file"
    first = answer(engine, file, ask(QUESTIONS[0]), cache, **GREEDY)
    made = file.read_bytes()
    assert len(stored_ids(file)) > 24
    other = answer(engine, file, ask(QUESTIONS[1]), cache, **GREEDY)
    assert (other.usage.cached_tokens, file.read_bytes()) == (0, made)
    model.read = 0
    said = [ask(QUESTIONS[0])[-1], {"role": "assistant", "content": first.reply.content}]
    going_on = answer(engine, file, ask(QUESTIONS[1], *said), cache, **GREEDY)
    assert going_on.usage.cached_tokens >= first.usage.prompt_tokens - 1
    assert model.read == going_on.usage.prompt_tokens - going_on.usage.cached_tokens
    assert len(stored_ids(file)) > first.usage.prompt_tokens


def test_a_window_that_has_filled_up_does_not_replace_one_that_can_go_back(
    scripted: tuple[Engine, ScriptedModel], tmp_path: Path
) -> None:
    engine, _ = scripted
    cache, file = {"max_kv_size": 56}, tmp_path / "file"
    first = answer(engine, file, ask("Hello"), cache, **GREEDY)
    made = file.read_bytes()
    assert len(stored_ids(file)) <= 56
    said = [ask("Hello")[-1], {"role": "assistant", "content": first.reply.content}]
    answer(engine, file, ask("How many letters are there in all of the words that I said?", *said), cache, **GREEDY)
    assert file.read_bytes() == made


# Files of others


def remade(model: Qwen3ForCausalLM, change: Callable[[mx.array], mx.array]) -> Qwen3ForCausalLM:
    other = Qwen3ForCausalLM(model.config, model.generation_config)
    other.update(tree_map(lambda array: array, model.parameters()))
    other.lm_head.weight = change(other.lm_head.weight)
    return other


def test_one_changed_number_is_another_model(tiny: Qwen3ForCausalLM, tmp_path: Path) -> None:
    same, other = remade(tiny, lambda array: array + 0), remade(tiny, lambda array: array.at[5, 3].add(1e-6))
    assert weights_digest(tiny) == weights_digest(same) != weights_digest(other)
    halves = remade(tiny, lambda array: array)
    halves.update(tree_map(lambda array: array.astype(mx.bfloat16), halves.parameters()))
    assert weights_digest(halves) != weights_digest(tiny)

    file = written(tiny, tmp_path / "file")
    PromptCache(file, same)
    with pytest.raises(CacheError, match="made with other weights than this model's"):
        PromptCache(file, other)
    with pytest.raises(CacheError, match="made with another dtype: found float32, expected bfloat16"):
        PromptCache(file, halves)
    with pytest.raises(CacheError, match="made with a model of another shape or RoPE scaling"):
        PromptCache(file, random_model(vocab_size=98))


def written(model: Qwen3ForCausalLM, path: Path, tokens: Sequence[int] = (5, 6, 7, 8), **options: Any) -> Path:
    """The file of a prompt of these tokens."""
    prompt_cache = PromptCache(path, model, **options)
    read(model, prompt_cache, tokens)
    assert prompt_cache.save()
    return path


def read(model: Qwen3ForCausalLM, prompt_cache: PromptCache, tokens: Sequence[int]) -> None:
    start = prompt_cache.held.begin([*tokens, 0])
    prompt_cache.held.cache.trim(start)
    if start < len(tokens):
        model.model(mx.array([list(tokens[start:])]), prompt_cache.held.cache)
    prompt_cache.held.commit(tokens, len(tokens))


@pytest.mark.parametrize(
    ("made", "opened", "message"),
    [
        ({}, {"kv_bits": 8}, "other --kv-bits: found none, expected 8"),
        ({"kv_bits": 8}, {"kv_bits": 4}, "other --kv-bits: found 8, expected 4"),
        ({}, {"max_kv_size": 32}, "another --max-kv-size: found none, expected 32"),
        ({"max_kv_size": 32}, {"max_kv_size": 16}, "another --max-kv-size: found 32, expected 16"),
        ({"max_kv_size": 32}, {"max_kv_size": 32, "keep": 2}, "another --kv-keep: found 4, expected 2"),
    ],
)
def test_other_options_are_refused(
    tiny: Qwen3ForCausalLM, tmp_path: Path, made: dict[str, Any], opened: dict[str, Any], message: str
) -> None:
    file = written(tiny, tmp_path / "file", **made)
    before = file.read_bytes()
    with pytest.raises(CacheError, match=message):
        PromptCache(file, tiny, **opened)
    assert file.read_bytes() == before


@pytest.mark.parametrize("kv_bits", [None, 8])
def test_no_damage_goes_unseen(tiny: Qwen3ForCausalLM, tmp_path: Path, kv_bits: int | None) -> None:
    """Each bit that is flipped, and each length that is cut to, is an error of ours, or changes nothing."""
    file = written(tiny, tmp_path / "file", kv_bits=kv_bits)
    sound = file.read_bytes()
    state = [part.tolist() for part in PromptCache(file, tiny, kv_bits=kv_bits).held.cache.state]
    places = [*range(0, len(sound), 61), *range(len(sound) - 8, len(sound))]
    for place in places:
        file.write_bytes(sound[:place] + bytes([sound[place] ^ (1 << place % 8)]) + sound[place + 1 :])
        try:
            opened = PromptCache(file, tiny, kv_bits=kv_bits)
        except MlxqwenError:
            continue
        assert opened.held.tokens == (5, 6, 7, 8)
        assert [part.tolist() for part in opened.held.cache.state] == state
    for length in (0, 1, 7, 8, 9, 100, len(sound) // 2, len(sound) - 1):
        file.write_bytes(sound[:length])
        with pytest.raises(CacheError):
            PromptCache(file, tiny, kv_bits=kv_bits)
        assert len(file.read_bytes()) == length


def rewritten(file: Path, **changes: str | None) -> None:
    arrays, metadata = load_safetensors(file)
    mx.eval(arrays)
    for name, value in changes.items():
        name = name.replace("user_", "user.")
        if value is None:
            del metadata[name]
        else:
            metadata[name] = value
    save_safetensors(file, arrays, metadata)


@pytest.mark.parametrize(
    "changes",
    [
        {"user_tokens": "5,6,7"},
        {"user_tokens": "5,6,7,-8"},
        {"user_tokens": "5,6,7,97"},
        {"user_tokens": "5,6,7," + "9" * 5000},
        {"user_tokens": "five"},
        {"user_tokens": None},
        {"user_sums": None},
        {"user_sums": "0" * 64},
        {"offsets": "4,4"},
        {"offsets": str(1 << 62), "user_tokens": "5,6,7,8"},
        {"offsets": "3", "user_tokens": "5,6,7"},
        {"user_tokens": "5,6,8,7"},
        {"user_prompt_cache": "mlxqwen-prompt-cache-1"},
        {"user_prompt_cache": None},
        {"kv_group_size": "128"},
    ],
    ids=lambda changes: str(changes)[:40],
)
def test_hostile_headers_are_refused(tiny: Qwen3ForCausalLM, tmp_path: Path, changes: dict[str, str | None]) -> None:
    file = written(tiny, tmp_path / "file")
    rewritten(file, **changes)
    with pytest.raises(CacheError):
        PromptCache(file, tiny)


def test_what_is_no_prompt_cache_is_refused_and_left_alone(tiny: Qwen3ForCausalLM, tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("These are notes of mine, which are worth a lot to me.")
    with pytest.raises(CacheError, match="no safetensors file"):
        PromptCache(text, tiny)
    assert text.read_text().startswith("These are notes")
    with pytest.raises(CacheError, match="a folder, expected a file"):
        PromptCache(tmp_path, tiny)
    with pytest.raises(CacheError, match="there is no folder"):
        PromptCache(tmp_path / "nowhere" / "file", tiny)
    os.mkfifo(tmp_path / "pipe")
    for place in (tmp_path / "pipe", "/dev/null"):
        with pytest.raises(CacheError, match="not a regular file") as device:
            PromptCache(place, tiny)
        assert "remove" not in str(device.value)
    with pytest.raises(CacheError, match="found an empty name"):
        PromptCache("", tiny)
    with pytest.raises(CacheError, match="null"):
        PromptCache(tmp_path / "a\0b", tiny)
    make_cache(tiny).save(tmp_path / "other")
    with pytest.raises(CacheError, match="no prompt cache, or one of another version"):
        PromptCache(tmp_path / "other", tiny)


def test_a_file_larger_than_memory_is_refused_unread(tiny: Qwen3ForCausalLM, tmp_path: Path) -> None:
    file = written(tiny, tmp_path / "file")
    device = Device("small", False, 1 << 20, mx.get_active_memory() + 100)
    with pytest.raises(InsufficientMemoryError, match=r"file: takes 0\.0 GB, this machine has 0\.0 GB left"):
        PromptCache(file, tiny, device=device)


# Writing


def test_a_failed_reply_leaves_all_as_it_was(scripted: tuple[Engine, ScriptedModel], tmp_path: Path) -> None:
    engine, model = scripted
    file = tmp_path / "file"
    first = answer(engine, file, ask(QUESTIONS[0]), {}, **GREEDY)
    before = file.read_bytes()
    prompt_cache = PromptCache(file, engine.model)
    held = prompt_cache.held.tokens
    model.say([])
    model.fail_after = 3
    said = [ask(QUESTIONS[0])[-1], {"role": "assistant", "content": first.reply.content}]
    with pytest.raises(GenerationError):
        list(engine.stream(ask(QUESTIONS[1], *said), cache=prompt_cache))
    assert prompt_cache.held.tokens == held
    assert not prompt_cache.save()
    assert file.read_bytes() == before


@pytest.mark.parametrize("cache", CACHES, ids=str)
def test_an_abandoned_reply_leaves_the_prompt_that_was_read(
    scripted: tuple[Engine, ScriptedModel], tmp_path: Path, cache: dict[str, Any]
) -> None:
    engine, _ = scripted
    prompt = engine.prompt(ask(QUESTIONS[0]))
    for leave in ("close", "interrupt"):
        prompt_cache = PromptCache(tmp_path / leave, engine.model, **cache)
        events = cast(Generator[Event], engine.stream(ask(QUESTIONS[0]), cache=prompt_cache, **GREEDY))
        next(events)
        if leave == "close":
            events.close()
        else:
            with pytest.raises(KeyboardInterrupt):
                events.throw(KeyboardInterrupt)
        held = prompt_cache.held.tokens
        assert held == tuple(prompt[: len(held)])
        assert len(held) > len(prompt) / 2
        assert prompt_cache.held.cache.offset == len(held)
        if "kv_bits" not in cache:
            assert_holds(prompt_cache.held.cache, held, engine.model)
        assert prompt_cache.save()


def test_numbers_of_other_weights_are_not_saved(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = random_model()
    prompt_cache = PromptCache(tmp_path / "file", model)
    read(model, prompt_cache, [5, 6])
    model.update(tree_map(lambda array: array * 0.5, model.parameters()))
    assert not prompt_cache.save()
    assert "weights were changed while this run went on" in caplog.text
    assert os.listdir(tmp_path) == []


def test_what_a_killed_run_has_left_is_removed_a_day_later(
    tiny: Qwen3ForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders: list[Path] = []
    save = KVCache.save

    def noting(self: KVCache, path: Path, metadata: Any) -> None:
        folders.append(path.parent)
        save(self, path, metadata)

    monkeypatch.setattr(KVCache, "save", noting)
    file = written(tiny, tmp_path / "file", [5, 6])
    (left,) = folders
    assert not left.exists()
    other = tmp_path / ".partial-of-another"
    for folder in (left, other):
        folder.mkdir()
        (folder / "cache.safetensors").write_text("half")
    os.utime(other, (0, 0))
    prompt_cache = PromptCache(file, tiny)
    read(tiny, prompt_cache, [5, 6, 7])
    assert prompt_cache.save()
    assert left.exists()  # it may be another run's that is writing now
    os.utime(left, (0, 0))
    read(tiny, prompt_cache, [5, 6, 7, 8])
    assert prompt_cache.save()
    assert sorted(os.listdir(tmp_path)) == [".partial-of-another", "file"]


def test_two_runs_at_once_lose_nothing(tiny: Qwen3ForCausalLM, tmp_path: Path) -> None:
    file = written(tiny, tmp_path / "file", [5, 6])
    longest, longer, branch = (PromptCache(file, tiny) for _ in range(3))
    read(tiny, longest, [5, 6, 7, 8, 9])
    read(tiny, longer, [5, 6, 7])
    read(tiny, branch, [5, 6, 1, 2, 3, 4])
    assert longest.save()
    assert not longer.save()
    assert not branch.save()
    assert stored_ids(file) == [5, 6, 7, 8, 9]
    assert os.listdir(tmp_path) == ["file"]


def test_a_file_that_has_become_another_is_not_replaced(
    tiny: Qwen3ForCausalLM, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = written(tiny, tmp_path / "file", [5, 6])
    prompt_cache = PromptCache(file, tiny)
    read(tiny, prompt_cache, [5, 6, 7])
    file.write_text("Something else that somebody has put there.")
    assert not prompt_cache.save()
    assert file.read_text().startswith("Something else")
    assert "stays as it is" in caplog.text
    file.unlink()
    assert prompt_cache.save()
    assert stored_ids(file) == [5, 6, 7]


def test_a_link_stays_a_link(tiny: Qwen3ForCausalLM, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    file = written(tiny, tmp_path / "real" / "file", [5, 6])
    (tmp_path / "link").symlink_to(file)
    prompt_cache = PromptCache(tmp_path / "link", tiny)
    read(tiny, prompt_cache, [5, 6, 7])
    assert prompt_cache.save()
    assert (tmp_path / "link").is_symlink()
    assert stored_ids(file) == [5, 6, 7]


def test_a_link_to_nothing_is_where_the_file_is_made(tiny: Qwen3ForCausalLM, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    for name in ("real", "nowhere"):
        (tmp_path / f"to {name}").symlink_to(tmp_path / name / "file")
    prompt_cache = PromptCache(tmp_path / "to real", tiny)
    read(tiny, prompt_cache, [5, 6])
    assert prompt_cache.save()
    assert (tmp_path / "to real").is_symlink()
    assert stored_ids(tmp_path / "real" / "file") == [5, 6]
    with pytest.raises(CacheError, match=f"there is no folder {re.escape(str(tmp_path / 'nowhere'))}"):
        PromptCache(tmp_path / "to nowhere", tiny)


def test_a_write_protected_file_stays_as_it_is(
    tiny: Qwen3ForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    file = written(tiny, tmp_path / "file", [5, 6])
    prompt_cache = PromptCache(file, tiny)
    read(tiny, prompt_cache, [5, 6, 7])
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)  # root may write anywhere
    assert not prompt_cache.save()
    assert f"{file}: cannot be written to, so it stays as it is" in caplog.text
    with pytest.raises(CacheError, match="no permission to write in its folder"):
        PromptCache(tmp_path / "new", tiny)


def test_a_full_disk_leaves_the_old_file(tiny: Qwen3ForCausalLM, tmp_path: Path) -> None:
    file = written(tiny, tmp_path / "file", [5, 6])
    before = file.read_bytes()
    prompt_cache = PromptCache(file, tiny)
    read(tiny, prompt_cache, list(range(5, 60)))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 100, hard))
    try:
        with pytest.raises(CacheError, match="file: cannot be written: "):
            prompt_cache.save()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert file.read_bytes() == before
    assert os.listdir(tmp_path) == ["file"]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    prompts=st.lists(st.lists(st.integers(1, 2), min_size=1, max_size=9), min_size=1, max_size=6),
    window=st.sampled_from([None, 5]),
)
def test_a_file_only_ever_gains(
    tiny: Qwen3ForCausalLM, tmp_path: Path, prompts: list[list[int]], window: int | None
) -> None:
    """Whatever is asked: what it held is the front of what it holds, and that is what a fresh run leaves."""
    file = tmp_path / "file"
    file.unlink(missing_ok=True)
    held: list[int] = []
    for prompt in prompts:
        prompt_cache = PromptCache(file, tiny, max_kv_size=window, keep=2)
        can_go_back = window is None or len(held) <= window
        shared = common_prefix(held, prompt)
        cached = prompt_cache.held.begin([*prompt, 0])
        assert cached == (shared if can_go_back or shared == len(held) else 0)
        prompt_cache.held.roll_back()
        read(tiny, prompt_cache, prompt)
        is_written = prompt_cache.save()
        stays = window is not None and len(prompt) > window and 0 < len(held) <= window
        assert is_written == (shared == len(held) < len(prompt) and not stays)
        held = prompt if is_written else held
        assert stored_ids(file) == held
        assert_holds(PromptCache(file, tiny, max_kv_size=window, keep=2).held.cache, held, tiny)


# Memory


@pytest.mark.parametrize("kv_bits", [None, 8])
def test_neither_reading_nor_writing_takes_a_second_cache(tmp_path: Path, kv_bits: int | None) -> None:
    """In a process of its own, as the peak is the process's."""
    program = """
import sys, mlx.core as mx
from tests.conftest import random_model
from mlxqwen import PromptCache
from mlxqwen.engine.generation import generate_tokens
kv_bits = eval(sys.argv[2])
model = random_model(context=40_000)
tokens = [5, 6, 7, 8] * 5_000
cache = PromptCache(sys.argv[1], model, kv_bits=kv_bits)
held = cache.held
held.begin(tokens)
held.cache.placement.offsets = [len(tokens)]
for layer in held.cache:  # as if read, with room for more
    numbers = layer.storage.encode(mx.random.normal((1, 2, 20_480, 32)))
    layer.keys = numbers
    layer.values = tuple(part + 0 for part in numbers)
mx.eval(held.cache.state)
held.commit(tokens, len(tokens))
layer = held.cache.nbytes / len(held.cache)
before = mx.get_active_memory()
mx.reset_peak_memory()
assert cache.save()
saving = (mx.get_peak_memory() - before) / layer
del cache, held
mx.clear_cache()
before = mx.get_active_memory()
mx.reset_peak_memory()
cache = PromptCache(sys.argv[1], model, kv_bits=kv_bits)
held = cache.held
loading = (mx.get_peak_memory() - before) / layer
start = held.begin([*tokens, 1, 2])
list(generate_tokens(model, [*tokens, 1, 2], cache=held.cache, cached_tokens=start, max_tokens=2))
growing = (mx.get_peak_memory() - before) / layer
print(saving, loading, growing, start)
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "file"), str(kv_bits)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    saving, loading, growing, start = map(float, done.stdout.split())
    assert start == 20_000
    assert (saving, loading, growing) < (1.0, 2.1, 3.1), done.stdout


def test_a_copied_file_serves_as_well(tiny: Qwen3ForCausalLM, tmp_path: Path) -> None:
    shutil.copy(written(tiny, tmp_path / "file"), tmp_path / "copy")
    assert PromptCache(tmp_path / "copy", tiny).held.tokens == (5, 6, 7, 8)
