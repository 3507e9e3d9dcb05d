"""What is measured, how often, and what it comes to; never how fast it is."""

from __future__ import annotations

import pytest

from mlxqwen.cache import make_cache
from mlxqwen.device import Device
from mlxqwen.engine.benchmark import BenchmarkRun, Speed, benchmark, choose_contexts, summarize, weight_bytes
from mlxqwen.errors import InsufficientMemoryError, OptionError
from mlxqwen.model.footprint import cache_bytes
from mlxqwen.model.qwen3 import Qwen3ForCausalLM
from mlxqwen.text.tokenizer import Tokenizer
from tests.conftest import random_model
from tests.scripted_model import scripted_engine


@pytest.mark.parametrize(
    ("context", "tokens", "chosen"),
    [
        (40_960, 64, [128, 512, 2048, 8192]),
        (8_257, 64, [128, 512, 2048, 8192]),
        (8_256, 64, [128, 512, 2048, 8191]),
        (512, 64, [128, 447]),
        (64, 8, [55]),
        (64, 62, [1]),
    ],
)
def test_usual_contexts_go_as_far_as_the_models(context: int, tokens: int, chosen: list[int]) -> None:
    assert choose_contexts(random_model(context=context), None, tokens=tokens) == chosen


def test_contexts_that_are_asked_for(tiny: Qwen3ForCausalLM) -> None:
    assert choose_contexts(tiny, [55, 3, 3], tokens=8) == [3, 55]
    with pytest.raises(OptionError, match="context: found 56, expected at most 55"):
        choose_contexts(tiny, [56], tokens=8)
    assert choose_contexts(tiny, [5_000], tokens=8, max_kv_size=64) == [5_000]
    with pytest.raises(OptionError, match="context: found 56"):
        choose_contexts(tiny, [56], tokens=8, max_kv_size=65)  # a window beyond the context does not slide in it
    with pytest.raises(OptionError, match="tokens: found 63, expected fewer than the context of 64"):
        choose_contexts(tiny, None, tokens=63)
    for tokens, contexts in ((0, [3]), (8, [0])):
        with pytest.raises(OptionError, match="found 0, expected an integer from 1"):
            choose_contexts(tiny, contexts, tokens=tokens)


def test_every_context_is_read_as_often_as_asked_and_once_to_warm_up(
    demo: tuple[Qwen3ForCausalLM, Tokenizer],
) -> None:
    engine, model = scripted_engine(*demo)
    measuring = benchmark(engine.model, [7, 20], lambda: make_cache(engine.model), tokens=5, repeat=3, prefill_chunk=8)
    assert model.read == 0
    runs: list[BenchmarkRun] = []
    for run in measuring:
        assert model.read == 7 + 20 + sum(done.context for done in runs) + run.context
        runs.append(run)
    assert [(run.context, run.tokens) for run in runs] == [(7, 5), (20, 5)] * 3
    assert all(run.prefill_seconds > 0 and run.decode_seconds > 0 for run in runs)


@pytest.mark.parametrize("kv_bits", [None, 8])
def test_memory_is_that_of_the_cache_and_of_all(kv_bits: int | None) -> None:
    model = random_model(context=600)
    new_cache = lambda: make_cache(model, kv_bits=kv_bits)  # noqa: E731
    (run,) = benchmark(model, [500], new_cache, tokens=11, repeat=1)
    assert run.cache_bytes == cache_bytes(model.config, 512, 4, kv_bits)  # buffers grow by 256 tokens
    assert run.peak_bytes > run.cache_bytes + weight_bytes(model)
    (ring,) = benchmark(model, [900], lambda: make_cache(model, max_kv_size=100), tokens=11, repeat=1)
    assert ring.cache_bytes == cache_bytes(model.config, 100, 4, None)


def test_what_does_not_fit_is_refused_unless_forced(tiny: Qwen3ForCausalLM) -> None:
    def new_cache(window: int | None = None) -> object:
        return make_cache(tiny, max_kv_size=window)

    needed = weight_bytes(tiny) + cache_bytes(tiny.config, 48, 4, None)
    for memory, window, force, fits in (
        (needed, None, False, True),
        (needed - 1, None, False, False),
        (needed - 1, None, True, True),
        (needed - 1, 47, False, True),
    ):
        device = Device("small", False, memory, memory)

        def measure(window: int | None = window, force: bool = force, device: Device = device) -> list[BenchmarkRun]:
            make = lambda: make_cache(tiny, max_kv_size=window)  # noqa: E731
            return list(benchmark(tiny, [40], make, tokens=8, repeat=1, device=device, force=force))

        if fits:
            assert len(measure()) == 1
        else:
            with pytest.raises(InsufficientMemoryError, match="weights and cache of 48 tokens take"):
                measure()


def test_medians() -> None:
    runs = [
        BenchmarkRun(100, 10, 4.0, 2.0, 50, 70),
        BenchmarkRun(10, 10, 1.0, 1.0, 5, 7),
        BenchmarkRun(100, 10, 2.0, 5.0, 50, 90),
        BenchmarkRun(100, 10, 9.0, 4.0, 50, 80),
    ]
    assert summarize(runs) == [
        Speed(10, 1, 1.0, 10.0, 10.0, 5, 7),
        Speed(100, 3, 4.0, 25.0, 2.5, 50, 90),
    ]
    assert summarize([]) == []
