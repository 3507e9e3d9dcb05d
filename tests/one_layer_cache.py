"""What tests of caches share: a cache of one layer, random tokens to feed it with, and what each row should get."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import strategies as st

from mlxqwen.cache import KVCache, make_cache
from mlxqwen.files.config import ModelConfig
from mlxqwen.model.attention import LayerCache
from mlxqwen.model.loading import load_model
from mlxqwen.model.qwen3 import Qwen3ForCausalLM
from mlxqwen.model.rope import Rope
from tests.reference_attention import Floats, attention
from tests.tiny_checkpoints import DENSE, make_weights, write_folder
from tests.tolerance import to_numpy

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
    output = to_numpy(attended(layer, padded, rope))
    return [output[place][:, :count] for place, count in enumerate(lengths)]


def attended(layer: LayerCache, new: Sequence[mx.array], rope: Rope, scale: float = SCALE) -> mx.array:
    """What new queries get, of these, keys and values, none of them rotated."""
    queries, keys, values = new
    return layer.attend(queries, layer.rotate(queries, rope), layer.rotate(keys, rope), values, rope, scale)


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


def logits_of(model: Qwen3ForCausalLM, tokens: list[int], chunks: Sequence[int], cache: KVCache) -> mx.array:
    """Logits `[T, vocab]` of a text that is fed in `chunks`, the last of which repeats."""
    outputs, start, sizes = [], 0, iter(chunks)
    size = chunks[-1]
    while start < len(tokens):
        size = next(sizes, size)
        outputs.append(model(mx.array([tokens[start : start + size]]), cache)[0])
        start += size
    return mx.concatenate(outputs)


def new_cache_for(
    model: Qwen3ForCausalLM, window: int | None, keep: int, kv_bits: int | None, batch_size: int = 1
) -> KVCache:
    return make_cache(model, max_kv_size=window, keep=keep, kv_bits=kv_bits, kv_group_size=32, batch_size=batch_size)


def new_cache_slot_bytes(kv_bits: int | None) -> int:
    """Keys and values of one token: numbers, or codes with a float32 scale and bias for 32 of them."""
    number_bytes = 4 if kv_bits is None else kv_bits / 8 + 2 * 4 / 32
    return int(2 * KV_HEADS * HEAD_DIM * number_bytes)


def joined(row: Row, more: Row) -> Row:
    first, second, third = (np.concatenate(parts, axis=1) for parts in zip(row, more, strict=True))
    return first, second, third
