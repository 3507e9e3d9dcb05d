"""How often guesses are what the model draws: a draft model's draws, and whole replies with guesses and without."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import count, islice
from typing import Any

import mlx.core as mx
import numpy as np

from benchmarks.comparison import Table
from benchmarks.settings import Settings
from benchmarks.speculating import MAX_TOKENS, WORDS, draft_model, questions
from mlxqwen.cache import make_cache
from mlxqwen.engine.engine import Engine
from mlxqwen.engine.speculation.prompt_lookup import PromptLookup
from mlxqwen.engine.text_generation import end_token_ids
from mlxqwen.engine.token_stream import generate_tokens
from mlxqwen.files.hub import DEMO_FOLDER
from mlxqwen.model.qwen3 import Qwen3ForCausalLM
from mlxqwen.sampling.params import SamplingParams
from mlxqwen.sampling.sampler import Sampler, token_logprobs

__all__ = ["agreement", "draws", "same_replies", "same_reply_counts"]

_DRAWS = ((3, 1.5, 20), (2, 1.0, 0), (2, 2.0, 0))  # bits, temperature, top-k
_TOKENS, _SEEDS = 60, 8
_QUESTIONS = 40


def draws(settings: Settings) -> Table:
    """How often the demo model and itself in fewer bits draw the same token."""
    engine = Engine.load(DEMO_FOLDER)
    prompts = questions(engine, WORDS[: 1 if settings.quick else 4])
    rows = []
    for bits, temperature, top_k in _DRAWS:
        settings.tell(f"draws: {bits} bits, T {temperature:g}")
        params = SamplingParams(temperature=temperature, top_k=top_k, seed=3)
        same, most = agreement(engine.model, draft_model(bits), prompts, params)
        rows.append((str(bits), f"{temperature:g}", str(top_k or "all"), f"{same:.1%}", f"{most:.1%}"))
    columns = ("bits", "temperature", "top-k", "same draw", "at most")
    return Table("A draft model's draws beside the model's", columns, rows, texts=0)


def agreement(
    model: Qwen3ForCausalLM, draft: Qwen3ForCausalLM, prompts: Sequence[Sequence[int]], params: SamplingParams
) -> tuple[float, float]:
    """How often two models draw the same token from common random numbers, and how often any coupling could at most.

    The latter is the mean of the sum over all tokens of the smaller of the two probabilities.
    """
    agreed, most = [], []
    for prompt in prompts:
        reply = generate_tokens(model, prompt, sampling=params, max_tokens=_TOKENS)
        text = [*prompt, *(one.token for _, one in reply)]
        both = [one(mx.array([text]))[0, len(prompt) - 1 : -1].astype(mx.float32) for one in (model, draft)]
        for place in range(both[0].shape[0]):
            rows = [logits[place] for logits in both]
            mass = [np.exp(np.array(token_logprobs(row, params, [], []), dtype=np.float64)) for row in rows]
            most.append(float(np.minimum(*mass).sum()))
            for seed in range(_SEEDS):
                seeded = replace(params, seed=1000 * place + seed)
                drawn = [Sampler([seeded], [[]], row.size)(row[None]).item() for row in rows]
                agreed.append(drawn[0] == drawn[1])
    return statistics.mean(agreed), statistics.mean(most)


def same_replies(settings: Settings) -> Table:
    """Whole replies of the demo model that are the same, token by token, with lookup as without."""
    rows = []
    number = 2 if settings.quick else _QUESTIONS
    for dtype in ("float32", "bfloat16"):
        engine = Engine.load(DEMO_FOLDER, dtype=dtype)
        for drawn, temperature in (("greedy", 0.0), ("seeded, T 1", 1.0)):
            settings.tell(f"same-replies: {dtype}, {drawn}")
            same = same_reply_counts(engine, number, SamplingParams(temperature=temperature))
            rows.append((dtype, drawn, str(same), str(number)))
    return Table("The same reply with lookup as without", ("computed in", "drawn", "same", "of"), rows, texts=2)


def same_reply_counts(engine: Engine, number: int, params: SamplingParams) -> int:
    """Of so many questions, how many have the same whole reply with lookup as without."""
    ends = end_token_ids(engine.model, engine.tokenizer)
    same = 0
    for seed, question in enumerate(islice(_many_questions(), number)):
        prompt = engine.prompt([{"role": "user", "content": question}])
        options: dict[str, Any] = {
            "sampling": replace(params, seed=seed),
            "max_tokens": MAX_TOKENS,
            "eos_token_ids": ends,
        }
        plain, guessed = (
            [
                one.token
                for _, one in generate_tokens(
                    engine.model, prompt, cache=make_cache(engine.model), drafter=drafter, **options
                )
            ]
            for drafter in (None, PromptLookup())
        )
        same += plain == guessed
    return same


def _many_questions() -> Iterator[str]:
    """Of each kind in turn: letters to count, sums."""
    for number in count():
        word = WORDS[number % len(WORDS)]
        letter = word[number // len(WORDS) % len(word)]
        yield f"How many {letter}'s in {word}?"
        yield f"What is {17 * number % 89 + 2} + {29 * number % 97 + 3}?"
