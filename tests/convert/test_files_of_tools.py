"""Files that auto-round and GPTQModel wrote themselves, of a model whose weights are known from before.

`tests/data/auto_round` holds exports of auto-round 0.16.1 (4 bits, groups of 32, symmetric, no tuning) of the model
`SOURCE`: half of its scales are negative, and `w = scale · (q − zero)`. `tests/data/gptq_model` is of GPTQModel 7.7.0:
by its `dynamic`, `v_proj` stays unquantized and `down_proj` has 8 bits (of its config the maker's machine is cut out).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlxqwen.files.checkpoint import Checkpoint, load_safetensors
from mlxqwen.files.config import AffineQuantization, ModelConfig
from mlxqwen.model.loading import load_model
from mlxqwen_convert import convert
from tests.checkpoint_arrays import arrays_of
from tests.convert import encoders
from tests.convert.encoders import Floats
from tests.tiny_checkpoints import DENSE, Config, make_weights, prompt, write_folder

DATA = Path(__file__).parents[1] / "data"
FOLDER = DATA / "auto_round"
FORMS = ("gptq", "awq", "compressed-tensors")
SOURCE: Config = {
    **DENSE,
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "intermediate_size": 96,
    "torch_dtype": "float16",
}
Arrays = Mapping[str, Any]


def gptq(found: Arrays, bits: int = 4) -> tuple[Floats, Floats]:
    each = 32 // bits
    codes = encoders.unpack_words(np.ascontiguousarray(found["qweight"].T), bits, each * len(found["qweight"]))
    zeros = encoders.unpack_words(found["qzeros"], bits, each * found["qzeros"].shape[1]).T + 1
    return grid(codes, zeros, found["scales"].T.astype(np.float32))


def awq(found: Arrays) -> tuple[Floats, Floats]:
    order = np.argsort(encoders.AWQ_ORDER)
    codes, zeros = (
        encoders.unpack_words(found[word], 4, 8 * found[word].shape[1]).reshape(len(found[word]), -1, 8)[..., order]
        for word in ("qweight", "qzeros")
    )
    codes, zeros = (array.reshape(len(array), -1).T for array in (codes, zeros))
    return grid(codes, zeros, found["scales"].T.astype(np.float32))


def compressed(found: Arrays) -> tuple[Floats, Floats]:
    codes = encoders.unpack_words(found["weight_packed"], 4, 8 * found["weight_packed"].shape[1])
    scales = found["weight_scale"].astype(np.float32)
    return grid(codes, np.full(scales.shape, 8), scales)


def grid(codes: Any, zeros: Any, scales: Floats) -> tuple[Floats, Floats]:
    """The weights, and the scale of each."""
    wide = np.repeat(scales, 32, axis=1)
    weights: Floats = (codes - np.repeat(zeros, 32, axis=1)).astype(np.float32) * wide
    return weights, wide


READ: dict[str, Callable[[Arrays], tuple[Floats, Floats]]] = {
    "gptq": gptq,
    "awq": awq,
    "compressed-tensors": compressed,
}


def modules_of(folder: Path) -> dict[str, dict[str, Any]]:
    """The tensors by module; floats in float32."""
    arrays, _ = load_safetensors(folder / "model.safetensors")
    modules: dict[str, dict[str, Any]] = {}
    for name, array in arrays.items():
        stem, _, word = name.rpartition(".")
        is_float = mx.issubdtype(array.dtype, mx.floating)
        modules.setdefault(stem, {})[word] = np.array(array.astype(mx.float32) if is_float else array)
    return modules


@pytest.mark.parametrize("form", FORMS)
def test_weights_are_those_that_were_rounded(tmp_path: Path, form: str) -> None:
    """The oracle is the model before it was quantized: no weight is further off than a step, most by half of one."""
    original = make_weights(SOURCE)
    report = convert(FOLDER / form, tmp_path / "out", bits=16, dtype="float32", workers=1)
    converted = arrays_of(Checkpoint.open(tmp_path / "out"))
    modules = {stem: found for stem, found in modules_of(FOLDER / form).items() if "weight" not in found}
    assert len(modules) == 7
    negative = 0
    for stem, found in modules.items():
        expected, scales = READ[form](found)
        negative += int((scales < 0).sum())
        assert np.array_equal(np.array(converted[f"{stem}.weight"]), expected)
        off = np.abs(expected - original[f"{stem}.weight"].astype(np.float16).astype(np.float32)) / np.abs(scales)
        assert off.max() <= 1.1  # where the grid ends a step short
        assert (off <= 0.51).mean() > 0.95
    assert negative > 0.4 * sum(array.size for name, array in original.items() if "_proj" in name)
    assert report.verified


@pytest.mark.parametrize("form", FORMS)
def test_codes_are_kept_and_the_model_computes_as_the_rounded_one(tmp_path: Path, form: str) -> None:
    report = convert(FOLDER / form, tmp_path / "out", workers=1)
    assert {row.method for row in report.kinds if row.kind in ("attention", "mlp")} == {"repack"}
    weights = {
        f"{stem}.weight": found["weight"] if "weight" in found else READ[form](found)[0]
        for stem, found in modules_of(FOLDER / form).items()
    }
    ids = mx.array([prompt(20, 96)])
    expected = load_model(write_folder(tmp_path / "plain", SOURCE, weights), dtype="float32")(ids)
    found = load_model(tmp_path / "out", dtype="float32")(ids)
    assert mx.all(mx.abs(found - expected) <= 0.02 * mx.abs(expected).max())


def test_bits_by_gptq_models_dynamic(tmp_path: Path) -> None:
    """Calibration moves weights by more than their rounding; the error of 8 bits is still a tenth of that of 4."""
    original, folder = make_weights(SOURCE), DATA / "gptq_model"
    report = convert(folder, tmp_path / "plain", bits=16, dtype="float32", workers=1)
    assert report.source_format == "GPTQ 4-bit, groups of 32"
    converted = arrays_of(Checkpoint.open(tmp_path / "plain"))
    bits_of = {}
    for stem, found in modules_of(folder).items():
        written, exact = np.array(converted[f"{stem}.weight"]), original[f"{stem}.weight"]
        if "weight" in found:
            assert np.array_equal(written, found["weight"])
            continue
        bits = bits_of[stem.rpartition(".")[2]] = 32 * len(found["qweight"]) // exact.shape[1]
        assert np.array_equal(written, gptq(found, bits)[0])
        error = np.linalg.norm(written - exact) / np.linalg.norm(exact)
        assert 1.5 / 2**bits < error < 6 / 2**bits
    assert bits_of == dict.fromkeys(["q_proj", "k_proj", "o_proj", "gate_proj", "up_proj"], 4) | {"down_proj": 8}
    convert(folder, tmp_path / "out", workers=1)
    quantization = ModelConfig.from_folder(tmp_path / "out").quantization
    assert quantization is not None
    assert quantization.of("model.layers.0.mlp.down_proj") == AffineQuantization(32, 8)
    assert quantization.of("model.layers.0.mlp.up_proj") == AffineQuantization(32, 4)
    assert quantization.of("model.layers.0.self_attn.v_proj") is None
    ids = mx.array([prompt(20, 96)])
    plain, kept = (load_model(tmp_path / name, dtype="float32")(ids) for name in ("plain", "out"))
    assert mx.all(mx.abs(kept - plain) <= 0.02 * mx.abs(plain).max())
