from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxqwen.errors import ConfigError, OptionError
from mlxqwen.files.config import (
    AffineQuantization,
    GenerationConfig,
    ModelConfig,
    Quantization,
    YarnScaling,
)
from mlxqwen.model.rope import rope_wavelengths
from tests.tiny_checkpoints import DENSE, MOE

YARN: dict[str, Any] = {"rope_type": "yarn", "factor": 4.0}
LONG = {**DENSE, "max_position_embeddings": 40_960}


def without(config: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in keys}


def read(**changes: Any) -> ModelConfig:
    return ModelConfig.from_dict({**LONG, **changes})


# What is read


def test_both_spellings_say_the_same() -> None:
    yarn = {**YARN, "original_max_position_embeddings": 10_240}
    old = {**MOE, "torch_dtype": "bfloat16", "rope_scaling": {**without(yarn, "rope_type"), "type": "yarn"}}
    new = without(old, "rope_theta", "rope_scaling", "torch_dtype", "num_experts") | {
        "dtype": "bfloat16",
        "num_local_experts": MOE["num_experts"],
        "rope_parameters": {**yarn, "rope_theta": MOE["rope_theta"]},
    }
    assert ModelConfig.from_dict(old) == ModelConfig.from_dict(new)


def test_defaults_are_those_of_transformers() -> None:
    config = ModelConfig.from_dict(without(DENSE, "head_dim", "num_key_value_heads", "tie_word_embeddings"))
    assert (config.head_dim, config.num_key_value_heads, config.tie_word_embeddings) == (128, 4, False)
    assert ModelConfig.from_dict(without(MOE, "head_dim")).head_dim == 8
    assert (config.moe, config.rope_scaling, config.quantization) == (None, None, None)


@pytest.mark.parametrize("dtype", ["auto", "float64", None, ["bfloat16"]])
@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_the_dtype_is_that_of_the_tensors_whatever_the_config_says(key: str, dtype: Any) -> None:
    assert read(**{key: dtype}) == read()


@pytest.mark.parametrize(("local", "plain"), [(None, 8), (8, None), (8, 4)])
def test_the_number_of_experts_is_under_either_name(local: int | None, plain: int | None) -> None:
    config = ModelConfig.from_dict({**MOE, "num_local_experts": local, "num_experts": plain})
    assert config.moe is not None
    assert config.moe.num_experts == 8


@pytest.mark.parametrize("value", [1, [1, 2], None])
def test_end_tokens_are_one_or_many(value: Any) -> None:
    assert read(eos_token_id=value).eos_token_ids == {1: (1,), None: ()}.get(value if value != [1, 2] else 0, (1, 2))


@pytest.mark.parametrize(
    "scaling",
    [
        None,
        {},
        {"rope_type": None},
        {"rope_type": "default"},
        {"type": "default", "rope_theta": 5e5},
        {"rope_type": "default", "factor": 1.0},
        {"type": "default", "factor": 4.0},
    ],
)
def test_no_scaling(scaling: Any) -> None:
    config = read(rope_scaling=scaling)
    assert config.rope_scaling is None
    assert config.rope_theta == (scaling or {}).get("rope_theta", LONG["rope_theta"])
    assert config.context_length == 40_960


def test_yarn() -> None:
    inferred = 0.1 * math.log(4) + 1
    assert read(rope_scaling=YARN).rope_scaling == YarnScaling(4, 40_960, inferred, 32, 1, True)
    more = {"attention_factor": 2, "beta_fast": 8, "beta_slow": 2, "truncate": False}
    scaling = {**YARN, "original_max_position_embeddings": 100, **more}
    assert read(rope_scaling=scaling).rope_scaling == YarnScaling(4, 100, 2, 8, 2, False)
    assert read(rope_scaling=YARN).context_length == 163_840
    assert read(rope_scaling={**YARN, "original_max_position_embeddings": 100}).context_length == 40_960


@pytest.mark.parametrize("empty", [{}, None])
def test_an_empty_object_says_nothing(empty: Any) -> None:
    parameters = {**YARN, "rope_theta": 5e5}
    assert read(rope_scaling=empty, rope_parameters=parameters) == read(rope_parameters=parameters)
    assert read(rope_scaling=parameters, rope_parameters=empty) == read(rope_parameters=parameters)
    assert read(rope_parameters=parameters).rope_scaling is not None


@pytest.mark.parametrize("zero", [0, 0.0, None])
def test_a_beta_of_zero_is_the_default(zero: float | None) -> None:
    assert read(rope_scaling={**YARN, "beta_fast": zero, "beta_slow": zero}) == read(rope_scaling=YARN)


def test_another_factor_keeps_the_ramp() -> None:
    ramp = {"beta_fast": 24.0, "beta_slow": 2.0, "truncate": False, "original_max_position_embeddings": 500}
    again = read(rope_scaling={**YARN, **ramp, "attention_factor": 3.0}).with_yarn(2)
    assert again == read(rope_scaling={**YARN, **ramp, "factor": 2.0})
    assert again.rope_scaling is not None
    assert again.rope_scaling.attention_factor == pytest.approx(0.1 * math.log(2) + 1)


def test_unknown_keys_of_scaling_are_ignored_in_a_file_and_refused_as_an_option() -> None:
    scaling = {**YARN, "attention_fctor": 2.0}
    assert read(rope_scaling=scaling) == read(rope_scaling=YARN)
    with pytest.raises(OptionError, match=r"^rope_scaling: found 'attention_fctor', expected only .*attention_factor"):
        read().with_rope_scaling(scaling)


def test_yarn_as_an_option() -> None:
    """Qwen3 was trained on 32,768 of the 40,960 positions that its releases declare."""
    extended = read().with_yarn(4)
    assert extended.rope_scaling is not None
    assert extended.rope_scaling.original_max_position_embeddings == 32_768
    assert extended.context_length == 131_072
    assert extended == read().with_rope_scaling({**YARN, "original_max_position_embeddings": 32_768})
    assert read(max_position_embeddings=1000).with_yarn(2.5).context_length == 2500
    again = read(rope_scaling={**YARN, "original_max_position_embeddings": 500}).with_yarn(2)
    assert again.rope_scaling is not None
    assert again.rope_scaling.original_max_position_embeddings == 500
    assert extended.with_rope_scaling({"rope_type": "default"}).rope_scaling is None


@pytest.mark.parametrize(
    "scaling",
    [
        "yarn",
        None,
        4.0,
        {"rope_type": "linear", "factor": 2.0},
        {"factor": 2.0},
        {"rope_type": "yarn"},
        {**YARN, "factor": float("nan")},
        {**YARN, "factor": 0},
        {**YARN, "factor": True},
        {**YARN, "factor": "4"},
        {**YARN, "original_max_position_embeddings": 0},
        {**YARN, "original_max_position_embeddings": 10**30},
        {**YARN, "beta_fast": 1, "beta_slow": 2},
        {**YARN, "attention_factor": -1},
        {"rope_type": "yarn", "factor": 2.0, 5: 1},
    ],
)
def test_scaling_as_an_option_is_checked(scaling: Any) -> None:
    with pytest.raises(OptionError, match=r"^rope_scaling: ") as caught:
        read().with_rope_scaling(scaling)
    assert "config.json" not in str(caught.value)
    assert caught.value.hint


@pytest.mark.parametrize("factor", [0, 0.5, -1, float("nan"), float("inf"), True, "4", None, 1e9])
def test_a_yarn_factor_is_checked(factor: Any) -> None:
    with pytest.raises(OptionError, match="factor"):
        read().with_yarn(factor)


def test_quantization_as_mlx_lm_writes_it() -> None:
    section = {
        "group_size": 64,
        "bits": 4,
        "mode": "affine",
        "model.embed_tokens": False,
        "lm_head": {"group_size": 32, "bits": 8},
        "model.layers.0.mlp.gate_proj": True,
    }
    expected = Quantization(
        AffineQuantization(64, 4), {"model.embed_tokens": None, "lm_head": AffineQuantization(32, 8)}
    )
    for keys in (["quantization"], ["quantization_config"], ["quantization", "quantization_config"]):
        quantization = read(**dict.fromkeys(keys, section)).quantization
        assert quantization == expected
        assert quantization.of("model.norm") == AffineQuantization(64, 4)
        assert quantization.of("model.embed_tokens") is None
        assert quantization.of("lm_head") == AffineQuantization(32, 8)
        assert quantization.of("model.layers.0.mlp.gate_proj") == AffineQuantization(64, 4)


@pytest.mark.parametrize("method", ["fp8", "awq", "gptq", "compressed-tensors", "something-new"])
def test_other_formats_are_named(method: str) -> None:
    config = read(quantization_config={"quant_method": method, "bits": 4})
    assert (config.foreign_quantization, config.quantization) == (method, None)


# What is refused

WRONG: list[tuple[str, Any, str]] = [
    ("model_type", "llama", "'qwen3' or 'qwen3_moe'"),
    ("model_type", ["qwen3"], "'qwen3' or 'qwen3_moe'"),
    ("hidden_size", 0, "an integer from 1 to 65,536"),
    ("hidden_size", -32, "an integer"),
    ("hidden_size", 32.0, "an integer"),
    ("hidden_size", "32", "an integer"),
    ("hidden_size", True, "an integer"),
    ("hidden_size", 10**30, "an integer"),
    ("num_hidden_layers", 10**6, "an integer from 1 to 1,024"),
    ("num_key_value_heads", 3, "a divisor of num_attention_heads, 4"),
    ("head_dim", 15, "an even number"),
    ("vocab_size", None, "an integer"),
    ("rms_norm_eps", float("nan"), "a number"),
    ("rms_norm_eps", 0, "a number"),
    ("rope_theta", 1.0, "a number from 2"),
    ("rope_theta", "10000", "a number"),
    ("rope_theta", False, "a number"),
    ("tie_word_embeddings", 1, "true or false"),
    ("hidden_act", "gelu", "'silu'"),
    ("attention_bias", True, "False"),
    ("use_sliding_window", True, "False"),
    ("layer_types", ["sliding_attention"], "'full_attention'"),
    ("layer_types", "full_attention", "'full_attention'"),
    ("eos_token_id", -1, "a token id"),
    ("eos_token_id", [1, "2"], "a token id"),
    ("eos_token_id", [1] * 65, "a token id"),
    ("rope_scaling", "yarn", "an object or null"),
    ("quantization", [], "an object or null"),
    ("quantization_config", 4, "an object or null"),
]
WRONG_INSIDE: list[tuple[str, str, Any, str]] = [
    ("rope_scaling", "rope_type", "linear", "'yarn' or 'default'"),
    ("rope_scaling", "rope_type", {}, "'yarn' or 'default'"),
    ("rope_scaling", "rope_type", None, "is None, expected 'yarn' or 'default'"),
    ("rope_scaling", "factor", None, "a number from 1 to 1024"),
    ("rope_scaling", "truncate", "no", "true or false"),
    ("rope_scaling", "beta_fast", 0.5, "at least beta_slow"),
    ("quantization", "bits", 7, "one of 2, 3, 4, 5, 6, 8"),
    ("quantization", "bits", True, "one of 2"),
    ("quantization", "bits", [4], "one of 2"),
    ("quantization", "group_size", 48, "one of 32, 64, 128"),
    ("quantization", "mode", "mxfp4", "'affine'"),
    ("rope_scaling", "beta_slow", 1e-9, "a number from 0.001"),
    ("quantization", "model.norm", "no", "an object, true or false"),
    ("quantization", "lm_head", "x", "an object, true or false"),
    ("quantization", "lm_head", None, "an object, true or false"),
]
WRONG_EXPERTS: list[tuple[str, Any, str]] = [
    ("num_experts", 0, "an integer from 1 to 4,096"),
    ("num_experts_per_tok", 9, "an integer from 1 to 8"),
    ("mlp_only_layers", [2], "a list of layers from 0 to 1"),
    ("mlp_only_layers", [True], "a list of layers"),
    ("mlp_only_layers", 0, "a list of layers"),
    ("decoder_sparse_step", 0, "an integer"),
    ("norm_topk_prob", "yes", "true or false"),
]


def refused(config: dict[str, Any], key: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ModelConfig.from_dict(config, source="/models/x/config.json")
    error = caught.value
    assert error.problem.startswith("/models/x/config.json: ")
    assert repr(key) in error.problem
    assert expected in error.problem
    assert str(error).count("\n") == 1


@pytest.mark.parametrize(("key", "value", "expected"), WRONG)
def test_wrong_values_are_named(key: str, value: Any, expected: str) -> None:
    refused({**LONG, key: value}, key, expected)


@pytest.mark.parametrize(("section", "key", "value", "expected"), WRONG_INSIDE)
def test_wrong_values_inside_are_named(section: str, key: str, value: Any, expected: str) -> None:
    sections: dict[str, dict[str, Any]] = {"rope_scaling": YARN, "quantization": {"bits": 4, "group_size": 64}}
    sound = sections[section]
    refused({**LONG, section: {**sound, key: value}}, key, expected)


@pytest.mark.parametrize(("key", "value", "expected"), WRONG_EXPERTS)
def test_wrong_experts_are_named(key: str, value: Any, expected: str) -> None:
    refused({**MOE, key: value}, key, expected)


@pytest.mark.parametrize(
    "key",
    [
        "model_type",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "vocab_size",
        "max_position_embeddings",
        "rms_norm_eps",
        "rope_theta",
        "num_experts",
        "num_experts_per_tok",
        "moe_intermediate_size",
    ],
)
def test_missing_keys_are_named(key: str) -> None:
    refused(without(MOE, key), key, "is missing, expected")


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-2, 300),
    st.floats(),
    st.sampled_from(["yarn", "default", "affine", "qwen3", "qwen3_moe", "bfloat16", "fp8", ""]),
    st.text(max_size=5),
)
INNER_KEYS = st.sampled_from(
    [
        "rope_type",
        "type",
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
        "rope_theta",
        "bits",
        "group_size",
        "mode",
        "quant_method",
        "a.b",
    ]
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(INNER_KEYS, inner, max_size=5), max_leaves=8
)
KEYS = st.sampled_from(
    [
        *sorted(MOE),
        *["rope_scaling", "rope_parameters", "quantization", "quantization_config", "dtype", "torch_dtype"],
        *["num_local_experts", "layer_types", "use_sliding_window"],
    ]
)


@settings(max_examples=250, deadline=None)
@given(base=st.sampled_from([DENSE, MOE]), changes=st.dictionaries(KEYS, VALUES, min_size=1, max_size=3))
def test_any_value_at_any_key_is_read_or_refused(base: dict[str, Any], changes: dict[str, Any]) -> None:
    try:
        config = ModelConfig.from_dict({**base, **changes})
    except ConfigError:
        return
    assert all(map(math.isfinite, rope_wavelengths(config.head_dim, config.rope_theta, config.rope_scaling)))
    assert 0 < config.context_length < 1 << 40
    assert config.num_attention_heads % config.num_key_value_heads == 0


@settings(max_examples=120, deadline=None)
@given(scaling=VALUES)
def test_any_scaling_as_an_option_is_read_or_refused(scaling: Any) -> None:
    try:
        read().with_rope_scaling(scaling)
    except OptionError as error:
        lines = str(error).split("\n")
    else:
        lines = ["", ""]
    assert len(lines) == 2


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"a": NaN}', "{" * 10_000, '{"a": 1, "a": 2}', "\x00"])
def test_damaged_files_are_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=r"config\.json"):
        ModelConfig.from_folder(tmp_path)


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(ConfigError, match=r"config\.json: no such file"):
            ModelConfig.from_folder(folder)


# generation_config.json


def test_generation_config(tmp_path: Path) -> None:
    assert GenerationConfig.from_folder(tmp_path) == GenerationConfig()
    values = {"eos_token_id": [151_645, 151_643], "temperature": 0.6}
    (tmp_path / "generation_config.json").write_text(json.dumps(values))
    assert GenerationConfig.from_folder(tmp_path) == GenerationConfig(values, (151_645, 151_643))


@pytest.mark.parametrize("content", ["", "[]", "{", '{"eos_token_id": "x"}', '{"eos_token_id": [null]}', "{" * 5000])
def test_a_junk_generation_config_is_noted_and_left_aside(tmp_path: Path, content: str) -> None:
    (tmp_path / "generation_config.json").write_text(content)
    config = GenerationConfig.from_folder(tmp_path)
    assert config.eos_token_ids == ()
    (note,) = config.notes
    assert "generation_config.json" in note
    assert note.endswith("; ignored")
