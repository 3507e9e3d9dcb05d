from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlxqwen.cache import make_cache
from mlxqwen.engine.token_stream import generate_tokens
from mlxqwen.errors import CacheError, OptionError
from mlxqwen.files.config import ModelConfig
from mlxqwen.model.footprint import measure
from mlxqwen.model.loading import load_model
from mlxqwen.model.qwen3 import Qwen3ForCausalLM
from mlxqwen.sampling.sampler import SamplingParams
from tests.sparse_checkpoints import RELEASES
from tests.tiny_checkpoints import (
    DENSE,
    GOLDEN_MODELS,
    GREEDY_TOKENS,
    MOE,
    golden_positions,
    make_weights,
    prompt,
    published_shapes,
    rounded,
    routes,
    write_folder,
)
from tests.tolerance import assert_close, to_numpy

GOLDEN = json.loads((Path(__file__).parent / "golden" / "models.json").read_text())

# Held to transformers: `scripts/make_golden.py models`


@pytest.mark.parametrize("name", GOLDEN_MODELS)
def test_logits_and_greedy_tokens_are_those_of_transformers(tmp_path: Path, name: str) -> None:
    config, length = GOLDEN_MODELS[name]
    model = load_model(write_folder(tmp_path, config, make_weights(config)), dtype="float32")
    ids = prompt(length, config["vocab_size"])
    logits = model(mx.array([ids]))
    assert logits.shape == (1, length, config["vocab_size"])
    assert_close(logits[0, mx.array(golden_positions(length))], GOLDEN[name]["logits"], what=name)
    stream = generate_tokens(
        model, ids, sampling=SamplingParams(temperature=0), max_tokens=GREEDY_TOKENS, eos_token_ids=(), prefill_chunk=50
    )
    assert [step.token for _, step in stream] == GOLDEN[name]["greedy"]


@pytest.mark.parametrize(
    ("name", "experts"),
    [
        ("dense", "separate"),
        ("untied, multi-query, odd heads", "separate"),
        ("moe", "separate"),
        ("moe", "fused"),
        ("moe", "stacked"),
    ],
)
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("shards", [0, 3])
def test_every_layout_holds_the_same_model(tmp_path: Path, name: str, experts: Any, dtype: str, shards: int) -> None:
    config, length = GOLDEN_MODELS[name]
    weights = make_weights(config, experts=experts)
    ids = mx.array([prompt(length, config["vocab_size"])])
    found = load_model(write_folder(tmp_path / "a", config, weights, dtype=dtype, shards=shards), dtype="float32")(ids)
    widened = write_folder(tmp_path / "b", config, rounded(make_weights(config), dtype))
    assert mx.array_equal(found, load_model(widened, dtype="float32")(ids))


@pytest.mark.parametrize("config", [DENSE, MOE])
def test_rows_of_a_batch_do_not_see_each_other(tmp_path: Path, config: dict[str, Any]) -> None:
    model = load_model(write_folder(tmp_path, config, make_weights(config)), dtype="float32")
    rows = mx.array([prompt(40, 96, seed) for seed in range(3)])
    together = model(rows)
    for row in range(3):
        assert_close(together[row], model(rows[row : row + 1])[0], what=f"row {row}")


@pytest.mark.parametrize("config", [DENSE, MOE])
def test_only_last_tokens_go_through_the_last_feed_forward_where_nothing_else_is_read(
    tmp_path: Path, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole_model = load_model(write_folder(tmp_path, config, make_weights(config)), dtype="float32")
    model, cache = whole_model.model, make_cache(whole_model, batch_size=3)
    rows, lengths = mx.array([prompt(12, 96, seed) for seed in range(3)]), [12, 1, 7]
    whole = model(rows)
    block, seen = type(model.layers[-1].mlp), []
    real = block.__call__

    def counted(self: Any, x: mx.array) -> mx.array:
        seen.append((self is model.layers[-1].mlp, x.shape[0]))
        return real(self, x)

    monkeypatch.setattr(block, "__call__", counted)
    last = model(rows, cache, lengths=lengths, last_only=True)
    assert last.shape == (3, 1, config["hidden_size"])
    for row, length in enumerate(lengths):
        assert_close(last[row, 0], whole[row, length - 1], what=f"row {row}")
    assert_close(model(rows, last_only=True)[:, 0], whole[:, -1], what="without padding or cache")
    assert {tokens for is_last, tokens in seen if is_last} == {3}
    assert {tokens for is_last, tokens in seen if not is_last} == {sum(lengths), 36}  # padding is left out


def test_what_comes_later_changes_nothing_before(tmp_path: Path) -> None:
    model = load_model(write_folder(tmp_path, DENSE, make_weights(DENSE)), dtype="float32")
    ids = prompt(30, 96)
    assert_close(model(mx.array([ids]))[0, :20], model(mx.array([ids[:20]]))[0])


@pytest.mark.parametrize("token", [-1, 97, 1_000_000])
def test_ids_beyond_the_vocabulary_are_refused(tiny: Qwen3ForCausalLM, token: int) -> None:
    with pytest.raises(OptionError, match="expected 0 to 96"):
        tiny(mx.array([[1, token]]))


@pytest.mark.parametrize(
    "tokens",
    [
        mx.zeros((1, 0), dtype=mx.int32),
        mx.array([1, 2]),
        mx.array([[1.0]]),
        mx.array([[[1]]]),
        mx.array(1),
        [[1, 2]],
        np.array([[1, 2]]),
        None,
    ],
)
def test_tokens_of_another_shape_or_kind_are_refused(tokens: Any) -> None:
    with pytest.raises(OptionError, match=r"tokens: found .*, expected integers \[rows, tokens\]"):
        Qwen3ForCausalLM(ModelConfig.from_dict(DENSE))(tokens)


def test_lengths_need_a_cache() -> None:
    with pytest.raises(OptionError, match="lengths: found without a cache"):
        Qwen3ForCausalLM(ModelConfig.from_dict(DENSE))(mx.array([[1, 2]]), lengths=[1])


@pytest.mark.parametrize("change", [{"num_hidden_layers": 1}, {"head_dim": 32}, {"rope_theta": 5e5}])
def test_a_cache_of_another_shape_is_refused_and_stays_as_it_was(change: dict[str, Any]) -> None:
    model, other = (Qwen3ForCausalLM(ModelConfig.from_dict({**DENSE, **more})) for more in ({}, change))
    cache = make_cache(other)
    with pytest.raises(CacheError, match="made for a model of another shape"):
        model(mx.array([[1, 2]]), cache)
    assert cache.offset == 0


# The eight releases, by shape


# Parameters in all and for one token, as published with the weights.
PARAMETERS = {
    "Qwen3-0.6B": (596_049_920, None),
    "Qwen3-1.7B": (1_720_574_976, None),
    "Qwen3-4B": (4_022_468_096, None),
    "Qwen3-8B": (8_190_735_360, None),
    "Qwen3-14B": (14_768_307_200, None),
    "Qwen3-32B": (32_762_123_264, None),
    "Qwen3-30B-A3B": (30_532_122_624, 3.3e9),
    "Qwen3-235B-A22B": (235_093_634_560, 22e9),
}


@pytest.mark.parametrize("release", PARAMETERS)
def test_releases_have_their_published_tensors(release: str) -> None:
    config, (parameters, _) = RELEASES[release], PARAMETERS[release]
    model = Qwen3ForCausalLM(ModelConfig.from_dict(config))
    before = mx.get_active_memory()
    arrays = dict(tree_flatten(model.parameters()))
    assert {name: array.shape for name, array in arrays.items()} == published_shapes(config, "stacked")
    assert sum(array.size for array in arrays.values()) == parameters
    assert mx.get_active_memory() - before < 1 << 20
    separate = published_shapes(config)
    assert sum(np.prod(shape, dtype=int) for shape in separate.values()) == parameters
    experts = sum(routes(config, layer) for layer in range(config["num_hidden_layers"])) * config.get("num_experts", 0)
    assert sum(".experts." in name for name in separate) == 3 * experts


def test_the_largest_release_is_shaped_without_memory() -> None:
    """In a process of its own, whose peak nothing else has raised."""
    program = (
        "import json, resource, sys, mlx.core\n"
        "from mlxqwen.files.config import ModelConfig\n"
        "from mlxqwen.model.qwen3 import Qwen3ForCausalLM\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "Qwen3ForCausalLM(ModelConfig.from_dict(json.loads(sys.argv[1])))\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    config = json.dumps(RELEASES["Qwen3-235B-A22B"])
    grown = subprocess.run([sys.executable, "-c", program, config], capture_output=True, text=True, check=True).stdout
    kibibytes = int(grown) / (1024 if sys.platform == "darwin" else 1)
    assert kibibytes < 100 * 1024


@pytest.mark.parametrize("release", PARAMETERS)
def test_footprint_counts_the_published_parameters(tmp_path: Path, release: str) -> None:
    config, (parameters, active) = RELEASES[release], PARAMETERS[release]
    footprint = measure(write_folder(tmp_path, config, {"model.norm.weight": np.ones(1, dtype=np.float32)}))
    assert footprint.parameters == parameters
    assert footprint.active_parameters == (parameters if active is None else pytest.approx(active, rel=0.02))
    assert footprint.config.context_length == 40_960


@pytest.mark.parametrize("config", [DENSE, MOE, GOLDEN_MODELS["moe every second layer"][0]])
def test_footprint_is_what_the_files_hold(tmp_path: Path, config: dict[str, Any]) -> None:
    weights = make_weights(config)
    footprint = measure(write_folder(tmp_path, config, weights, dtype="BF16"))
    assert footprint.parameters == sum(array.size for array in weights.values())
    assert footprint.disk_bytes == 2 * footprint.parameters
    assert footprint.weight_bytes(mx.float32) == 4 * footprint.parameters
    assert (footprint.bits_per_weight, footprint.dtype, footprint.format) == (16, mx.bfloat16, "BF16")


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_narrow_dtypes_stay_near_float32(tmp_path: Path, dtype: mx.Dtype) -> None:
    folder = write_folder(tmp_path, DENSE, make_weights(DENSE))
    ids = mx.array([prompt(60, 96)])
    exact, narrow = load_model(folder, dtype="float32")(ids), load_model(folder, dtype=dtype)(ids)
    assert narrow.dtype == dtype
    assert_close(narrow, exact, dtype)
    assert np.abs(to_numpy(narrow) - to_numpy(exact)).max() > 1e-4  # it was narrow indeed
