"""Options of caches out of range, and steps that do not fit one."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest

from mlxqwen.cache import make_cache
from mlxqwen.errors import CacheError, OptionError
from mlxqwen.files.config import ModelConfig
from mlxqwen.model.footprint import cache_bytes
from mlxqwen.model.qwen3 import Qwen3ForCausalLM
from tests.one_layer_cache import CONFIG, model, new_cache

__all__ = ["model"]  # a fixture


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
