"""Caches against the rule of attention in float64: any chunks, ragged rows, windows, sinks, narrow dtypes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxqwen.cache import KVCache, by_head
from mlxqwen.cache import layer as cache_layer
from mlxqwen.device import current_device
from mlxqwen.model import cores as model_cores
from mlxqwen.model.rope import Rope
from tests.one_layer_cache import (
    ATTENTION_TOLERANCE,
    HEAD_DIM,
    HEADS,
    KV_BITS,
    KV_HEADS,
    SCALE,
    THETA,
    Row,
    attend,
    attended,
    expected,
    new_cache,
    placements,
    random_tokens,
)
from tests.reference_attention import Floats, rotated
from tests.tolerance import assert_close, own_products, to_numpy, worst


def look_in_parts(patch: pytest.MonkeyPatch, data: st.DataObject) -> None:
    """Few queries at a time; on some machines some heads at a time, on up to three cores."""
    smallest, cores = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 3))
    for module in (cache_layer, by_head):
        patch.setattr(module, "_MOST_SCORES", data.draw(st.sampled_from([0, 60])))
        patch.setattr(module, "_SMALLEST_BLOCK", smallest)
    patch.setattr(model_cores, "_LEAST", 1)
    patch.setattr(cache_layer, "_MUCH", data.draw(st.sampled_from([0, 1 << 30])))
    device = replace(current_device(), is_gpu=False, has_openblas=data.draw(st.booleans()), cores=cores)
    patch.setattr(cache_layer, "current_device", lambda: device)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_chunking_is_the_rule_of_attention(data: st.DataObject) -> None:
    """Whether a chunk's queries look all at once or a few at a time, and by head on several cores."""
    window, keep = data.draw(placements())
    kv_bits = data.draw(st.sampled_from(KV_BITS))
    chunks = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=6))
    row = random_tokens(sum(chunks), seed=len(chunks))
    outputs, start = [], 0
    with pytest.MonkeyPatch.context() as patch:
        look_in_parts(patch, data)
        cache = new_cache(max_kv_size=window, keep=keep, kv_bits=kv_bits)
        for length in chunks:
            outputs += attend(cache, [row], [(start, start + length)], length)
            start += length
    found = np.concatenate(outputs, axis=1)
    assert worst(found, expected(row, window, keep, kv_bits)) <= ATTENTION_TOLERANCE[kv_bits]
    assert cache.offset == start


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_ragged_rows_get_what_each_gets_alone(data: st.DataObject) -> None:
    window, keep = data.draw(placements())
    kv_bits = data.draw(st.sampled_from(KV_BITS))
    batch_size = data.draw(st.integers(1, 3))
    steps = data.draw(
        st.lists(
            st.integers(1, 6).flatmap(
                lambda length: st.tuples(
                    st.just(length), st.lists(st.integers(0, length), min_size=batch_size, max_size=batch_size)
                )
            ),
            min_size=1,
            max_size=8,
        )
    )
    totals = [sum(lengths[row] for _, lengths in steps) for row in range(batch_size)]
    rows = [random_tokens(max(total, 1), seed=total) for total in totals]
    outputs: list[list[Floats]] = [[] for _ in rows]
    with pytest.MonkeyPatch.context() as patch:
        look_in_parts(patch, data)
        cache = new_cache(max_kv_size=window, keep=keep, kv_bits=kv_bits, batch_size=batch_size)
        for length, lengths in steps:
            spans = [(offset, offset + count) for offset, count in zip(cache.offsets, lengths, strict=True)]
            for place, part in enumerate(attend(cache, rows, spans, length)):
                outputs[place].append(part)
    assert list(cache.offsets) == totals
    for row, total, output in zip(rows, totals, outputs, strict=True):
        queries, keys, values = (part[:, :total] for part in row)
        alone = expected((queries, keys, values), window, keep, kv_bits) if total else queries
        assert worst(np.concatenate(output, axis=1), alone) <= ATTENTION_TOLERANCE[kv_bits]


@own_products
@pytest.mark.parametrize("max_kv_size", [None, 12])
def test_attention_by_head_gives_the_same_bits_with_the_products_of_mlx(
    max_kv_size: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts of unequal length, then tokens one by one, on three cores and on one."""
    rows = [random_tokens(30, seed) for seed in (1, 2)]
    steps = [(9, (9, 5)), (6, (6, 6)), *[(1, (1, 1))] * 8]
    by_heads: list[int] = []
    attend_by_head = by_head.attend_by_head

    def recorded(queries: mx.array, *others: Any) -> mx.array:
        by_heads.append(queries.shape[2])
        return attend_by_head(queries, *others)

    monkeypatch.setattr(cache_layer, "attend_by_head", recorded)
    monkeypatch.setattr(model_cores, "_LEAST", 1)
    monkeypatch.setattr(cache_layer, "_MUCH", 0)
    found = []
    for cores in (1, 3):
        device = replace(current_device(), is_gpu=False, has_openblas=False, cores=cores)
        monkeypatch.setattr(cache_layer, "current_device", lambda device=device: device)
        cache, outputs = new_cache(max_kv_size=max_kv_size, keep=0, batch_size=2), []
        for length, lengths in steps:
            spans = [(offset, offset + count) for offset, count in zip(cache.offsets, lengths, strict=True)]
            outputs += attend(cache, rows, spans, length)
        found.append(outputs)
        assert by_heads == ([] if cores == 1 else [length for length, _ in steps])
    for one, other in zip(*found, strict=True):
        assert np.array_equal(one, other)


def test_a_query_sees_the_window_and_the_sinks_and_nothing_else() -> None:
    """By hand: all scores are equal, and token `j` has the value `2 ** j`."""
    cache = new_cache(max_kv_size=4, keep=1)
    values = np.broadcast_to(2.0 ** np.arange(8)[None, :, None], (KV_HEADS, 8, HEAD_DIM))
    row = (np.zeros((HEADS, 8, HEAD_DIM)), np.zeros((KV_HEADS, 8, HEAD_DIM)), values)
    (first,), (second,) = attend(cache, [row], [(0, 5)], 5), attend(cache, [row], [(5, 8)], 3)
    means = np.concatenate([first, second], axis=1)[0, :, 0]
    seen = [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 2, 3, 4], [0, 3, 4, 5], [0, 4, 5, 6], [0, 5, 6, 7]]
    assert means == pytest.approx([sum(2**j for j in tokens) / len(tokens) for tokens in seen])


def sink_logits(cache: KVCache, row: Row, at: int, keep: int, chunk: int, *, rotate: bool = True) -> Floats:
    """How much the query at `at` prefers each sink to itself: `[HEADS, keep]` differences of attention logits.

    Read from the weights, by values that are unit vectors for sinks and query, and zero for all else.
    """
    queries, keys, values = row[0], row[1], np.zeros_like(row[2])
    values[:, range(keep), range(keep)] = 1
    values[:, at, keep] = 1
    for start in range(0, at, chunk):
        attend(cache, [(queries, keys, values)], [(start, min(start + chunk, at))], min(chunk, at - start))
    (layer,) = cache.begin(1, 1)
    if not rotate:
        layer.plan.sink_positions = None
    last = [mx.array(part[None, :, at : at + 1].astype(np.float32)) for part in (queries, keys, values)]
    weights = to_numpy(attended(layer, last, Rope(HEAD_DIM, THETA)))[0, :, 0]
    return np.log(weights[:, :keep] / weights[:, keep : keep + 1])


@pytest.mark.parametrize("kv_bits", [None, 8])
@pytest.mark.parametrize("chunk", [1, 7])
def test_far_into_a_stream_sinks_are_seen_as_from_the_windows_end(chunk: int, kv_bits: int | None) -> None:
    window, keep = 16, 3
    near, far = window + 5, 20 * window
    row = random_tokens(far + 1, seed=3)
    for part in row:
        part[:, near] = part[:, far]
    logits, drifting = (
        [
            sink_logits(new_cache(max_kv_size=window, keep=keep, kv_bits=kv_bits), row, at, keep, chunk, rotate=rotate)
            for at in (near, far)
        ]
        for rotate in (True, False)
    )
    query, keys = row[0][:, far], row[1]
    by_hand = [
        [
            SCALE * rotated(query[head], window - 1, THETA) @ rotated(keys[head // 2, sink], sink, THETA)
            - SCALE * query[head] @ keys[head // 2, far]
            for sink in range(keep)
        ]
        for head in range(HEADS)
    ]
    assert worst(logits[0], by_hand) <= (1e-4 if kv_bits is None else 0.1)
    # An eight-bit key of the query's own position is rounded another way at another angle.
    assert worst(logits[1], logits[0]) <= (1e-4 if kv_bits is None else 0.1)
    assert worst(drifting[1], drifting[0]) >= 0.5


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
@pytest.mark.parametrize("kv_bits", KV_BITS)
@pytest.mark.parametrize(("window", "keep"), [(None, 0), (9, 0), (12, 4)])
def test_narrow_dtypes_stay_narrow_and_near(
    window: int | None, keep: int, kv_bits: int | None, dtype: mx.Dtype
) -> None:
    parts = [mx.array(part[None]).astype(dtype) for part in random_tokens(45, seed=5)]
    cache = new_cache(max_kv_size=window, keep=keep, kv_bits=kv_bits)
    outputs, start = [], 0
    for length in (20, 8, 15, 1, 1):
        (layer,) = cache.begin(1, length)
        new = [part[:, :, start : start + length] for part in parts]
        outputs.append(attended(layer, new, Rope(HEAD_DIM, THETA)))
        start += length
    found = mx.concatenate(outputs, axis=2)[0]
    assert {array.dtype for array in (found, *cache.state)} == {dtype, *([mx.uint32] if kv_bits else [])}
    queries, keys, values = (to_numpy(part[0]) for part in parts)
    assert_close(found, expected((queries, keys, values), window, keep, kv_bits, dtype), dtype)
