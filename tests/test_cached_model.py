"""A whole model with a cache gives the logits that it gives without one, whatever the chunks."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlxqwen.cache import make_cache
from mlxqwen.model.loading import load_model
from mlxqwen.model.qwen3 import Qwen3ForCausalLM
from tests.one_layer_cache import CONFIG, HEAD_DIM, KV_BITS, logits_of, model, new_cache_for
from tests.tiny_checkpoints import MOE, make_weights, prompt, write_folder
from tests.tolerance import assert_close, to_numpy, worst

__all__ = ["model"]  # a fixture


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
