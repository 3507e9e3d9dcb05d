"""Faults of disk, memory or arithmetic are found by verifying, and leave nothing that could be mistaken for a model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlxqwen_convert import convert
from mlxqwen_convert.affine import Packed, quantize
from mlxqwen_convert.errors import VerificationError
from mlxqwen_convert.pipeline import TargetFiles, Written, repacked
from mlxqwen_convert.verification import ModuleError
from tests.convert.checkpoints import MOE, make_source
from tests.convert.encoders import unpack_affine


def refused(source: Path, output: Path, match: str) -> None:
    with pytest.raises(VerificationError, match=match):
        convert(source, output)
    assert not output.exists()
    assert not output.with_name(f"{output.name}.partial").exists()


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


@pytest.mark.parametrize("form", ["awq", "gptq8"])
def test_a_code_that_is_not_the_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    source = make_source(tmp_path / "in", form).write()

    def wrong(*arguments: Any, **options: Any) -> Packed:
        weight, scales, biases = repacked(*arguments, **options)
        return Packed(weight ^ (mx.arange(weight.shape[1]) == 3).astype(mx.uint32), scales, biases)

    monkeypatch.setattr("mlxqwen_convert.pipeline.repacked", wrong)
    refused(source.folder, tmp_path / "out", "repacked codes differ")


def test_scales_that_are_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_source(tmp_path / "in", "bf16").write()

    def wrong(*arguments: Any, **options: Any) -> Packed:
        weight, scales, biases = quantize(*arguments, **options)
        return Packed(weight, scales * 1.25, biases)

    monkeypatch.setattr("mlxqwen_convert.affine.quantize", wrong)
    refused(source.folder, tmp_path / "out", "is off by")


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
        assert Written.from_text(written.as_text()) == written
    for text in ("ab12 0x1p0", "ab12 1 2 3 x", "ab12 y 2 3 4"):
        assert Written.from_text(text) is None
