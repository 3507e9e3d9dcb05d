"""YaRN by request: short requests are not scaled, longer ones by the least factor that holds them, and none mix."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import given
from hypothesis import strategies as st

import mlxqwen
from mlxqwen import Conversation, DraftModel, Engine
from mlxqwen.cache import load_cache, make_cache
from mlxqwen.cache.disk_tier import DiskTier
from mlxqwen.engine.events import Done
from mlxqwen.engine.handle import Handle
from mlxqwen.engine.request import CacheKind, Request
from mlxqwen.engine.running import RunningBatch
from mlxqwen.engine.speculation.prompt_lookup import PromptLookup
from mlxqwen.errors import CacheError, ContextLengthError, OptionError
from mlxqwen.files.config import ModelConfig
from mlxqwen.files.hub import DEMO_FOLDER
from mlxqwen.model.loading import load_model
from mlxqwen.model.qwen3 import CompiledDecoder, Qwen3ForCausalLM
from mlxqwen.sampling.params import SamplingParams
from mlxqwen.text.tokenizer import Tokenizer
from tests.command_line import run as run_command
from tests.conftest import CONTEXT, VOCAB_SIZE
from tests.scheduling import alone, asked, new_scheduler, run

FACTORS = (1.0, 2.0, 4.0)
LONG = [(n * 31 + n // 7) % VOCAB_SIZE for n in range(4 * CONTEXT)]
ROOM = CONTEXT // 4
SEEDED = SamplingParams(seed=5, temperature=1.3)


def under(config: ModelConfig, like: Qwen3ForCausalLM) -> Qwen3ForCausalLM:
    """A model with the same weights under another config."""
    model = Qwen3ForCausalLM(config)
    model.update(like.parameters())
    return model


@pytest.fixture(scope="module")
def by_request(tiny: Qwen3ForCausalLM) -> Qwen3ForCausalLM:
    return under(tiny.config.with_yarn_by_request(), tiny)


@pytest.fixture(scope="module")
def fixed(tiny: Qwen3ForCausalLM) -> dict[float, Qwen3ForCausalLM]:
    """The models of one factor for all requests."""
    return {1.0: tiny, 2.0: under(tiny.config.with_yarn(2), tiny), 4.0: under(tiny.config.with_yarn(4), tiny)}


def factor_of(model: Qwen3ForCausalLM, request: Request) -> float | None:
    return new_scheduler(model).submit(request).yarn_factor


# Which factor


@given(st.integers(1, 200_000), st.sampled_from([512, 32_768, 40_960, 262_144]))
def test_the_least_factor_that_holds(tokens: int, declared: int) -> None:
    plain = replace(ModelConfig.from_folder(DEMO_FOLDER), max_position_embeddings=declared)
    config, trained = plain.with_yarn_by_request(), 32_768 if declared == 40_960 else declared
    factor = config.yarn_factor_for(tokens)
    assert factor == next((one for one in FACTORS if tokens <= one * trained), 4.0)
    assert config.at_yarn_factor(factor) == (plain if factor == 1 else plain.with_yarn(factor))
    assert config.context_length == 4 * trained


def test_what_config_json_declares_is_the_trained_context() -> None:
    declared = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 100, "beta_fast": 16.0}
    plain = ModelConfig.from_folder(DEMO_FOLDER)
    config = replace(plain.with_rope_scaling(declared), max_position_embeddings=800).with_yarn_by_request()
    assert [config.yarn_factor_for(tokens) for tokens in (100, 101, 201, 401, 900)] == [1, 2, 4, 8, 8]
    assert [config.at_yarn_factor(factor).context_length for factor in (1, 2, 4, 8)] == [100, 200, 400, 800]
    assert {scaling.beta_fast for scaling in config.yarn_choices} == {16.0}
    assert config.rope_scaling is None


def test_prompt_and_limit_count(by_request: Qwen3ForCausalLM) -> None:
    for length, limit, expected in (
        (CONTEXT - ROOM, None, 1),
        (CONTEXT - ROOM + 1, None, 2),
        (2 * CONTEXT - ROOM, None, 2),
        (2 * CONTEXT - ROOM + 1, None, 4),
        (CONTEXT - 1, 1, 1),
        (CONTEXT - 1, 2, 2),
        (1, 3 * CONTEXT, 4),
        (1, 1 << 40, 4),  # more than any holds: it ends with the context
    ):
        assert factor_of(by_request, Request(prompt=tuple(LONG[:length]), max_tokens=limit)) == expected


def test_a_window_counts_no_more_than_it_holds(by_request: Qwen3ForCausalLM) -> None:
    for window, expected in ((CONTEXT, 1), (CONTEXT + 1, 2), (9 * CONTEXT, 4)):
        request = asked(LONG, 8 * CONTEXT, cache=CacheKind(max_kv_size=window))
        assert factor_of(by_request, replace(request, prompt=request.prompt[:-9])) == expected


def test_only_models_that_scale_by_request_have_factors(tiny: Qwen3ForCausalLM, by_request: Qwen3ForCausalLM) -> None:
    assert factor_of(tiny, asked(LONG[:9])) is None
    for model, factor, words in ((tiny, 2.0, "expected none"), (by_request, 3.0, "expected 1, 2, 4")):
        with pytest.raises(OptionError, match=words):
            make_cache(model, yarn_factor=factor)
        with pytest.raises(OptionError, match=words):
            new_scheduler(model).submit(asked(LONG[:9], cache=CacheKind(yarn_factor=factor)))


def test_a_prompt_beyond_the_largest_factor_is_refused(by_request: Qwen3ForCausalLM) -> None:
    scheduler = new_scheduler(by_request)
    scheduler.submit(asked(LONG[:-1]))
    with pytest.raises(ContextLengthError, match=r"256 tokens, .*context of 256, by YaRN's factor 4"):
        scheduler.submit(asked(LONG))


def test_loading_takes_one_of_the_options() -> None:
    model = load_model(DEMO_FOLDER, yarn="auto")
    assert (model.config.context_length, model.config.rope_scaling) == (2048, None)
    scaling = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 100}
    assert load_model(DEMO_FOLDER, yarn="auto", rope_scaling=scaling).config.yarn_factor_for(101) == 2
    drafter = Engine.load(yarn="auto", draft=DEMO_FOLDER).speculative
    assert isinstance(drafter, DraftModel)
    assert drafter.model.config.yarn_choices == ()
    options: dict[str, Any]
    for options, words in (({"yarn": "auto", "yarn_factor": 2.0}, "found both"), ({"yarn": 4}, "expected 'auto'")):
        with pytest.raises(OptionError, match=words):
            load_model(DEMO_FOLDER, **options)


# The same as a model of that factor


@pytest.mark.parametrize("kind", [{}, {"kv_bits": 8}, {"max_kv_size": 40}], ids=str)
def test_logits_are_bit_equal(
    by_request: Qwen3ForCausalLM, fixed: dict[float, Qwen3ForCausalLM], kind: dict[str, Any]
) -> None:
    tokens = mx.array([LONG[:60], LONG[60:120]], dtype=mx.int32)
    seen = []
    for factor, other in fixed.items():
        ours = make_cache(by_request, batch_size=2, yarn_factor=factor, **kind)
        theirs = make_cache(other, batch_size=2, **kind)
        for start, stop in ((0, 23), (23, 59), (59, 60)):
            found = by_request(tokens[:, start:stop], ours)
            assert mx.array_equal(found, other(tokens[:, start:stop], theirs))
        seen.append(found)
    assert not mx.array_equal(seen[0], seen[1])
    assert not mx.array_equal(seen[1], seen[2])
    assert mx.array_equal(by_request(tokens), fixed[1.0](tokens))


def test_compiled_steps_take_the_rope_of_their_cache(
    tiny: Qwen3ForCausalLM, fixed: dict[float, Qwen3ForCausalLM]
) -> None:
    compiled = under(tiny.config.with_yarn_by_request(), tiny)
    compiled.model.decoder = CompiledDecoder(compiled.model)
    for factor, other in fixed.items():
        ours, theirs = make_cache(compiled, yarn_factor=factor), make_cache(other)
        for start, stop in ((0, 70), (70, 71), (71, 72)):
            tokens = mx.array([LONG[start:stop]], dtype=mx.int32)
            assert mx.allclose(compiled(tokens, ours), other(tokens, theirs), atol=1e-5)


def requests() -> list[Request]:
    """Requests of all factors, some with a common beginning."""
    lengths = (9, 40, CONTEXT, CONTEXT + 30, 2 * CONTEXT + 20, 40, 90)
    return [asked(LONG[: length + place], 6 + place, sampling=SEEDED) for place, length in enumerate(lengths)]


def test_requests_beside_each_other(
    by_request: Qwen3ForCausalLM, fixed: dict[float, Qwen3ForCausalLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[set[float | None]] = []
    forward = RunningBatch._forward

    def recorded(self: RunningBatch, tokens: mx.array) -> mx.array:
        kinds = [one.request.cache for one in self.going]
        batches.append({kind.yarn_factor for kind in kinds if isinstance(kind, CacheKind)})
        return forward(self, tokens)

    monkeypatch.setattr(RunningBatch, "_forward", recorded)
    scheduler = new_scheduler(by_request, store=1 << 24)
    handles = [scheduler.submit(request) for request in requests()]
    factors = [handle.yarn_factor for handle in handles]
    assert sorted({factor for factor in factors if factor}) == list(FACTORS)
    found = run(scheduler, handles)
    assert {factor for batch in batches for factor in batch} == set(FACTORS)
    assert all(len(batch) == 1 for batch in batches)
    for request, factor, tokens in zip(requests(), factors, found, strict=True):
        assert factor is not None
        assert tokens == alone(fixed[factor], request)


@pytest.mark.parametrize("guesses", ["lookup", "draft"])
def test_guesses_change_nothing(by_request: Qwen3ForCausalLM, guesses: str) -> None:
    front = LONG[:20] * 5
    drafter = DraftModel(by_request) if guesses == "draft" else PromptLookup()
    for length in (30, 100):
        request = asked(front[:length], 20)
        assert alone(by_request, replace(request, drafter=drafter)) == alone(by_request, request)


def test_a_cache_knows_its_factor(
    by_request: Qwen3ForCausalLM, fixed: dict[float, Qwen3ForCausalLM], tmp_path: Path
) -> None:
    cache = make_cache(by_request, yarn_factor=2)
    before = by_request(mx.array([LONG[:90]]), cache)
    cache.save(tmp_path / "cache.safetensors")
    again, _ = load_cache(tmp_path / "cache.safetensors", by_request)
    following = mx.array([LONG[90:95]])
    assert mx.array_equal(by_request(following, again), by_request(following, cache))
    own, _ = load_cache(tmp_path / "cache.safetensors", fixed[2.0])  # which rotates alike
    assert mx.array_equal(fixed[2.0](following, own), by_request(following, load_cache_of(by_request, tmp_path)))
    for other in (fixed[1.0], fixed[4.0]):
        with pytest.raises(CacheError):
            load_cache(tmp_path / "cache.safetensors", other)
        with pytest.raises(CacheError):
            other(following, cache)
    assert before.shape == (1, 90, VOCAB_SIZE)
    # A reply behind a caller's cache has the context of its factor.
    scheduler = new_scheduler(by_request)
    handle = scheduler.submit(asked(LONG[:9], 1000, cache=load_cache_of(by_request, tmp_path)))
    assert handle.yarn_factor == 2
    assert handle.generation_of(scheduler).limit == 2 * CONTEXT - 90 - 9


def load_cache_of(model: Qwen3ForCausalLM, folder: Path) -> Any:
    return load_cache(folder / "cache.safetensors", model)[0]


# What was read


def cached(model: Qwen3ForCausalLM, disk: DiskTier | None, prompts: Sequence[tuple[int, int]]) -> list[int]:
    """How many tokens each prompt, given as (length, limit), finds that others have read."""
    scheduler = new_scheduler(model)
    scheduler.use_store(1 << 24, disk)
    found = []
    for length, limit in prompts:
        handle: Handle = scheduler.submit(asked(LONG[:length], limit, end_token_ids=frozenset(range(VOCAB_SIZE))))
        run(scheduler, [handle])
        found.append(handle.cached_tokens)
    scheduler.store.flush()
    return found


def test_blocks_are_kept_apart_by_factor(by_request: Qwen3ForCausalLM, tmp_path: Path) -> None:
    short, scaled, longest = (49, 2), (49, CONTEXT), (49, 3 * CONTEXT)
    disk = DiskTier(tmp_path / "cache", 1 << 24)
    assert cached(by_request, disk, [short, short, scaled, scaled, short, longest]) == [0, 48, 0, 48, 48, 0]
    assert cached(by_request, DiskTier(tmp_path / "cache", 1 << 24), [scaled, short, longest]) == [48, 48, 48]


# Conversations and texts


@pytest.fixture(scope="module")
def engines(babbler: Qwen3ForCausalLM, tokenizer: Tokenizer) -> dict[float | None, Engine]:
    """Engines of the same weights: by request for None, else of one factor for all."""
    config = babbler.config
    configs = {None: config.with_yarn_by_request(), 1.0: config, 2.0: config.with_yarn(2), 4.0: config.with_yarn(4)}
    return {factor: Engine(under(config, babbler), tokenizer) for factor, config in configs.items()}


@pytest.fixture(scope="module")
def engine(engines: dict[float | None, Engine]) -> Engine:
    return engines[None]


def words(engine: Engine, tokens: int) -> str:
    return engine.tokenizer.decode(engine.tokenizer.encode("count the letters of that word " * tokens)[:tokens])


def test_a_conversation_that_outgrows_a_factor_is_read_anew_once(
    engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    conversation = Conversation(engine, thinking=False, max_tokens=4)
    factors, notes = [], []
    for number in range(6):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            *_, done = conversation.stream(f"{number}. {words(engine, 150)}", seed=1)
        assert isinstance(done, Done)
        factors.append(done.yarn_factor)
        notes += caplog.messages
        prompt, known = done.usage.prompt_tokens, done.usage.cached_tokens
        if caplog.messages:
            assert known == 0
            assert f"all {prompt} tokens are read anew" in caplog.text
        elif number:
            assert prompt - known < 150 + 60  # the new message, the answer before it, and a part of a block
        assert done.reply == engine.chat(conversation.messages[:-1], thinking=False, max_tokens=4, seed=1)
    assert factors == [1, 1, 1, 2, 2, 2]
    assert len(notes) == 1
    assert notes[0].startswith("conversation: outgrew its YaRN factor of 1, and goes on with 2")
    for _ in range(4):
        conversation.undo()
    with caplog.at_level(logging.WARNING):
        *_, done = conversation.stream("One more.", seed=1)
    assert isinstance(done, Done)
    assert done.yarn_factor == 1
    assert "conversation: fits a YaRN factor of 1 again" in caplog.text


def test_a_batch_scales_each_of_its_conversations(engines: dict[float | None, Engine]) -> None:
    engine = engines[None]
    texts = ["What is 2 + 3?", words(engine, 520), words(engine, 1030), "Hello"]
    conversations = [[{"role": "user", "content": text}] for text in texts]
    options: dict[str, Any] = {"sampling": {"temperature": 0}, "max_tokens": 6, "thinking": False}
    found = dict(engine.batch(conversations, **options))
    assert [found[number].yarn_factor for number in range(4)] == [1, 2, 4, 1]
    for number, factor in enumerate([1.0, 2.0, 4.0, 1.0]):
        *_, done = engines[factor].stream(conversations[number], **options)
        assert isinstance(done, Done)
        assert found[number].tokens == done.tokens
        assert done.yarn_factor is None


def test_the_default_limit_does_not_count(engine: Engine) -> None:
    prompt = engine.tokenizer.encode(words(engine, 300))
    for length, factor in ((300, 1), (512 - 128, 1), (512 - 127, 2)):
        text = (prompt * 2)[:length]
        response = next(mlxqwen.stream_generate(engine.model, engine.tokenizer, text))
        assert response.yarn_factor == factor
    explicit = mlxqwen.stream_generate(engine.model, engine.tokenizer, prompt, max_tokens=2048)
    assert next(explicit).yarn_factor == 4


def test_python_says_so_when_verbose(engine: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    mlxqwen.generate(engine.model, engine.tokenizer, "Hello", max_tokens=600, stop="e", verbose=True)
    assert "YaRN: factor 2\n" in capsys.readouterr().out


# The command

VOWELS = [word for vowel in "aeiou" for word in ("--stop", vowel)]


def test_the_command_states_the_factor() -> None:
    common = ("generate", "--yarn", "auto", "--verbose", "--temperature", "0", "--no-thinking", "--max-tokens")
    short = run_command(*common, "3", "Hello")
    assert short.err.splitlines()[0].startswith("context 2,048, YaRN by request from 512 tokens on, ")
    assert "\nYaRN: not scaled\n" in short.err
    assert short.out == run_command("generate", "--temperature", "0", "--no-thinking", "--max-tokens", "3", "Hello").out
    raw = run_command("generate", "--yarn", "auto", "--max-tokens", "600", "--stop", "e", "--raw", "--json", "Hello")
    assert json.loads(raw.out)["yarn_factor"] == 2
    assert "yarn_factor" not in run_command("generate", "--json", "--max-tokens", "1", "Hello").out


def test_a_batch_of_the_command(tmp_path: Path) -> None:
    questions, answers = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    questions.write_text("".join(json.dumps({"prompt": "Hello", "max_tokens": limit}) + "\n" for limit in (3, 600)))
    command = ("generate", "--batch", str(questions), "--output", str(answers), "--no-thinking", "--verbose", *VOWELS)
    result = run_command(*command, "--yarn", "auto")
    assert result.status == 0, result
    assert "1 answer, YaRN: not scaled\n1 answer, YaRN: factor 2\n" in result.err
    found = {line["index"]: line["yarn_factor"] for line in map(json.loads, answers.read_text().splitlines())}
    assert found == {0: 1.0, 1: 2.0}
    assert run_command(*command).status == 1  # with other options


def test_the_chat_states_the_factor() -> None:
    typed = f"Hello\n{'count ' * 420}\n/stats\n".encode()
    command = ("chat", "--yarn", "auto", "--verbose", "--max-tokens", "100", "--no-thinking", *VOWELS)
    result = run_command(*command, stdin=typed)
    assert result.status == 0, result
    assert result.err.index("YaRN: not scaled") < result.err.index("note: conversation: outgrew its YaRN factor of 1")
    assert result.err.count("YaRN: factor 2") == 2  # below the answer, and in /stats


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (("--yarn", "auto", "--yarn-factor", "2", "Hello"), 2, "--yarn chooses the factor: leave out --yarn-factor"),
        (("--yarn", "4", "Hello"), 2, "auto"),
        (("--yarn", "auto", "--raw", "count " * 2100), 1, "context of 2,048, by YaRN's factor 4,"),
    ],
    ids=["both", "a number", "too long"],
)
def test_the_command_refuses(arguments: tuple[str, ...], status: int, words: str) -> None:
    result = run_command("generate", *arguments)
    assert (result.status, result.out) == (status, "")
    assert words in result.err
