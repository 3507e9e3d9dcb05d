"""Names and forms that users of other libraries expect in Python."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlxqwen import (
    Conversation,
    DraftModel,
    Engine,
    batch_generate,
    batch_stream,
    generate,
    load,
    load_cache,
    make_cache,
    stream_generate,
)
from mlxqwen.engine.chat_request import ChatRequest
from mlxqwen.engine.token_stream import generate_tokens
from mlxqwen.errors import OptionError

GREEDY: dict[str, Any] = {"max_tokens": 8, "sampling": {"temperature": 0}, "thinking": False}
SWAPPED = "model, tokenizer: found the tokenizer before the model,"
MESSAGES = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.load()


def test_text_is_what_a_user_says(engine: Engine) -> None:
    expected = engine.chat(MESSAGES, **GREEDY)
    assert engine.chat("Hello", **GREEDY) == expected
    assert list(engine.stream("Hello", **GREEDY))[-1].reply == expected  # type: ignore[union-attr]
    assert engine.prompt("Hello") == engine.prompt(MESSAGES)
    assert engine.fit("Hello") == MESSAGES
    assert engine.sampling_for("Hello", thinking=True) == engine.sampling_for(MESSAGES, thinking=True)
    found = dict(engine.batch(["Hello", ChatRequest("Hello"), MESSAGES], **GREEDY))
    assert [found[place].reply for place in range(3)] == [expected] * 3


def test_a_list_of_functions_are_tools_by_their_names(engine: Engine) -> None:
    def count_letters(text: str) -> int:
        """Count the letters of a text."""
        return len(text)

    by_name = engine.run_tools("Hello", {"count_letters": count_letters}, **GREEDY)
    assert engine.run_tools("Hello", [count_letters], **GREEDY).reply == by_name.reply
    assert Conversation(engine).run_tools("Hello", [count_letters], **GREEDY).reply == by_name.reply
    for tools in ([count_letters, count_letters], [3], [object()]):
        with pytest.raises(OptionError, match=r"^tools\[\d\]: found"):
            engine.run_tools("Hello", tools, **GREEDY)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match=r"^tools: found function, expected functions by name"):
        engine.run_tools("Hello", count_letters, **GREEDY)  # type: ignore[arg-type]


def test_a_model_is_named_by_model_too(engine: Engine) -> None:
    folder = engine.tokenizer._folder
    assert load(model=folder)[0].config == engine.model.config
    assert Engine.load(model=folder).model.config == engine.model.config
    with pytest.raises(OptionError, match=r"^model: found beside path_or_id"):
        load(folder, model=folder)


def test_the_tokenizer_answers_to_the_names_of_transformers(engine: Engine) -> None:
    tokenizer = engine.tokenizer
    ids = tokenizer.encode("Hello, 世界")
    assert tokenizer("Hello, 世界") == {"input_ids": ids, "attention_mask": [1] * len(ids)}
    assert tokenizer(["Hello, 世界", ""]) == {"input_ids": [ids, []], "attention_mask": [[1] * len(ids), []]}
    assert tokenizer.batch_decode([ids, []]) == ["Hello, 世界", ""]
    vocabulary = tokenizer.get_vocab()
    assert len(tokenizer) == len(vocabulary) == tokenizer.vocab_size
    assert all(tokenizer.token_to_id(token) == token_id for token, token_id in vocabulary.items())
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") == tokenizer.eos_token_id
    assert tokenizer.convert_tokens_to_ids(["<|im_end|>", "no such token"]) == [tokenizer.eos_token_id, None]
    assert tokenizer.eos_token_ids == {tokenizer.eos_token_id}


def test_a_model_has_its_layers_and_arguments(engine: Engine) -> None:
    assert len(engine.model.layers) == engine.model.config.num_hidden_layers
    assert engine.model.layers[0] is engine.model.model.layers[0]
    assert engine.model.args is engine.model.config


def test_what_is_printed_says_what_it_is(engine: Engine) -> None:
    config = engine.model.config
    assert repr(engine) == (
        f"<Engine: qwen3, {config.num_hidden_layers} layers, float32, context of {config.context_length:,} tokens>"
    )
    assert repr(engine.tokenizer).endswith(f"tokenizer.json', {len(engine.tokenizer):,} tokens)")
    assert repr(make_cache(engine.model, max_kv_size=32, kv_bits=8)) == (
        f"KVCache({config.num_hidden_layers} layers, offsets=(0,), max_kv_size=32, keep=4, kv_bits=8, 0 bytes)"
    )
    assert repr(Conversation(engine, messages=MESSAGES)) == "<Conversation: 1 message>"


def misplaced(value: object) -> Any:
    """What a type checker would tell."""
    return value


MISPLACED: list[tuple[Callable[[Any, Any], object], str, str]] = [
    (lambda m, t: generate(t, m, "a"), SWAPPED, "generate(model, tokenizer, prompt)"),
    (lambda m, t: stream_generate(t, m, "a"), SWAPPED, "stream_generate(model, tokenizer, prompt)"),
    (lambda m, t: batch_generate(t, m, ["a"]), SWAPPED, "batch_generate(model, tokenizer, prompts)"),
    (lambda m, t: batch_stream(t, m, ["a"]), SWAPPED, "batch_stream(model, tokenizer, prompts)"),
    (lambda m, t: Engine(t, m), SWAPPED, "Engine(model, tokenizer), or Engine.load(…)"),
    (lambda m, t: generate_tokens(t, [1]), "model: found Tokenizer,", "generate_tokens(model, prompts)"),
    (lambda m, t: make_cache(t), "model: found Tokenizer,", "make_cache(model)"),
    (lambda m, t: DraftModel(t), "model: found Tokenizer,", "DraftModel(model)"),
    (lambda m, t: load_cache(m, misplaced("a")), "model: found the text 'a',", "load_cache(path, model)"),
    (
        lambda m, t: generate(misplaced("qwen3:4b"), misplaced("Hi"), "a"),
        "model: found the text 'qwen3:4b',",
        "generate(model, ",
    ),
    (lambda m, t: generate(m, misplaced("Hi"), "a"), "tokenizer: found the text 'Hi',", "generate(model, "),
    (lambda m, t: generate(misplaced((m, t)), misplaced("Hi"), "a"), "model: found tuple,", "generate(model, "),
    (lambda m, t: generate(m, m, "a"), "tokenizer: found Qwen3ForCausalLM,", "generate(model, "),
    (lambda m, t: generate(misplaced(Path("a")), t, "a"), "model: found pathlib.", "generate(model, "),
    (lambda m, t: make_cache(misplaced(None)), "model: found NoneType,", "make_cache(model)"),
    (lambda m, t: Conversation(m), "engine: found Qwen3ForCausalLM,", "Conversation(Engine(model, tokenizer))"),
]


@pytest.mark.parametrize("given", [3, b"qwen3:4b", ("a", "b"), object])
def test_what_is_no_name_of_a_model_is_told(engine: Engine, given: object) -> None:
    for load_it in (load, Engine.load):
        for one in (given, engine.model, engine.tokenizer):
            with pytest.raises(OptionError, match=rf"^model: found {type(one).__name__}, expected a folder, a hub id"):
                load_it(misplaced(one))


def test_a_number_is_no_prompt(engine: Engine) -> None:
    for call in (generate, stream_generate):
        with pytest.raises(OptionError, match=r"^prompt: found 3, expected text or token ids$"):
            call(engine.model, engine.tokenizer, 3)


def test_a_model_is_no_drafter(engine: Engine) -> None:
    with pytest.raises(OptionError, match=r"^speculative: found Qwen3ForCausalLM, expected 'lookup', a DraftModel"):
        stream_generate(engine.model, engine.tokenizer, "a", speculative=misplaced(engine.model))


@pytest.mark.parametrize(("call", "found", "order"), MISPLACED)
def test_what_stands_in_the_wrong_place_is_named(
    engine: Engine, call: Callable[[Any, Any], object], found: str, order: str
) -> None:
    with pytest.raises(OptionError) as raised:
        call(engine.model, engine.tokenizer)
    assert raised.value.problem.startswith(found)
    assert raised.value.hint.startswith(f"It is called as {order}")
