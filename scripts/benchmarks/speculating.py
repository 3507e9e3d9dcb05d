"""Speculative decoding by prompt lookup beside plain decoding of the same replies; see `bench_speculation.py`."""

from __future__ import annotations

from bench_speculation import measure, questions

from benchmarks.comparison import Comparison
from benchmarks.settings import Settings
from mlxqwen.engine.engine import Engine
from mlxqwen.engine.speculation.prompt_lookup import PromptLookup
from mlxqwen.sampling.params import SamplingParams

__all__ = ["speculation"]


def speculation(settings: Settings) -> list[Comparison]:
    """Passes of the demo model a token, and processor time relative to plain decoding, token for token the same."""
    engine = Engine.load()
    rows = []
    for what, again in (("a question", False), ("a question that was answered before", True)):
        prompts = questions(engine, answered_before=again)
        prompts = prompts[:2] if settings.quick else prompts
        for how, params in (("greedy", SamplingParams(temperature=0.0)), ("T 1", SamplingParams(seed=1))):
            settings.tell(f"speculation: {what}, {how}")
            savings = measure(engine, prompts, PromptLookup, params, settings.turns(3, quick=1))
            name = f"speculation by lookup, {what}, {how}"
            plain = "plain decoding"
            rows.append(Comparison(name, plain, "passes a token", [savings.passes / savings.tokens], [1.0]))
            times = [1 / ratio for ratio in savings.ratios]
            rows.append(Comparison(name, plain, "of plain time", times, [1.0] * len(times)))
    return rows
