"""Speculative decoding of whole replies: text, thoughts, budgets, tools and conversations are as without it."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlxqwen import Conversation, DraftModel, Engine, batch_generate, batch_stream, generate, stream_generate
from mlxqwen.device import Device
from mlxqwen.engine.engine import Done, Event
from mlxqwen.engine.speculation.drafter import Speculative
from mlxqwen.errors import CheckpointError, InsufficientMemoryError, MlxqwenError, OptionError
from mlxqwen.files.hub import DEMO_FOLDER
from mlxqwen.model.footprint import measure
from mlxqwen.model.qwen3 import Qwen3ForCausalLM
from mlxqwen.text.tokenizer import Tokenizer
from tests.conftest import random_model
from tests.convert.checkpoints import make_demo

CACHES: list[dict[str, Any]] = [{}, {"max_kv_size": 48, "keep": 2}, {"kv_bits": 8}]
QUESTIONS = ("How many r's in strawberry?", "Really? /no_think", "And in blueberry?")


@pytest.fixture(scope="module")
def drafted(demo: tuple[Qwen3ForCausalLM, Tokenizer]) -> DraftModel:
    """The demo model itself guesses, mostly right."""
    return DraftModel(demo[0])


def done_of(events: Iterator[Event]) -> Done:
    *_, done = events
    assert isinstance(done, Done)
    return done


def without_speed(done: Done) -> Done:
    """What a reply has in common with one made otherwise, of a prompt that was partly known or not."""
    usage = dataclasses.replace(done.usage, drafted_tokens=0, accepted_tokens=0, cached_tokens=0)
    return dataclasses.replace(done, usage=usage, timings=None)  # type: ignore[arg-type]


OPTIONS: list[dict[str, Any]] = [{"thinking_budget": 7}, {"thinking_budget": 0}, {"stop": "3", "stop_on_loop": True}]


@pytest.mark.parametrize(
    ("cache", "options"),
    [*((cache, {}) for cache in CACHES), *((CACHES[1], options) for options in OPTIONS)],
    ids=str,
)
def test_a_conversation_is_the_one_without_speculation(
    demo: tuple[Qwen3ForCausalLM, Tokenizer], drafted: DraftModel, cache: dict[str, Any], options: dict[str, Any]
) -> None:
    def talk(speculative: Speculative) -> tuple[list[Done], Conversation]:
        chat = Conversation(Engine(*demo, speculative=speculative), **cache, **options, seed=4, max_tokens=36)
        return [done_of(chat.stream(question)) for question in QUESTIONS], chat

    expected, plain = talk(None)
    for speculative in ("lookup", drafted):
        found, chat = talk(speculative)
        assert list(map(without_speed, found)) == list(map(without_speed, expected))
        assert chat.messages == plain.messages
        if speculative is drafted:
            usage = found[0].usage
            # All were right, but for those that the end, or a budget, has made worthless.
            assert usage.drafted_tokens > 0
            assert usage.accepted_tokens >= usage.drafted_tokens / 2


def test_a_reply_that_is_abandoned_leaves_a_conversation_as_it_was(demo: tuple[Qwen3ForCausalLM, Tokenizer]) -> None:
    def talk(speculative: Speculative) -> Done:
        chat = Conversation(Engine(*demo, speculative=speculative), seed=4, max_tokens=60)
        chat.chat(QUESTIONS[0])
        events = chat.stream(QUESTIONS[1])
        next(events)
        events.close()
        return done_of(chat.stream(QUESTIONS[2]))

    assert without_speed(talk("lookup")) == without_speed(talk(None))


def test_a_text_and_what_is_told_of_it(
    demo: tuple[Qwen3ForCausalLM, Tokenizer], drafted: DraftModel, capsys: pytest.CaptureFixture[str]
) -> None:
    how: dict[str, Any] = {"max_tokens": 30, "sampling": {"temperature": 0}}
    expected = generate(*demo, "one two three", verbose=True, **how)
    assert "Drafts" not in capsys.readouterr().out
    assert generate(*demo, "one two three", verbose=True, speculative=drafted, draft_tokens=3, **how) == expected
    *_, last = stream_generate(*demo, "one two three", speculative=drafted, draft_tokens=3, **how)
    assert 0 < last.accepted_tokens <= last.drafted_tokens
    share = f"{last.accepted_tokens} of them accepted ({last.accepted_tokens / last.drafted_tokens:.0%})"
    assert f"Drafts: {last.drafted_tokens} tokens, {share}\n" in capsys.readouterr().out


def test_prompts_of_a_batch_get_what_they_get_alone_whoever_guesses(
    demo: tuple[Qwen3ForCausalLM, Tokenizer], drafted: DraftModel
) -> None:
    how: dict[str, Any] = {"max_tokens": 30, "sampling": {"temperature": 0}}
    prompts = ["one two three", "a a a a a"]
    expected = [generate(*demo, prompt, **how) for prompt in prompts]
    for speculative in ("lookup", drafted):
        assert batch_generate(*demo, prompts, speculative=speculative, **how) == expected
        stream = batch_stream(*demo, prompts[:1], speculative=speculative, **how)
        texts = ["", ""]
        for row, response in stream:
            texts[row] += response.text
            if response.generation_tokens == 1 and row == 0:
                stream.add(prompts[1], max_tokens=30, sampling={"temperature": 0})
        assert texts == expected
    engine = Engine(*demo, speculative="lookup")
    conversations = [[{"role": "user", "content": "Hello"}]] * 2
    replies = dict(engine.batch(conversations, max_tokens=5, seed=1))
    assert replies[0].reply == engine.chat(conversations[0], max_tokens=5, seed=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"speculative": "yes"}, "speculative: found 'yes', expected 'lookup', a DraftModel or None"),
        ({"speculative": 3}, "speculative: found 3"),
        ({"draft_tokens": 0, "speculative": "lookup"}, "draft_tokens: found 0, expected an integer from 1"),
        ({"draft_tokens": 65, "speculative": "lookup"}, "draft_tokens: found 65, expected an integer from 1 to 64"),
    ],
    ids=str,
)
def test_what_cannot_guess_is_refused(
    demo: tuple[Qwen3ForCausalLM, Tokenizer], arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(OptionError, match=f"^{message}"):
        Engine(*demo, **arguments)
    with pytest.raises(OptionError, match=f"^{message}"):
        stream_generate(*demo, "a", **arguments)
    with pytest.raises(OptionError, match=f"^{message}"):
        Engine.load("no such folder", **arguments)


def test_a_draft_model_of_another_vocabulary_is_refused(demo: tuple[Qwen3ForCausalLM, Tokenizer]) -> None:
    with pytest.raises(OptionError, match=r"^draft model: found a vocabulary of 97 tokens"):
        stream_generate(*demo, "a", speculative=DraftModel(random_model()))


# Loading


def test_nothing_guesses_so_many_tokens(demo: tuple[Qwen3ForCausalLM, Tokenizer]) -> None:
    for make in (partial(Engine, *demo), partial(Engine.load, DEMO_FOLDER)):
        with pytest.raises(OptionError, match=r"^draft_tokens: found 5, expected none"):
            make(draft_tokens=5)
    assert Engine(*demo, speculative="lookup", draft_tokens=5).draft_tokens == 5


def test_a_draft_model_is_loaded_beside_the_model() -> None:
    engine = Engine.load(DEMO_FOLDER, draft=DEMO_FOLDER, draft_tokens=5)
    assert isinstance(engine.speculative, DraftModel)
    assert engine.speculative.model is not engine.model
    assert engine.draft_tokens == 5
    question = [{"role": "user", "content": "Hello"}]
    done = done_of(engine.stream(question, max_tokens=20, seed=1))
    assert without_speed(done) == without_speed(
        done_of(Engine(engine.model, engine.tokenizer).stream(question, max_tokens=20, seed=1))
    )
    assert done.usage.accepted_tokens > 0


def test_a_model_guesses_or_the_text_does() -> None:
    with pytest.raises(OptionError, match=r"^draft and speculative: found both, expected one"):
        Engine.load(DEMO_FOLDER, draft=DEMO_FOLDER, speculative="lookup")


def altered_demo(folder: Path, file: str, change: Any) -> Path:
    shutil.copytree(DEMO_FOLDER, folder)
    value = json.loads((folder / file).read_text())
    change(value)
    (folder / file).write_text(json.dumps(value))
    return folder


def test_a_draft_model_with_another_tokenizer_is_refused_before_weights_are_read(tmp_path: Path) -> None:
    def swap(tokenizer: dict[str, Any]) -> None:
        vocabulary = tokenizer["model"]["vocab"]
        (first, one), (second, two) = list(vocabulary.items())[300:302]
        vocabulary[first], vocabulary[second] = two, one

    swapped = altered_demo(tmp_path / "swapped", "tokenizer.json", swap)
    (swapped / "model.safetensors").unlink()
    with pytest.raises(OptionError, match=r"^draft model .*swapped: found other tokens in its tokenizer.json") as error:
        Engine.load(DEMO_FOLDER, draft=swapped)
    assert error.value.hint
    larger = altered_demo(tmp_path / "larger", "config.json", lambda config: config.update(vocab_size=99_999))
    with pytest.raises(
        OptionError, match=r"^draft model: found a vocabulary of 99,999 tokens, expected the model's own"
    ):
        Engine.load(DEMO_FOLDER, draft=larger)
    with pytest.raises(MlxqwenError, match="no such"):
        Engine.load(DEMO_FOLDER, draft=tmp_path / "no such")


def test_tokenizers_in_equal_files_are_not_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[Tokenizer] = []
    has_tokens_of = Tokenizer.has_tokens_of

    def noting(self: Tokenizer, other: Tokenizer) -> bool:
        compared.append(other)
        return has_tokens_of(self, other)

    monkeypatch.setattr(Tokenizer, "has_tokens_of", noting)
    Engine.load(DEMO_FOLDER, draft=shutil.copytree(DEMO_FOLDER, tmp_path / "copy"))
    assert not compared
    spaced = shutil.copytree(DEMO_FOLDER, tmp_path / "spaced")
    with (spaced / "tokenizer.json").open("a") as file:
        file.write("\n")
    Engine.load(DEMO_FOLDER, draft=spaced)
    assert len(compared) == 1


def test_the_model_is_checked_before_a_draft_is_converted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def convert(*_: object, **__: object) -> Path:
        raise AssertionError("the draft model is converted")

    monkeypatch.setenv("MLXQWEN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("mlxqwen_convert.cached.convert", convert)
    draft = make_demo(tmp_path / "draft", "fp8").folder
    nbytes = measure(DEMO_FOLDER).weight_bytes(mx.float32)
    small = Device("a machine", is_gpu=False, memory=nbytes, usable_memory=nbytes)
    with pytest.raises(InsufficientMemoryError, match="those of the draft model"):
        Engine.load(DEMO_FOLDER, draft=draft, device=small)
    broken = shutil.copytree(DEMO_FOLDER, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError):
        Engine.load(broken, draft=draft)
    with pytest.raises(AssertionError, match="the draft model is converted"):
        Engine.load(DEMO_FOLDER, draft=draft)


def test_both_models_have_to_fit() -> None:
    nbytes = measure(DEMO_FOLDER).weight_bytes(mx.float32)

    def machine(memory: int) -> Device:
        return Device("a machine", is_gpu=False, memory=memory, usable_memory=memory)

    Engine.load(DEMO_FOLDER, device=machine(nbytes))
    with pytest.raises(
        InsufficientMemoryError, match=r"the weights take .* GB in float32, those of the draft model .* GB"
    ):
        Engine.load(DEMO_FOLDER, draft=DEMO_FOLDER, device=machine(2 * nbytes - 1))
    Engine.load(DEMO_FOLDER, draft=DEMO_FOLDER, device=machine(2 * nbytes))
    Engine.load(DEMO_FOLDER, draft=DEMO_FOLDER, device=machine(2 * nbytes - 1), force=True)
