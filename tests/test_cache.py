from __future__ import annotations

import io
import json
import struct
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxqwen.cache import KVCache, cache_identity, load_cache, make_cache
from mlxqwen.cache import layer as cache_layer
from mlxqwen.cache.placement import Step
from mlxqwen.cache.storage import Stored
from mlxqwen.cache.tentative import TentativeStep
from mlxqwen.device import Device
from mlxqwen.errors import CacheError, CheckpointError, MlxqwenError, OptionError
from mlxqwen.files.config import ModelConfig
from mlxqwen.model.footprint import cache_bytes
from mlxqwen.model.loading import load_model
from mlxqwen.model.qwen3 import Qwen3ForCausalLM
from mlxqwen.model.rope import Rope
from tests.reference_attention import Floats, attention, rotated
from tests.tiny_checkpoints import DENSE, MOE, make_weights, prompt, write_folder
from tests.tolerance import assert_close, to_numpy, worst

THETA = 10_000.0
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 32
SCALE = HEAD_DIM**-0.5
CONFIG = {**DENSE, "head_dim": HEAD_DIM, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS}
ONE_LAYER = ModelConfig.from_dict({**CONFIG, "num_hidden_layers": 1})
KV_BITS = [None, 8, 4]

Row = tuple[Floats, Floats, Floats]  # queries, keys and values of one text


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Qwen3ForCausalLM:
    return load_model(write_folder(tmp_path_factory.mktemp("dense"), CONFIG, make_weights(CONFIG)), dtype="float32")


@cache
def bare_model() -> Qwen3ForCausalLM:
    """A model of one layer whose weights do not matter."""
    return Qwen3ForCausalLM(ONE_LAYER)


def new_cache(**arguments: Any) -> KVCache:
    return make_cache(bare_model(), **({"kv_group_size": 32} | arguments))


def random_tokens(count: int, seed: int) -> Row:
    """Queries, keys and values of one row, rounded to float32."""
    random = np.random.default_rng(seed)

    def numbers(heads: int) -> Floats:
        return random.standard_normal((heads, count, HEAD_DIM)).astype(np.float32).astype(np.float64)

    return numbers(HEADS), numbers(KV_HEADS), numbers(KV_HEADS)


def attend(cache: KVCache, rows: Sequence[Row], spans: Sequence[tuple[int, int]], length: int) -> list[Floats]:
    """One step of the cache's only layer: tokens `spans[b]` of each row, padded to `length` → what each row gets."""
    rope = Rope(HEAD_DIM, THETA)
    lengths = [stop - start for start, stop in spans]
    padded = [
        mx.array(
            np.stack(
                [
                    np.pad(row[part][:, start:stop], ((0, 0), (0, length - (stop - start)), (0, 0)), constant_values=7)
                    for row, (start, stop) in zip(rows, spans, strict=True)
                ]
            ).astype(np.float32)
        )
        for part in range(3)
    ]
    ragged = None if lengths == [length] * len(rows) else lengths
    (layer,) = cache.begin(len(rows), length, ragged)
    output = to_numpy(layer.attend(*padded, rope=rope, scale=SCALE))
    return [output[place][:, :count] for place, count in enumerate(lengths)]


def stored_as(kv_bits: int | None, dtype: mx.Dtype = mx.float32) -> Callable[[Floats], Floats]:
    """What a cache of `kv_bits` does to the numbers it stores."""

    def round_trip(array: Floats) -> Floats:
        if kv_bits is None or not array.size:
            return array
        parts = mx.quantize(mx.array(array.astype(np.float32)).astype(dtype), group_size=32, bits=kv_bits)
        return to_numpy(mx.dequantize(*parts, group_size=32, bits=kv_bits))

    return round_trip


def expected(row: Row, window: int | None, keep: int, kv_bits: int | None, dtype: mx.Dtype = mx.float32) -> Floats:
    return attention(*row, theta=THETA, scale=SCALE, window=window, keep=keep, stored=stored_as(kv_bits, dtype))


# A rotated key that falls between two codes may be rounded to either: the tolerance is one code of one number.
ATTENTION_TOLERANCE = {None: 2e-5, 8: 4e-3, 4: 6e-2}


@st.composite
def placements(draw: st.DrawFn) -> tuple[int | None, int]:
    """A window, or none, and its sinks; the narrowest windows hold one token beside the sinks."""
    if draw(st.booleans()) and draw(st.booleans()):
        return None, 0
    keep = draw(st.integers(0, 4))
    return keep + draw(st.integers(1, 7)), keep


# The rule of attention


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_chunking_is_the_rule_of_attention(data: st.DataObject) -> None:
    """Whether a chunk's queries look all at once or a few at a time."""
    window, keep = data.draw(placements())
    kv_bits = data.draw(st.sampled_from(KV_BITS))
    chunks = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=6))
    row = random_tokens(sum(chunks), seed=len(chunks))
    cache = new_cache(max_kv_size=window, keep=keep, kv_bits=kv_bits)
    outputs, start = [], 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache_layer, "_MOST_SCORES", 0)
        patch.setattr(cache_layer, "_SMALLEST_BLOCK", data.draw(st.integers(1, 9)))
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
    cache = new_cache(max_kv_size=window, keep=keep, kv_bits=kv_bits, batch_size=batch_size)
    outputs: list[list[Floats]] = [[] for _ in rows]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache_layer, "_MOST_SCORES", 0)
        patch.setattr(cache_layer, "_SMALLEST_BLOCK", data.draw(st.integers(1, 6)))
        for length, lengths in steps:
            spans = [(offset, offset + count) for offset, count in zip(cache.offsets, lengths, strict=True)]
            for place, part in enumerate(attend(cache, rows, spans, length)):
                outputs[place].append(part)
    assert list(cache.offsets) == totals
    for row, total, output in zip(rows, totals, outputs, strict=True):
        queries, keys, values = (part[:, :total] for part in row)
        alone = expected((queries, keys, values), window, keep, kv_bits) if total else queries
        assert worst(np.concatenate(output, axis=1), alone) <= ATTENTION_TOLERANCE[kv_bits]


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
    weights = to_numpy(layer.attend(*last, rope=Rope(HEAD_DIM, THETA), scale=SCALE))[0, :, 0]
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
        outputs.append(layer.attend(*new, rope=Rope(HEAD_DIM, THETA), scale=SCALE))
        start += length
    found = mx.concatenate(outputs, axis=2)[0]
    assert {array.dtype for array in (found, *cache.state)} == {dtype, *([mx.uint32] if kv_bits else [])}
    queries, keys, values = (to_numpy(part[0]) for part in parts)
    assert_close(found, expected((queries, keys, values), window, keep, kv_bits, dtype), dtype)


# The whole model


def logits_of(model: Qwen3ForCausalLM, tokens: list[int], chunks: Sequence[int], cache: KVCache) -> mx.array:
    """Logits `[T, vocab]` of a text that is fed in `chunks`, the last of which repeats."""
    outputs, start, sizes = [], 0, iter(chunks)
    size = chunks[-1]
    while start < len(tokens):
        size = next(sizes, size)
        outputs.append(model(mx.array([tokens[start : start + size]]), cache)[0])
        start += size
    return mx.concatenate(outputs)


@pytest.mark.parametrize(
    ("experts", "dtype"), [(False, "float32"), (False, "float16"), (False, "bfloat16"), (True, "float32")]
)
def test_a_cache_changes_nothing(tmp_path: Path, experts: bool, dtype: str) -> None:
    """No cache, a linear one, a window as wide as the text: the same logits, whatever the chunks."""
    config = {**(MOE if experts else CONFIG), "head_dim": HEAD_DIM}
    model = load_model(write_folder(tmp_path, config, make_weights(config)), dtype=dtype)
    tokens = prompt(40, 96)
    whole = model(mx.array([tokens]))[0]
    assert whole.dtype == model.dtype == getattr(mx, dtype)
    for arguments in ({}, {"max_kv_size": 40, "keep": 3}, {"max_kv_size": 400, "keep": 0}):
        for chunks in ([40], [1], [7, 13], [39, 1]):
            found = logits_of(model, tokens, chunks, make_cache(model, **arguments))
            assert_close(found, whole, model.dtype, f"{arguments} {chunks}")


@pytest.mark.parametrize("kv_bits", KV_BITS)
@pytest.mark.parametrize(("window", "keep"), [(None, 4), (12, 4), (9, 0), (5, 4)])
def test_chunks_are_token_by_token(model: Qwen3ForCausalLM, kv_bits: int | None, window: int | None, keep: int) -> None:
    tokens = prompt(70, 96)
    alone = logits_of(model, tokens, [1], new_cache_for(model, window, keep, kv_bits))
    for chunks in ([70], [16], [3, 30, 1]):
        found = logits_of(model, tokens, chunks, new_cache_for(model, window, keep, kv_bits))
        # Sums in another order can tip a number over to the next of 2 ** bits codes.
        allowed = {None: 2e-4, 8: 0.05, 4: 1.0}[kv_bits]
        assert worst(found, alone) <= allowed
        assert np.median(np.abs(to_numpy(found) - to_numpy(alone))) <= 0.1 * allowed


def new_cache_for(
    model: Qwen3ForCausalLM, window: int | None, keep: int, kv_bits: int | None, batch_size: int = 1
) -> KVCache:
    return make_cache(model, max_kv_size=window, keep=keep, kv_bits=kv_bits, kv_group_size=32, batch_size=batch_size)


def test_eight_bits_stay_near_the_plain_cache(model: Qwen3ForCausalLM) -> None:
    tokens = prompt(70, 96)
    plain = logits_of(model, tokens, [16], make_cache(model))
    errors = [
        float(
            np.abs(
                to_numpy(logits_of(model, tokens, [16], new_cache_for(model, None, 4, bits))) - to_numpy(plain)
            ).mean()
        )
        for bits in (8, 4)
    ]
    assert errors[0] < 0.03
    assert errors[0] < errors[1] < 0.4


# Memory


@settings(max_examples=40, deadline=None)
@given(
    window=st.integers(5, 40),
    chunks=st.lists(st.integers(1, 60), min_size=1, max_size=5),
    keep=st.integers(0, 4),
    kv_bits=st.sampled_from(KV_BITS),
)
def test_a_ring_holds_its_window_and_shows_a_chunk_more(
    window: int, chunks: list[int], keep: int, kv_bits: int | None
) -> None:
    """In bytes of what the queries look at, keys and values together."""
    slot = new_cache_slot_bytes(kv_bits)
    cache = new_cache(max_kv_size=window, keep=keep, kv_bits=kv_bits)
    shown: list[int] = []
    store = cache_layer._store

    def recorded(stored: Stored, new: Stored, plan: Step) -> tuple[Stored, Stored]:
        held, seen = store(stored, new, plan)
        shown.extend(part.nbytes for part in seen)
        return held, seen

    start = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache_layer, "_store", recorded)
        for length in [*chunks, 1, 1, 1]:
            shown.clear()
            attend(cache, [random_tokens(length, seed=length)], [(0, length)], length)
            held_before = min(start, window)
            start += length
            assert cache.nbytes <= window * slot
            assert min(start, length) * slot <= sum(shown) <= (window if length == 1 else held_before + length) * slot
    assert cache.offset == start


def new_cache_slot_bytes(kv_bits: int | None) -> int:
    """Keys and values of one token: numbers, or codes with a float32 scale and bias for 32 of them."""
    number_bytes = 4 if kv_bits is None else kv_bits / 8 + 2 * 4 / 32
    return int(2 * KV_HEADS * HEAD_DIM * number_bytes)


@pytest.mark.parametrize("kv_bits", KV_BITS)
@pytest.mark.parametrize("keep", [0, 4])
def test_a_full_window_decodes_at_constant_cost(model: Qwen3ForCausalLM, keep: int, kv_bits: int | None) -> None:
    cache = new_cache_for(model, 16, keep, kv_bits)
    sizes, graphs = set(), set()
    for token in prompt(16, 96):
        mx.eval(model(mx.array([[token]]), cache))
    for token in prompt(50, 96):
        logits = model(mx.array([[token]]), cache)
        graphs.add(graph_size(logits, *cache.state))
        mx.eval(logits, cache.state)
        sizes.add(cache.nbytes)
    assert len(sizes) == len(graphs) == 1 < min(graphs)
    assert sizes == {len(cache) * 16 * new_cache_slot_bytes(kv_bits)}


def graph_size(*arrays: mx.array) -> int:
    """How many operations are waiting to compute `arrays`."""
    dot = io.StringIO()
    mx.export_to_dot(dot, *arrays)
    return dot.getvalue().count("shape=rectangle")


def test_growing_follows_the_text_in_steps_or_as_reserved(model: Qwen3ForCausalLM) -> None:
    slot = len(make_cache(model)) * new_cache_slot_bytes(None)
    grown, reserved = make_cache(model), make_cache(model)
    reserved.reserve(300)
    for one, expected_slots in ((grown, 256), (reserved, 512)):
        model(mx.array([prompt(20, 96)]), one)
        assert one.nbytes == expected_slots * slot
    model(mx.array([prompt(240, 96)]), grown)
    assert grown.nbytes == 512 * slot


# Rows that leave, texts that are cut short


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


def joined(row: Row, more: Row) -> Row:
    first, second, third = (np.concatenate(parts, axis=1) for parts in zip(row, more, strict=True))
    return first, second, third


# Files


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_a_saved_cache_goes_on_alike(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    window, keep = data.draw(placements())
    kv_bits = data.draw(st.sampled_from(KV_BITS))
    lengths = data.draw(st.lists(st.integers(0, 20), min_size=1, max_size=3))
    path = tmp_path_factory.mktemp("saved") / "chat.safetensors"
    cache = new_cache(max_kv_size=window, keep=keep, kv_bits=kv_bits, batch_size=len(lengths))
    rows = [random_tokens(26, seed) for seed in range(len(lengths))]
    if max(lengths):
        attend(cache, rows, [(0, length) for length in lengths], max(lengths))
    cache.save(path, {"title": "Grüße"})
    restored, metadata = load_cache(path, bare_model())
    assert metadata == {"title": "Grüße"}
    assert restored.offsets == cache.offsets == tuple(lengths)
    assert (restored.max_kv_size, restored.keep, restored.kv_bits) == (cache.max_kv_size, cache.keep, kv_bits)
    for step in (4, 1, 1):
        spans = [(offset, offset + step) for offset in cache.offsets]
        for kept, read in zip(attend(cache, rows, spans, step), attend(restored, rows, spans, step), strict=True):
            assert np.array_equal(kept, read)


def test_a_cache_trimmed_to_nothing_can_be_saved(tmp_path: Path) -> None:
    cache = new_cache()
    attend(cache, [random_tokens(5, 0)], [(0, 5)], 5)
    cache.trim(0)
    cache.save(tmp_path / "empty.safetensors")
    assert load_cache(tmp_path / "empty.safetensors", bare_model())[0].offset == 0


def saved(folder: Path, **arguments: Any) -> Path:
    cache = new_cache(**arguments)
    attend(cache, [random_tokens(9, 0)] * cache.batch_size, [(0, 9)] * cache.batch_size, 9)
    cache.save(folder / "cache.safetensors")
    return folder / "cache.safetensors"


@pytest.mark.parametrize(
    "change",
    [
        {"num_hidden_layers": 2},
        {"num_key_value_heads": 1},
        {"head_dim": 64},
        {"hidden_size": 64},
        {"rope_theta": 20_000.0},
        {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
        {"rms_norm_eps": 1e-5},
        {"intermediate_size": 64},
        {**MOE, "head_dim": HEAD_DIM},
    ],
)
def test_a_cache_of_another_shape_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    other = Qwen3ForCausalLM(ModelConfig.from_dict({**CONFIG, "num_hidden_layers": 1, **change}))
    with pytest.raises(CacheError, match="made with a model of another shape"):
        load_cache(saved(tmp_path), other)
    assert not new_cache().fits(other.config)
    assert cache_identity(other.config) != cache_identity(ONE_LAYER)


@pytest.mark.parametrize(
    "change", [{"quantization": {"bits": 8, "group_size": 64}}, {"eos_token_id": 7}, {"max_position_embeddings": 1024}]
)
def test_what_does_not_change_the_shape_does_not_matter(tmp_path: Path, change: dict[str, Any]) -> None:
    other = Qwen3ForCausalLM(ModelConfig.from_dict({**CONFIG, "num_hidden_layers": 1, **change}))
    assert new_cache().fits(other.config)
    assert load_cache(saved(tmp_path), other)[0].offset == 9


def test_a_cache_of_another_dtype_is_refused(tmp_path: Path) -> None:
    model = Qwen3ForCausalLM(ONE_LAYER)
    model.set_dtype(mx.float16)
    with pytest.raises(CacheError, match=r"float32, expected mlx\.core\.float16 as this model computes"):
        load_cache(saved(tmp_path), model)


def header_and_data(path: Path) -> tuple[dict[str, Any], bytes]:
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


NUMBERS = st.one_of(st.integers(-3, 200), st.integers()).map(str)


@settings(max_examples=50, deadline=None)
@given(
    key=st.sampled_from(["format", "offsets", "max_kv_size", "keep", "kv_bits", "kv_group_size", "model"]),
    value=st.one_of(NUMBERS, st.lists(NUMBERS, max_size=3).map(",".join), st.text(max_size=8), st.none()),
    ring=st.booleans(),
)
def test_tampered_metadata_is_refused_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, key: str, value: str | None, ring: bool
) -> None:
    path = saved(tmp_path_factory.mktemp("tampered"), **({"max_kv_size": 6, "kv_bits": 8} if ring else {}))
    header, data = header_and_data(path)
    header["__metadata__"][key] = value
    if value is None:
        del header["__metadata__"][key]
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    try:
        cache, _ = load_cache(path, bare_model())
    except CacheError:
        return
    attend(cache, [random_tokens(3, 0)] * cache.batch_size, [(0, 3)] * cache.batch_size, 3)


def test_damaged_and_foreign_files_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path)
    content = path.read_bytes()
    for damaged in (content[:-1], content[:100], b"", b"GGUF" + bytes(100)):
        path.write_bytes(damaged)
        with pytest.raises(MlxqwenError) as caught:
            load_cache(path, bare_model())
        assert str(path) in str(caught.value)
    path = write_folder(tmp_path / "model", CONFIG, make_weights(CONFIG)) / "model.safetensors"
    with pytest.raises(CacheError, match="not a cache"):
        load_cache(path, bare_model())
    with pytest.raises(CheckpointError, match="no such file"):
        load_cache(tmp_path / "nothing.safetensors", bare_model())


# Arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_kv_size": 0}, "max_kv_size: found 0"),
        ({"max_kv_size": -5}, "max_kv_size: found -5"),
        ({"max_kv_size": True}, "max_kv_size: found True"),
        ({"max_kv_size": 8.0}, "max_kv_size: found 8.0"),
        ({"max_kv_size": "8"}, "max_kv_size: found '8'"),
        ({"max_kv_size": 1 << 31}, "max_kv_size: found 2147483648"),
        ({"max_kv_size": 4}, "max_kv_size: found 4, expected more than the 4"),
        ({"max_kv_size": 8, "keep": -1}, "keep: found -1"),
        ({"max_kv_size": 8, "keep": 2.0}, "keep: found 2.0"),
        ({"keep": False}, "keep: found False"),
        ({"kv_bits": 3}, "kv_bits: found 3"),
        ({"kv_bits": 8.0}, "kv_bits: found 8.0"),
        ({"kv_bits": [8]}, r"kv_bits: found \[8\]"),
        ({"kv_bits": 8, "kv_group_size": 128}, "kv_group_size: found 128, expected a divisor of head_dim, 32"),
        ({"kv_bits": 8, "kv_group_size": 32.0}, "kv_group_size: found 32.0"),
        ({"kv_group_size": "x"}, "kv_group_size: found 'x'"),
        ({"batch_size": 0}, "batch_size: found 0"),
        ({"batch_size": -1}, "batch_size: found -1"),
        ({"batch_size": 10**12}, "batch_size: found 1000000000000"),
        ({"batch_size": True}, "batch_size: found True"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        new_cache(**arguments)


@pytest.mark.parametrize(("head_dim", "group_size"), [(32, 32), (96, 32), (64, 64), (128, 64)])
def test_the_default_group_fits_the_heads(head_dim: int, group_size: int) -> None:
    model = Qwen3ForCausalLM(ModelConfig.from_dict({**CONFIG, "head_dim": head_dim, "num_hidden_layers": 1}))
    model.set_dtype(mx.float32)
    cache = make_cache(model, kv_bits=8)
    assert cache.kv_group_size == group_size
    cache.reserve(256)
    mx.eval(model(mx.array([[1, 2]]), cache))
    assert cache.nbytes == cache_bytes(model.config, 256, 4, 8)


def test_heads_that_no_group_divides_cannot_be_quantized() -> None:
    narrow = Qwen3ForCausalLM(ModelConfig.from_dict({**CONFIG, "head_dim": 48, "num_hidden_layers": 1}))
    with pytest.raises(OptionError, match=r"found 64, expected a divisor of head_dim, 48\nLeave kv_bits out"):
        make_cache(narrow, kv_bits=8)


def test_a_step_of_other_rows_is_refused(model: Qwen3ForCausalLM) -> None:
    cache = make_cache(model, batch_size=2)
    with pytest.raises(CacheError, match="made for 2 rows, used with 1"):
        model(mx.array([[1]]), cache)
    wrong: list[Any] = [[1], [1, 3], [-1, 1], [1, 1, 1], [1, 1.5], [1, "1"], [True, 1]]
    for lengths in wrong:
        with pytest.raises(CacheError, match="lengths"):
            model(mx.array([[1, 2], [3, 4]]), cache, lengths=lengths)
    assert cache.offsets == (0, 0)


# Memory, in counts of bytes


def peak_of(step: Callable[[], object]) -> int:
    """The most bytes that MLX holds during a step beyond what it held before."""
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    step()
    return mx.get_peak_memory() - before


def decoded(cache: KVCache, tokens: int = 1) -> None:
    """So many tokens of each row through the cache's only layer, one at a time."""
    for _ in range(tokens):
        (layer,) = cache.begin(cache.batch_size, 1)
        new = [mx.ones((cache.batch_size, heads, 1, HEAD_DIM)) for heads in (HEADS, KV_HEADS, KV_HEADS)]
        mx.eval(layer.attend(*new, rope=Rope(HEAD_DIM, THETA), scale=SCALE), cache.state)


@pytest.mark.parametrize("offsets", [[4000], [4000, 4000], [4000, 3000, 5]])
@pytest.mark.parametrize("window", [None, 2048])
def test_a_decoded_token_copies_no_cache(offsets: list[int], window: int | None) -> None:
    """Rows of one length or of several, in a line or a full ring: there are scores and little else."""
    cache = new_cache(max_kv_size=window, batch_size=len(offsets))
    cache.reserve(4096)
    decoded(cache)
    cache.placement.offsets = list(offsets)
    decoded(cache)
    assert peak_of(lambda: decoded(cache)) < cache.nbytes // 6


def test_a_growing_cache_is_never_there_twice(tiny: Qwen3ForCausalLM) -> None:
    """Each layer's buffers are copied apart, and once in 256 tokens."""
    cache = make_cache(tiny, batch_size=16)
    tokens = mx.ones((16, 1), dtype=mx.int32)
    tiny(mx.ones((16, 256), dtype=mx.int32), cache)
    mx.eval(cache.state)
    before, sizes = cache.nbytes, set()

    def grow() -> None:
        tiny.model(tokens, cache)
        sizes.add(cache.nbytes)

    peak = peak_of(grow)
    assert sizes == {2 * before}
    assert peak <= before + before // len(cache) + before // 8
    for _ in range(255):
        grow()
    assert sizes == {2 * before}
    assert mx.get_cache_memory() < before


@pytest.mark.parametrize(("window", "guesses"), [(None, 10), (400, 155)])
def test_a_tentative_step_grows_a_cache_a_layer_at_a_time(window: int | None, guesses: int) -> None:
    """A line where guesses are read, a ring where those that fill its window stay."""
    model = Qwen3ForCausalLM(ModelConfig.from_dict({**DENSE, "num_hidden_layers": 8}))
    mx.eval(model.parameters())
    cache = make_cache(model, batch_size=4, max_kv_size=window)
    mx.eval(model.model(mx.ones((4, 250), dtype=mx.int32), cache), cache.state)
    before, step = cache.nbytes, TentativeStep(cache)

    def read() -> None:
        mx.eval(model.model(mx.ones((4, guesses), dtype=mx.int32), step))

    def settle() -> None:
        step.settle(guesses)
        mx.eval(cache.state)

    if window is None:
        peak = peak_of(read)
    else:
        read()
        peak = peak_of(settle)
    assert cache.nbytes == before * (window or 512) // 256
    assert peak <= cache.nbytes - before + before // 4  # two of eight layers


@pytest.mark.parametrize(
    ("arguments", "on_gpu"),
    [
        ({}, False),  # one kernel on a GPU
        *((arguments, on_gpu) for arguments in ({"kv_bits": 8}, {"max_kv_size": 1024}) for on_gpu in (False, True)),
    ],
    ids=str,
)
def test_the_scores_of_a_chunk_are_never_all_there(
    arguments: dict[str, Any], on_gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = Device("a machine", is_gpu=on_gpu, memory=1 << 34, usable_memory=1 << 34)
    monkeypatch.setattr(cache_layer, "current_device", lambda: device)
    cache = new_cache(**arguments)
    rope, length = Rope(HEAD_DIM, THETA), 512
    chunk = [mx.ones((1, heads, length, HEAD_DIM)) for heads in (HEADS, KV_HEADS, KV_HEADS)]

    def step() -> None:
        (layer,) = cache.begin(1, length)
        mx.eval(layer.attend(*chunk, rope=rope, scale=SCALE), cache.state)

    cache.reserve(2048)
    step()
    cache.placement.offsets = [1536]
    scores = 4 * HEADS * length * (1536 if cache.max_kv_size else 2048)
    bounds = ("_MOST_SCORES", "_MOST_SCORES_ON_GPU") if on_gpu else ("_MOST_SCORES_ON_GPU", "_MOST_SCORES")
    for name, share in zip(bounds, (1, 16), strict=True):  # the other device's would be all of them
        monkeypatch.setattr(cache_layer, name, scores // 4 // share)
    assert peak_of(step) < scores
