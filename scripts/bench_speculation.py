"""What speculative decoding saves: guesses that are right, passes of the model, time beside plain decoding.

    python scripts/bench_speculation.py [--turns N] [--draft-bits N]     replies and their times
    python scripts/bench_speculation.py draws --draft-bits 2 --temperature 1 [--top-k N]
    python scripts/bench_speculation.py passes [--wide]
    python scripts/bench_speculation.py same [--dtype bfloat16] [--questions N]

With the demo model, whose smaller sister is the demo model in fewer bits. Times are pairs, one after the other, of the
same reply; the ratio is the median of the pairs, above one where speculation is quicker. "draws" counts how often model
and draft draw the same token, "passes" what a pass over several tokens costs (on a few layers of random 4-bit weights,
as wide as Qwen3-0.6B's, with --wide), "same" how many whole replies are the same with and without lookup.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "convert")]

import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402
import numpy as np  # noqa: E402

from mlxqwen.cache import make_cache  # noqa: E402
from mlxqwen.engine.engine import Engine  # noqa: E402
from mlxqwen.engine.speculation.draft_model import DraftModel  # noqa: E402
from mlxqwen.engine.speculation.drafter import Drafter  # noqa: E402
from mlxqwen.engine.speculation.prompt_lookup import PromptLookup  # noqa: E402
from mlxqwen.engine.text_generation import end_token_ids  # noqa: E402
from mlxqwen.engine.token_stream import generate_tokens  # noqa: E402
from mlxqwen.files.config import ModelConfig  # noqa: E402
from mlxqwen.files.hub import DEMO_FOLDER  # noqa: E402
from mlxqwen.model.loading import load_model  # noqa: E402
from mlxqwen.model.qwen3 import Qwen3ForCausalLM  # noqa: E402
from mlxqwen.sampling.params import SamplingParams  # noqa: E402
from mlxqwen.sampling.sampler import Sampler, token_logprobs  # noqa: E402

WORDS = ("strawberry", "banana", "mississippi", "parallel", "engineer", "committee", "bookkeeper", "tomorrow")
HEAD = "| reply | guesses by | tokens | drafted | accepted | passes a token | time, plain / speculative |"


@dataclass(frozen=True)
class Savings:
    """Of several replies: their tokens, what was drafted and accepted, passes of the model, and ratios of times."""

    tokens: int
    drafted: int
    accepted: int
    passes: int
    ratios: list[float]

    def markdown(self, reply: str, drafter: str) -> str:
        """A line of the table."""
        share = f"{self.accepted / self.drafted:.0%}" if self.drafted else "–"
        ratio = statistics.median(self.ratios)
        cells = (self.tokens, self.drafted, share, f"{self.passes / self.tokens:.2f}", f"{ratio:.2f}")
        return f"| {' | '.join((reply, drafter, *map(str, cells)))} |"


def measure(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    new_drafter: Callable[[], Drafter],
    params: SamplingParams,
    turns: int,
) -> Savings:
    """Each prompt answered plainly and speculatively, `turns` times in turn. The replies have to be the same."""
    ends = end_token_ids(engine.model, engine.tokenizer)
    how: dict[str, Any] = {"sampling": params, "max_tokens": 150, "eos_token_ids": ends}
    tokens = drafted = accepted = passes = 0
    ratios = []
    for prompt in prompts:
        for turn in range(turns):
            with patch.object(engine.model, "logits", wraps=engine.model.logits) as head:
                began = time.process_time()
                how["cache"] = make_cache(engine.model)  # of its own: nothing is known of the prompt
                expected = [one.token for _, one in generate_tokens(engine.model, prompt, **how)]
                plain = time.process_time() - began
                head.reset_mock()
                began = time.process_time()
                how["cache"] = make_cache(engine.model)
                told = [one for _, one in generate_tokens(engine.model, prompt, drafter=new_drafter(), **how)]
                found = [one.token for one in told]
                ratios.append(plain / (time.process_time() - began))
            if found != expected:
                raise SystemExit(f"another reply than without speculation: {found} for {expected}")
            if turn == 0:
                tokens, passes = tokens + len(found), passes + head.call_count
                drafted, accepted = drafted + told[-1].drafted_tokens, accepted + told[-1].accepted_tokens
    return Savings(tokens, drafted, accepted, passes, ratios)


def questions(engine: Engine, *, answered_before: bool) -> list[list[int]]:
    """Prompts that ask to count letters, and if wanted have the same question and its answer before."""
    prompts = []
    for word in WORDS:
        question = [{"role": "user", "content": f"How many {word[-1]}'s in {word}?"}]
        prompt = engine.prompt(question)
        if answered_before:
            stream = generate_tokens(
                engine.model,
                prompt,
                sampling=SamplingParams(temperature=0),
                eos_token_ids=end_token_ids(engine.model, engine.tokenizer),
                max_tokens=150,
            )
            prompt = [*prompt, *(one.token for _, one in stream), *engine.tokenizer.encode("\n"), *prompt]
        prompts.append(prompt)
    return prompts


def agreement(
    model: Qwen3ForCausalLM, draft: Qwen3ForCausalLM, prompts: Sequence[Sequence[int]], params: SamplingParams
) -> tuple[float, float]:
    """How often two models draw the same token from common random numbers, and how often any coupling could at most.

    The latter is the mean of the sum over all tokens of the smaller of the two probabilities.
    """
    agreed, most = [], []
    for prompt in prompts:
        text = [*prompt, *(one.token for _, one in generate_tokens(model, prompt, sampling=params, max_tokens=60))]
        both = [one(mx.array([text]))[0, len(prompt) - 1 : -1].astype(mx.float32) for one in (model, draft)]
        for place in range(both[0].shape[0]):
            rows = [logits[place] for logits in both]
            mass = [np.exp(np.array(token_logprobs(row, params, [], []), dtype=np.float64)) for row in rows]
            most.append(float(np.minimum(*mass).sum()))
            for seed in range(8):
                seeded = replace(params, seed=1000 * place + seed)
                drawn = [Sampler([seeded], [[]], row.size)(row[None]).item() for row in rows]
                agreed.append(drawn[0] == drawn[1])
    return statistics.mean(agreed), statistics.mean(most)


def pass_costs(model: Qwen3ForCausalLM, lengths: Sequence[int], turns: int = 30) -> dict[int, float]:
    """Processor time of a pass over so many tokens, over that of a pass over one, behind 100 tokens."""
    cache = make_cache(model)
    mx.eval(model(mx.array([[1] * 100]), cache))
    times: dict[int, list[float]] = {length: [] for length in (1, *lengths)}
    for _ in range(turns):
        for length, found in times.items():
            cache.trim(100)
            began = time.process_time()
            mx.eval(model.logits(model.model(mx.array([[1] * length], dtype=mx.int32), cache)))
            found.append(time.process_time() - began)
    return {n: statistics.median(a / b for a, b in zip(times[n], times[1], strict=True)) for n in lengths}


def wide_model() -> Qwen3ForCausalLM:
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


def same_replies(engine: Engine, number: int, params: SamplingParams) -> int:
    """Of so many questions, how many have the same whole reply, token by token, with lookup as without."""
    ends = end_token_ids(engine.model, engine.tokenizer)
    same = 0
    for seed, question in enumerate(islice(many_questions(), number)):
        prompt = engine.prompt([{"role": "user", "content": question}])
        how: dict[str, Any] = {"sampling": replace(params, seed=seed), "max_tokens": 150, "eos_token_ids": ends}
        plain = [one.token for _, one in generate_tokens(engine.model, prompt, **how)]
        guessed = generate_tokens(engine.model, prompt, drafter=PromptLookup(), **how)
        same += plain == [one.token for _, one in guessed]
    return same


def many_questions() -> Iterator[str]:
    """Of each kind in turn: letters to count, sums."""
    for number in count():
        word = WORDS[number % len(WORDS)]
        letter = word[number // len(WORDS) % len(word)]
        yield f"How many {letter}'s in {word}?"
        yield f"What is {17 * number % 89 + 2} + {29 * number % 97 + 3}?"


def print_replies(engine: Engine, draft: Qwen3ForCausalLM, bits: int, turns: int) -> None:
    """The table of passes and times."""
    greedy, warm = SamplingParams(temperature=0), SamplingParams(temperature=1.0, seed=1)
    drafters: dict[str, Callable[[], Drafter]] = {
        f"lookup, {n} tokens match": partial(PromptLookup, n) for n in (1, 2, 3)
    }
    drafters[f"the model in {bits} bits"] = partial(DraftModel, draft)
    print(f"{HEAD}\n| --- | --- | ---: | ---: | ---: | ---: | ---: |")
    for what, prompts in (
        ("to a question", questions(engine, answered_before=False)),
        ("to the same question again", questions(engine, answered_before=True)),
    ):
        for how, params in (("greedy", greedy), ("T 1", warm)):
            for name, new_drafter in drafters.items():
                savings = measure(engine, prompts, new_drafter, params, turns)
                print(savings.markdown(f"{what}, {how}", name), flush=True)


def main() -> None:
    """Print what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("replies", "draws", "passes", "same"), default="replies")
    parser.add_argument("--turns", type=int, default=3, help="pairs of times for each prompt")
    parser.add_argument("--draft-bits", type=int, choices=(2, 3, 4, 6, 8), default=3, help="of the draft model")
    parser.add_argument("--temperature", type=float, default=1.0, help="of draws")
    parser.add_argument("--top-k", type=int, default=0, help="of draws; 0 keeps all tokens")
    parser.add_argument("--wide", action="store_true", help="passes on layers as wide as those of Qwen3-0.6B")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="to compute in; float32 by default on a CPU")
    parser.add_argument("--questions", type=int, default=40, help="of same")
    chosen = parser.parse_args()
    if chosen.what == "passes":
        model = wide_model() if chosen.wide else load_model(DEMO_FOLDER, dtype=chosen.dtype)
        costs = pass_costs(model, (2, 3, 5, 9))
        print("A pass over n tokens, in passes over one:", ", ".join(f"{n}: {cost:.2f}" for n, cost in costs.items()))
        return
    engine = Engine.load(DEMO_FOLDER, dtype=chosen.dtype)
    if chosen.what == "same":
        for how, params in (("greedy", SamplingParams(temperature=0)), ("seeded, T 1", SamplingParams(temperature=1))):
            print(f"{how}: {same_replies(engine, chosen.questions, params)} of {chosen.questions} the same", flush=True)
        return
    draft = load_model(DEMO_FOLDER, dtype=chosen.dtype, fused=False)
    nn.quantize(draft, group_size=32, bits=chosen.draft_bits)
    if chosen.what == "draws":
        params = SamplingParams(temperature=chosen.temperature, top_k=chosen.top_k, seed=3)
        found, most = agreement(engine.model, draft, questions(engine, answered_before=False)[:4], params)
        how = f"T {chosen.temperature:g}, top-k {chosen.top_k}"
        print(f"{how}: the same draw in {found:.1%} of places, {most:.1%} at most")
        return
    print_replies(engine, draft, chosen.draft_bits, chosen.turns)


if __name__ == "__main__":
    main()
