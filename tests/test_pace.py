"""Long chunks of a prompt are computed in parts, by a clock of the test's own; nothing else changes by that."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import count
from typing import Any

import mlx.core as mx
import pytest

from mlxqwen.device import Device
from mlxqwen.engine.interrupts import ReadingPace
from mlxqwen.engine.scheduler import Scheduler
from mlxqwen.files.config import ModelConfig
from mlxqwen.model.qwen3 import Qwen3ForCausalLM
from tests.conftest import random_model
from tests.scheduling import GPU, alone, asked, new_scheduler, run

LAYERS = 5


@pytest.fixture(scope="module")
def model() -> Qwen3ForCausalLM:
    return random_model(context=512, layers=LAYERS)


def config_of(**shape: int) -> ModelConfig:
    published = {"hidden_size": 2560, "intermediate_size": 9728, "num_attention_heads": 32, "num_hidden_layers": 36}
    rest: dict[str, Any] = {"model_type": "qwen3", "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 64}
    rest |= {"max_position_embeddings": 512, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "tie_word_embeddings": False}
    return ModelConfig.from_dict({**published, **rest, **shape})


def test_parts_are_as_long_as_somebody_waits_for() -> None:
    pace = ReadingPace(config_of(), GPU)
    assert pace.layers_at_once(1) == 1  # nothing is known yet
    pace.took(100, 1.0)
    assert [pace.layers_at_once(tokens) for tokens in (1, 50, 51, 100, 400, 2048)] == [36, 36, 17, 9, 2, 1]
    pace.took(512, 0.1)
    assert pace.layers_at_once(2048) == 36


def test_chunks_are_shorter_only_where_a_layer_takes_long_and_no_number_changes() -> None:
    own = Device("a CPU", is_gpu=False, memory=1 << 34, usable_memory=1 << 34)
    pace = ReadingPace(config_of(), own)  # 101 million weights in a layer
    assert pace.chunk(224, is_ring=False) == 7
    assert pace.chunk(224, is_ring=True) == 224
    pace.took(7, 7 * 36 * 0.01)  # a token takes a hundredth of a second in each layer
    assert pace.chunk(224, is_ring=False) == 50
    pace.took(50, 0.1)
    assert pace.chunk(2048, is_ring=False) == 2048
    pace.took(50, 5_000.0)
    assert pace.chunk(2048, is_ring=False) == 7
    for other in (replace(own, is_gpu=True), replace(own, has_openblas=True)):
        assert ReadingPace(config_of(), other).chunk(2048, is_ring=False) == 2048
    small = ReadingPace(config_of(hidden_size=192, intermediate_size=512, num_attention_heads=8), own)
    assert small.chunk(512, is_ring=False) == 512


def clock_of(chunk_seconds: float) -> Callable[[], float]:
    """Looked at twice a chunk."""
    return count(0.0, chunk_seconds).__next__


def evaluations(scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many evaluations each step takes that reads a chunk → of the second chunk on, as the first tells the pace."""
    calls: list[int] = []
    found, real = [], mx.eval

    def counted(*arrays: Any) -> None:
        calls.append(1)
        real(*arrays)

    monkeypatch.setattr(mx, "eval", counted)
    handle = scheduler.submit(asked(range(64), 1, prefill_chunk=16))
    while scheduler.step():
        found.append(len(calls))
        calls.clear()
    monkeypatch.setattr(mx, "eval", real)
    del handle
    return [number for number in found if number][:4]


def test_only_slow_chunks_are_cut(model: Qwen3ForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    quick, slow = new_scheduler(model), new_scheduler(model)
    quick._pace = ReadingPace(model.config, GPU, clock_of(0.1))
    slow._pace = ReadingPace(model.config, GPU, clock_of(4.0))
    of_quick, of_slow = evaluations(quick, monkeypatch), evaluations(slow, monkeypatch)
    assert of_quick[0] == of_slow[0]  # a layer at a time, as nothing is known
    assert [later - earlier for earlier, later in zip(of_quick[1:], of_slow[1:], strict=True)] == [LAYERS - 1] * 3


def test_parts_change_no_token(model: Qwen3ForCausalLM) -> None:
    found = []
    for seconds in (0.0, 0.9, 60.0):
        scheduler = new_scheduler(model)
        scheduler._pace = ReadingPace(model.config, GPU, clock_of(seconds))
        found += run(scheduler, [scheduler.submit(asked(range(60), 8, prefill_chunk=16))])
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("tokens_at_once", [1, 4, 30, 60])
def test_prompts_that_come_together_are_whole_where_chunks_are_short(
    model: Qwen3ForCausalLM, tokens_at_once: int
) -> None:
    own = Device("a CPU", is_gpu=False, memory=1 << 34, usable_memory=1 << 34)
    asked_for = [asked([(7 * n + row) % 50 for n in range(length)], 8) for row, length in enumerate((10, 20, 24, 14))]
    scheduler = new_scheduler(model)
    scheduler._pace = ReadingPace(model.config, own, count(0.0, 1e6).__next__)
    scheduler._pace._shortest = tokens_at_once
    assert run(scheduler, [scheduler.submit(one) for one in asked_for]) == [alone(model, one) for one in asked_for]
