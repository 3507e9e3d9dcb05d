"""What speculative decoding saves: guesses that are right, passes of the model, time beside plain decoding."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast
from unittest.mock import patch

import mlx.core as mx
import mlx.nn as nn

from benchmarks.comparison import Table
from benchmarks.settings import Settings
from mlxqwen.cache import make_cache
from mlxqwen.engine.engine import Engine
from mlxqwen.engine.speculation.draft_model import DraftModel
from mlxqwen.engine.speculation.drafter import Drafter
from mlxqwen.engine.speculation.prompt_lookup import PromptLookup
from mlxqwen.engine.text_generation import end_token_ids
from mlxqwen.engine.token_stream import generate_tokens
from mlxqwen.files.config import ModelConfig
from mlxqwen.files.hub import DEMO_FOLDER
from mlxqwen.model.loading import load_model
from mlxqwen.model.qwen3 import Qwen3ForCausalLM
from mlxqwen.sampling.params import SamplingParams

__all__ = ["MAX_TOKENS", "WORDS", "Savings", "draft_model", "measure", "passes", "questions", "speculation"]

WORDS = ("strawberry", "banana", "mississippi", "parallel", "engineer", "committee", "bookkeeper", "tomorrow")
MAX_TOKENS = 150
_DRAFT_BITS = 3
_LENGTHS = (2, 3, 5, 9)
_SAMPLING = {"greedy": SamplingParams(temperature=0.0), "T 1": SamplingParams(seed=1)}


@dataclass(frozen=True)
class Savings:
    """Of several replies: their tokens, what was drafted and accepted, passes of the model, and ratios of times."""

    tokens: int
    drafted: int
    accepted: int
    passes: int
    ratios: list[float]

    def cells(self) -> tuple[str, ...]:
        """Of a line of the table."""
        share = f"{self.accepted / self.drafted:.0%}" if self.drafted else "–"
        ratio = f"{statistics.median(self.ratios):.2f}"
        return str(self.tokens), str(self.drafted), share, f"{self.passes / self.tokens:.2f}", ratio


def speculation(settings: Settings) -> Table:
    """Replies of the demo model with guesses and without, token for token the same.

    Times are processor time, of pairs one after the other; a ratio above one is in speculation's favour.
    """
    engine, draft = Engine.load(DEMO_FOLDER), draft_model(_DRAFT_BITS)
    drafters: dict[str, Callable[[], Drafter]] = {
        f"lookup, {length} tokens match": partial(PromptLookup, length) for length in (1, 2, 3)
    }
    drafters[f"the model in {_DRAFT_BITS} bits"] = partial(DraftModel, draft)
    rows = []
    for reply, again in (("to a question", False), ("to the same question again", True)):
        prompts = questions(engine, WORDS[:2] if settings.quick else WORDS, answered_before=again)
        for how, params in _SAMPLING.items():
            for name, new_drafter in drafters.items():
                settings.tell(f"speculation: {reply}, {how}, {name}")
                savings = measure(engine, prompts, new_drafter, params, settings.turns(3, quick=1))
                rows.append((f"{reply}, {how}", name, *savings.cells()))
    columns = ("reply", "guesses by", "tokens", "drafted", "accepted", "passes a token", "time, plain / speculative")
    return Table("Speculative decoding of the demo model", columns, rows, texts=2)


def measure(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    new_drafter: Callable[[], Drafter],
    params: SamplingParams,
    turns: int,
) -> Savings:
    """Each prompt answered plainly and speculatively, `turns` times in turn.

    Raises:
        ValueError: a reply is not the one that is given without guesses.
    """
    options: dict[str, Any] = {
        "sampling": params,
        "max_tokens": MAX_TOKENS,
        "eos_token_ids": end_token_ids(engine.model, engine.tokenizer),
    }
    tokens = drafted = accepted = passes = 0
    ratios = []
    for prompt in prompts:
        for turn in range(turns):
            began = time.process_time()
            cache = make_cache(engine.model)  # of its own: nothing is read from what earlier turns left
            plain = [one.token for _, one in generate_tokens(engine.model, prompt, cache=cache, **options)]
            plain_time = time.process_time() - began
            with patch.object(engine.model, "logits", wraps=engine.model.logits) as head:
                began = time.process_time()
                stream = generate_tokens(
                    engine.model, prompt, cache=make_cache(engine.model), drafter=new_drafter(), **options
                )
                found = [one for _, one in stream]
                ratios.append(plain_time / (time.process_time() - began))
            if [one.token for one in found] != plain:
                raise ValueError(f"another reply than without guesses: {[one.token for one in found]} for {plain}")
            if turn == 0:
                tokens, passes = tokens + len(found), passes + head.call_count
                drafted, accepted = drafted + found[-1].drafted_tokens, accepted + found[-1].accepted_tokens
    return Savings(tokens, drafted, accepted, passes, ratios)


def questions(engine: Engine, words: Sequence[str] = WORDS, *, answered_before: bool = False) -> list[list[int]]:
    """Prompts that ask to count letters, and if wanted have the same question and its answer before."""
    prompts = []
    for word in words:
        prompt = engine.prompt([{"role": "user", "content": f"How many {word[-1]}'s in {word}?"}])
        if answered_before:
            stream = generate_tokens(
                engine.model,
                prompt,
                sampling=_SAMPLING["greedy"],
                eos_token_ids=end_token_ids(engine.model, engine.tokenizer),
                max_tokens=MAX_TOKENS,
            )
            prompt = [*prompt, *(one.token for _, one in stream), *engine.tokenizer.encode("\n"), *prompt]
        prompts.append(prompt)
    return prompts


def draft_model(bits: int) -> Qwen3ForCausalLM:
    """The demo model in fewer bits."""
    model = load_model(DEMO_FOLDER, fused=False)
    nn.quantize(model, group_size=32, bits=bits)
    return model


def passes(settings: Settings) -> Table:
    """What a pass over several tokens costs, in passes over one; the most that guesses can save."""
    models = {
        "the demo": load_model(DEMO_FOLDER),
        "four layers as wide as those of Qwen3-0.6B, 4 bits": _wide_model(),
    }
    turns = settings.turns(30)
    rows = [(name, *(f"{cost:.1f}" for cost in pass_costs(model, turns))) for name, model in models.items()]
    return Table("A pass over several tokens, in passes over one", ("tokens", *map(str, _LENGTHS)), rows)


def pass_costs(model: Qwen3ForCausalLM, turns: int) -> list[float]:
    """Processor time of a pass over each of `_LENGTHS` tokens, over that of a pass over one, behind 100 tokens."""
    cache = make_cache(model)
    mx.eval(model(mx.array([[1] * 100]), cache))
    times: dict[int, list[float]] = {length: [] for length in (1, *_LENGTHS)}
    for _ in range(turns):
        for length, measured in times.items():
            cache.trim(100)
            began = time.process_time()
            mx.eval(model.logits(model.model(mx.array([[1] * length], dtype=mx.int32), cache)))
            measured.append(time.process_time() - began)
    return [statistics.median(a / b for a, b in zip(times[length], times[1], strict=True)) for length in _LENGTHS]


def _wide_model() -> Qwen3ForCausalLM:
    """Four layers of random weights in 4 bits, as wide as those of Qwen3-0.6B, and a small vocabulary."""
    config = {
        "model_type": "qwen3",
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0,
        "vocab_size": 1024,
        "hidden_size": 1024,
        "num_hidden_layers": 4,
        "intermediate_size": 3072,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": True,
    }
    model = Qwen3ForCausalLM(ModelConfig.from_dict(config))
    nn.quantize(model, group_size=64, bits=4)
    mx.eval(cast(Any, model).parameters())
    return model
