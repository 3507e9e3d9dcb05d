"""Faults of disk, memory or arithmetic are found by verifying, and leave nothing that could be mistaken for a model."""

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlxqwen.files.checkpoint import load_safetensors
from mlxqwen_convert import convert
from mlxqwen_convert.affine import Packed, quantize
from mlxqwen_convert.bfloat16 import Quantizer
from mlxqwen_convert.errors import SourceError, VerificationError
from mlxqwen_convert.pipeline import Written, repacked
from mlxqwen_convert.target_files import TargetFiles
from mlxqwen_convert.verification import ModuleError
from tests.convert.checkpoints import MOE, Source, make_source, plain_tensor
from tests.convert.encoders import unpack_affine


def refused(source: Path, output: Path, match: str) -> None:
    with pytest.raises(VerificationError, match=match):
        convert(source, output)
    assert not output.exists()
    assert not (output.with_name(f"{output.name}.partial") / "config.json").exists()


def mended(source: Path, output: Path) -> None:
    """Without the fault, the conversion goes on and ends in what it should have been."""
    convert(source, output, resume=True)
    convert(source, output.with_name("anew"))
    for path in output.glob("*.safetensors"):
        assert path.read_bytes() == (output.with_name("anew") / path.name).read_bytes()


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_a_bit_that_flips_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float) -> None:
    source = make_source(tmp_path / "in", "fp8", MOE).write()
    flush = TargetFiles.flush

    def damage(files: TargetFiles) -> None:
        flush(files)
        with files.paths[0].open("r+b") as file:
            position = int(share * os.fstat(file.fileno()).st_size)
            file.seek(position)
            flipped = file.read(1)[0] ^ 1
            file.seek(position)
            file.write(bytes([flipped]))

    monkeypatch.setattr(TargetFiles, "flush", damage)
    refused(source.folder, tmp_path / "out", "what is on the disk differs")
    monkeypatch.undo()
    mended(source.folder, tmp_path / "out")


@pytest.mark.parametrize("word", ["weight", "scales", "biases"])
@pytest.mark.parametrize("form", ["awq", "gptq8", "int4-asymmetric"])
def test_what_is_not_the_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, word: str) -> None:
    source = make_source(tmp_path / "in", form).write()

    def wrong(*arguments: Any, **options: Any) -> Packed:
        packed = repacked(*arguments, **options)
        array = getattr(packed, word)
        bits = array.view(mx.uint32 if word == "weight" else mx.uint16)
        flipped = bits ^ (mx.arange(bits.shape[1]) == 1).astype(bits.dtype) * (1 if word == "weight" else 4)
        return packed._replace(**{word: flipped.view(array.dtype)})

    monkeypatch.setattr("mlxqwen_convert.pipeline.repacked", wrong)
    what = "repacked codes differ" if word == "weight" else "scales or biases differ"
    refused(source.folder, tmp_path / "out", what)
    monkeypatch.undo()
    mended(source.folder, tmp_path / "out")


@pytest.mark.parametrize(
    ("form", "step", "match"),
    [
        ("awq", "mlxqwen_convert.awq._words", "repacked codes differ"),
        ("awq", "mlxqwen_convert.awq._zeros", "scales or biases differ"),
        ("gptq", "mlxqwen_convert.gptq._zeros", "scales or biases differ"),
        ("int8-asymmetric", "mlxqwen_convert.compressed_tensors._zeros", "scales or biases differ"),
    ],
)
def test_each_step_of_repacking(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, step: str, match: str
) -> None:
    """What compares them does not share a step with what repacks them."""
    source = make_source(tmp_path / "in", form).write()
    module, _, name = step.rpartition(".")
    right = getattr(importlib.import_module(module), name)
    monkeypatch.setattr(step, lambda *arguments: mx.concatenate([right(*arguments)[1:], right(*arguments)[:1]]))
    refused(source.folder, tmp_path / "out", match)


def test_scales_that_are_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_source(tmp_path / "in", "bf16").write()

    def wrong(*arguments: Any, **options: Any) -> Packed:
        weight, scales, biases = quantize(*arguments, **options)
        return Packed(weight, scales * 1.25, biases)

    monkeypatch.setattr("mlxqwen_convert.affine.quantize", wrong)
    with pytest.raises(VerificationError, match="is off by"):
        convert(source.folder, tmp_path / "out", bits=3)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()  # its journal would have the same errors


@pytest.mark.parametrize("bits", [4, 8])
def test_codes_that_are_packed_wrongly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bits: int) -> None:
    source = make_source(tmp_path / "in", "bf16").write()
    quantize_block = Quantizer._quantize_block

    def wrong(quantizer: Quantizer, block: int, *, far: bool) -> None:
        quantize_block(quantizer, block, far=far)
        quantizer._weight[block] ^= 1 << (bits - 1)

    monkeypatch.setattr(Quantizer, "_quantize_block", wrong)
    with pytest.raises(VerificationError, match="is off by"):
        convert(source.folder, tmp_path / "out", bits=bits)
    assert not (tmp_path / "out").exists()


def test_errors_are_those_of_what_is_on_the_disk(tmp_path: Path) -> None:
    source = make_source(tmp_path / "in", "bf16").write()
    report = convert(source.folder, tmp_path / "out", bits=3)
    tensors = mx.load(str(tmp_path / "out/model.safetensors"))
    assert isinstance(tensors, dict)
    for name, meaning in source.meaning.items():
        if meaning.ndim == 1:
            continue
        scales, biases = (np.array(tensors[f"{name}.{word}"].astype(mx.float32)) for word in ("scales", "biases"))
        found = unpack_affine(np.array(tensors[f"{name}.weight"]), scales, biases, 3)
        error = np.linalg.norm(found - meaning) / np.linalg.norm(meaning)
        assert report.modules[name]["relative_error"] == pytest.approx(error, rel=2e-3)


def test_the_journal_keeps_errors_exactly() -> None:
    for written in (Written("ab12"), Written("ab12", ModuleError(0.1, 1 / 3, 2e-30, 77))):
        assert Written.from_list(json.loads(json.dumps(written.as_list()))) == written
    for known in ([], ["ab12", 1.0], ["ab12", 1.0, 2.0, 3.0, "x"], ["ab12", "y", 2, 3, 4], ["ab12", None, 2, 3, 4]):
        with pytest.raises((ValueError, TypeError)):
            Written.from_list(known)


def lost_to_float16(tmp_path: Path, form: str, word: str, value: float) -> Source:
    """A source whose tensors of that last name are BF16 and hold one small number."""
    source = make_source(tmp_path / "in", form)
    for name, (_, array) in source.stored.items():
        if name.endswith(word):
            source.stored[name] = plain_tensor(np.full(array.shape, value, np.float32), "BF16")[0]
    return source.write()


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize(
    ("form", "word"),
    [("int4", ".weight_scale"), ("int4-asymmetric", ".weight_scale"), ("awq", ".scales"), ("gptq", ".scales")],
)
def test_scales_that_float16_cannot_hold(tmp_path: Path, form: str, word: str, verify: bool) -> None:
    source = lost_to_float16(tmp_path, form, word, 3e-9)
    with pytest.raises(SourceError, match=r"(?s)scales up to 3e-09, which float16 cannot hold.*--dtype"):
        convert(source.folder, tmp_path / "out", dtype="float16", verify=verify)
    assert not (tmp_path / "out").exists()
    report = convert(source.folder, tmp_path / "out", dtype="float32", verify=verify)
    if verify:
        assert all(row.relative_error is not None and row.relative_error < 1e-5 for row in report.kinds)


def test_scales_that_vanish_beside_others(tmp_path: Path) -> None:
    source = make_source(tmp_path / "in", "awq")
    name = "model.layers.0.self_attn.q_proj"
    scales = source.stored[f"{name}.scales"][1].astype(np.float32)
    scales[1, 5] = 1e-9
    source.stored[f"{name}.scales"] = plain_tensor(scales, "BF16")[0]
    report = convert(source.write().folder, tmp_path / "out")
    assert report.verified
    assert report.modules[name]["relative_error"] < 2e-3


def test_plain_weights_that_float16_cannot_hold(tmp_path: Path) -> None:
    source = lost_to_float16(tmp_path, "bf16", "up_proj.weight", 1e-8)
    with pytest.raises(VerificationError, match=r"(?s)up_proj: what was written is off by 100.*--dtype float32"):
        convert(source.folder, tmp_path / "out", dtype="float16", bits=16)
    assert not (tmp_path / "out").exists()


def test_symmetric_integers_in_bfloat16_are_exact(tmp_path: Path) -> None:
    source = make_source(tmp_path / "in", "int8")
    for name, (_, array) in source.stored.items():
        if name.endswith(("_scale", "norm.weight", "embed_tokens.weight", "lm_head.weight")):
            source.stored[name] = plain_tensor(array.astype(np.float32), "BF16")[0]
    report = convert(source.write().folder, tmp_path / "out")
    assert report.dtype == "BF16"
    assert all(facts["relative_error"] < 1e-6 for facts in report.modules.values())


def with_zeros(folder: Path, form: str) -> Path:
    """A checkpoint whose `down_proj` have the code of 0 everywhere; or, of BF16, 0."""
    source = make_source(folder, form)
    for name, (_, array) in source.stored.items():
        if "down_proj" in name and name.endswith(("qweight", "qzeros")):
            code = 0x6 if form == "gptq" and name.endswith("qzeros") else 0x7  # GPTQ's are one less
            array[...] = np.int32(0x11111111 * code)
        elif "down_proj" in name and form == "bf16":
            array[...] = 0
    return source.write().folder


@pytest.mark.parametrize("form", ["awq", "gptq"])
def test_what_comes_back_for_weights_that_are_all_0_is_an_absolute_error(tmp_path: Path, form: str) -> None:
    """Scales times codes, plus rounded biases, are not quite 0."""
    report = convert(with_zeros(tmp_path / "in", form), tmp_path / "out", dtype="bfloat16")
    weights, _ = load_safetensors(tmp_path / "out/model.safetensors")
    for layer in range(2):
        name = f"model.layers.{layer}.mlp.down_proj"
        scales, biases = (weights[f"{name}.{part}"].astype(mx.float32) for part in ("scales", "biases"))
        found = mx.dequantize(weights[f"{name}.weight"], scales, biases, group_size=64, bits=4)
        module = report.modules[name]
        assert (module["relative_error"], module["bound"]) == (None, None)
        assert module["absolute_error"] == pytest.approx(mx.sqrt(mx.square(found).mean()).item(), rel=1e-2)
    (row,) = (row for row in report.kinds if row.kind == "mlp")
    assert row.absolute_error is not None
    assert 0 < row.absolute_error < 1e-2
    assert row.relative_error is not None
    assert row.largest_error is not None
    assert row.relative_error <= row.largest_error < 1
    assert "Infinity" not in (tmp_path / "out/conversion_report.json").read_text()
    assert f"zeros {row.absolute_error:.3g} off" in (tmp_path / "out/README.md").read_text()


def test_weights_that_are_all_0_and_stay_so_are_exact(tmp_path: Path) -> None:
    report = convert(with_zeros(tmp_path / "in", "bf16"), tmp_path / "out")
    module = report.modules["model.layers.0.mlp.down_proj"]
    assert module["relative_error"] == 0
    assert "absolute_error" not in module
    assert all(row.absolute_error is None for row in report.kinds)
