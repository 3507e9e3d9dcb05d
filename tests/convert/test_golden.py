"""Weights packed by the libraries that publish them: what we restore has the hash of what they restore.

`scripts/make_golden.py convert` makes the files in tests/golden/convert/.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlxqwen.files.checkpoint import load_safetensors
from mlxqwen_convert import affine, awq, compressed_tensors, fp8, gptq
from tests.convert.encoders import unpack_affine

GOLDEN = Path(__file__).parents[1] / "golden"
CASES: dict[str, dict[str, Any]] = json.loads((GOLDEN / "convert.json").read_text())["cases"]


def restored(case: dict[str, Any], tensors: dict[str, mx.array]) -> mx.array:
    """float32 rows, checked as a conversion checks them."""
    rows, width = case["shape"]
    if "weight" in tensors:
        scale_name = "weight_scale_inv" if "weight_scale_inv" in tensors else "weight_scale"
        block = (128, 128) if scale_name == "weight_scale_inv" else None
        fp8.check_rows(tensors["weight"], tensors[scale_name], block, name="weight", scale_name=scale_name)
        return fp8.dequantize_rows(tensors["weight"], tensors[scale_name], block)
    if "weight_packed" in tensors:
        assert tensors["weight_shape"].tolist() == [rows, width]
        parts = tensors["weight_packed"], tensors["weight_scale"], tensors.get("weight_zero_point")
        compressed_tensors.check(*parts, case["bits"], width, name="weight_scale")
        return compressed_tensors.dequantize(*parts, case["bits"], width)
    grouped = tensors["qweight"], tensors["qzeros"], tensors["scales"]
    if "g_idx" not in tensors:
        awq.check(*grouped, name="scales")
        return awq.dequantize(*grouped)
    gptq.check_groups(tensors["g_idx"], len(tensors["scales"]), name="g_idx")
    gptq.check(*grouped, case["bits"], tensors["g_idx"], name="scales")
    return gptq.dequantize(*grouped, case["bits"], tensors["g_idx"])


def repacked(case: dict[str, Any], tensors: dict[str, mx.array]) -> affine.Packed | None:
    """The codes as they are, with float32 scales; None where there are none to keep."""
    if "weight_packed" in tensors:
        parts = tensors["weight_packed"], tensors["weight_scale"], tensors.get("weight_zero_point")
        return compressed_tensors.repack(*parts, case["bits"], case["shape"][1], mx.float32)
    if "qweight" not in tensors or case.get("act_order"):
        return None
    grouped = tensors["qweight"], tensors["qzeros"], tensors["scales"]
    if "g_idx" in tensors:
        return gptq.repack(*grouped, case["bits"], mx.float32)
    return awq.repack(*grouped, mx.float32)


@pytest.mark.parametrize("name", CASES)
def test_restored_as_by_its_own_library(name: str) -> None:
    case, tensors = CASES[name], load_safetensors(GOLDEN / "convert" / f"{name}.safetensors")[0]
    rows = np.array(restored(case, tensors))
    assert list(rows.shape) == case["shape"]
    assert hashlib.sha256(rows.astype("<f4").tobytes()).hexdigest() == case["sha256"]
    packed = repacked(case, tensors)
    if packed is not None:
        weight, scales, biases = (np.array(part) for part in packed)
        read = unpack_affine(weight, scales, biases, case.get("bits", 4))
        assert np.abs(read - rows).max() <= 3e-7 * np.abs(biases).max()


def test_inputs_of_act_order_are_recognized() -> None:
    for name, expected in (("gptq-int4", True), ("gptq-int4-act-order", False)):
        tensors = load_safetensors(GOLDEN / "convert" / f"{name}.safetensors")[0]
        assert gptq.in_order(tensors["g_idx"], CASES[name]["group_size"]) is expected
