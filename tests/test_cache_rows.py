"""Rows that leave a cache, texts that are cut short, and any order of all that is done to one."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxqwen.cache import load_cache
from mlxqwen.errors import CacheError, OptionError
from mlxqwen.model.qwen3 import Qwen3ForCausalLM
from tests.one_layer_cache import (
    ATTENTION_TOLERANCE,
    KV_BITS,
    attend,
    bare_model,
    expected,
    joined,
    logits_of,
    model,
    new_cache,
    new_cache_for,
    placements,
    random_tokens,
)
from tests.tiny_checkpoints import prompt
from tests.tolerance import assert_close, worst

__all__ = ["model"]  # a fixture


@pytest.mark.parametrize("kv_bits", KV_BITS)
@pytest.mark.parametrize("window", [None, 12])
def test_rows_that_stay_do_not_notice_those_that_leave(
    model: Qwen3ForCausalLM, window: int | None, kv_bits: int | None
) -> None:
    prompts = [prompt(length, 96) for length in (3, 20, 11)]
    together = new_cache_for(model, window, 4, kv_bits, batch_size=3)
    padded = mx.array([row + [0] * (20 - len(row)) for row in prompts])
    model(padded, together, lengths=[len(row) for row in prompts])
    together.keep_rows([2, 0])
    assert (together.offsets, together.batch_size) == ((11, 3), 2)
    texts = [prompt(6, 96), prompt(6, 95)]
    then = mx.array(texts)
    found = [model(then[:, :4], together), model(then[:, 4:5], together), model(then[:, 5:], together)]
    for place, row in enumerate((prompts[2], prompts[0])):
        alone = new_cache_for(model, window, 4, kv_bits)
        model(mx.array([row]), alone)
        expected_logits = logits_of(model, texts[place], [1], alone)
        allowed = {None: 2e-4, 8: 0.05, 4: 1.0}[kv_bits]
        assert worst(mx.concatenate(found, axis=1)[place], expected_logits) <= allowed


@pytest.mark.parametrize("rows", [[], [2], [-1], [0, 5], ["0"], [0.0], [True]])
def test_rows_that_are_not_there_are_refused(rows: list[Any]) -> None:
    with pytest.raises(CacheError, match="rows"):
        new_cache(batch_size=2).keep_rows(rows)


@pytest.mark.parametrize("kv_bits", [None, 8])
@pytest.mark.parametrize("window", [None, 30])
@pytest.mark.parametrize("length", [0, 1, 10, 25])
def test_after_trimming_the_text_goes_on_as_if_it_had_never_been_longer(
    model: Qwen3ForCausalLM, window: int | None, length: int, kv_bits: int | None
) -> None:
    cache, fresh = (new_cache_for(model, window, 4, kv_bits) for _ in range(2))
    tokens = prompt(25, 96)
    model(mx.array([tokens]), cache)
    cache.trim(length)
    assert cache.offset == length
    if length:
        model(mx.array([tokens[:length]]), fresh)
    then = prompt(40, 90)
    assert_close(logits_of(model, then, [9], cache), logits_of(model, then, [9], fresh), what="trimmed")


def test_a_ring_that_has_dropped_tokens_cannot_be_trimmed() -> None:
    cache = new_cache(max_kv_size=8, keep=2)
    attend(cache, [random_tokens(8, 0)], [(0, 8)], 8)
    cache.trim(7)
    attend(cache, [random_tokens(2, 0)], [(0, 2)], 2)
    cache.trim(9)  # nothing to forget
    for length in (8, 1):
        with pytest.raises(CacheError, match=f"cache of 9 tokens: cannot be trimmed to {length}"):
            cache.trim(length)
    assert cache.offset == 9


@pytest.mark.parametrize("kv_bits", [None, 8])
def test_a_ring_that_has_dropped_tokens_can_be_emptied(kv_bits: int | None) -> None:
    cache = new_cache(max_kv_size=8, keep=2, kv_bits=kv_bits)
    attend(cache, [random_tokens(30, 0)], [(0, 30)], 30)
    cache.trim(0)
    row = random_tokens(30, 1)
    found = [attend(cache, [row], [(start, start + 5)], 5)[0] for start in range(0, 30, 5)]
    assert worst(np.concatenate(found, axis=1), expected(row, 8, 2, kv_bits)) <= ATTENTION_TOLERANCE[kv_bits]


def test_only_held_tokens_can_be_trimmed_to() -> None:
    cache = new_cache()
    attend(cache, [random_tokens(5, 0)], [(0, 5)], 5)
    with pytest.raises(CacheError, match="cannot be trimmed"):
        cache.trim(6)


@pytest.mark.parametrize("length", [-1, "1", 1.5, True, None])
def test_what_is_no_number_of_tokens_is_refused(length: Any) -> None:
    cache = new_cache()
    attend(cache, [random_tokens(5, 0)], [(0, 5)], 5)
    for method in (cache.trim, cache.reserve):
        with pytest.raises(OptionError, match="length: found"):
            method(length)
    assert cache.offset == 5


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_whatever_is_done_to_a_cache_every_row_gets_what_it_would_get_alone(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Ragged steps, rows that leave or change places, trimming, saving and loading, in any order."""
    window, keep = data.draw(placements())
    kv_bits = data.draw(st.sampled_from(KV_BITS))
    batch_size = data.draw(st.integers(1, 3))
    cache = new_cache(max_kv_size=window, keep=keep, kv_bits=kv_bits, batch_size=batch_size)
    rows = [random_tokens(0, seed=0) for _ in range(batch_size)]
    for number in range(data.draw(st.integers(2, 9))):
        action = data.draw(st.sampled_from(["step", "step", "step", "keep_rows", "trim", "save"]))
        if action == "keep_rows":
            places = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=3))
            cache.keep_rows(places)
            rows = [rows[place] for place in places]
        elif action == "trim":
            length = data.draw(st.integers(0, min(cache.offsets)))
            dropped = window is not None and max(cache.offsets) > window
            if dropped and length and set(cache.offsets) != {length}:
                with pytest.raises(CacheError):
                    cache.trim(length)
                continue
            cache.trim(length)
            rows = [(q[:, :length], k[:, :length], v[:, :length]) for q, k, v in rows]
        elif action == "save":
            path = tmp_path_factory.mktemp("saved") / "cache.safetensors"
            cache.save(path)
            cache, _ = load_cache(path, bare_model())
        else:
            length = data.draw(st.integers(1, 6))
            counts = data.draw(st.lists(st.integers(0, length), min_size=len(rows), max_size=len(rows)))
            spans = [(offset, offset + count) for offset, count in zip(cache.offsets, counts, strict=True)]
            rows = [
                joined(row, random_tokens(count, seed=10 * number + place))
                for place, (row, count) in enumerate(zip(rows, counts, strict=True))
            ]
            outputs = attend(cache, rows, spans, length)
            for row, (start, stop), output in zip(rows, spans, outputs, strict=True):
                alone = expected(row, window, keep, kv_bits)[:, start:stop]
                assert worst(output, alone) <= ATTENTION_TOLERANCE[kv_bits]
        assert list(cache.offsets) == [row[0].shape[1] for row in rows]
