"""Caches in files: saved ones go on alike, others and damaged ones are refused."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxqwen.cache import cache_identity, load_cache
from mlxqwen.errors import CacheError, CheckpointError, MlxqwenError
from mlxqwen.files.config import ModelConfig
from mlxqwen.model.qwen3 import Qwen3ForCausalLM
from tests.one_layer_cache import (
    CONFIG,
    HEAD_DIM,
    KV_BITS,
    ONE_LAYER,
    attend,
    bare_model,
    model,
    new_cache,
    placements,
    random_tokens,
)
from tests.tiny_checkpoints import MOE, make_weights, write_folder

__all__ = ["model"]  # a fixture


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
