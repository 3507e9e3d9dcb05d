"""Every kind of bad input: one clear error, early, and nothing left that could be mistaken for a model."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlxqwen.errors import CheckpointError, ConfigError, HubError, MlxqwenError, OptionError, UnsupportedFormatError
from mlxqwen_convert import convert
from mlxqwen_convert.errors import ConversionError, OutputError, ResumeError, SourceChangedError, SourceError
from tests.convert.checkpoints import DENSE, MOE, Source, make_source

UP = "model.layers.1.mlp.up_proj"


def packed(**weights: Any) -> dict[str, Any]:
    """The section of a compressed-tensors model in integers."""
    whole = {"type": "int", "num_bits": 4, "strategy": "group", "group_size": 64, **weights}
    return {"format": "pack-quantized", "config_groups": {"group_0": {"targets": ["Linear"], "weights": whole}}}


PACKED_3_BIT, PACKED_BY_TENSOR = packed(num_bits=3), packed(strategy="tensor")


def refuse(source: Source, output: Path, error: type[MlxqwenError], *words: str, **options: Any) -> None:
    """`convert` raises, its message has these words in at most two lines, and nothing is left."""
    before = sorted(output.parent.iterdir())
    with pytest.raises(error) as raised:
        convert(source.folder, output, **options)
    message = str(raised.value)
    assert message.count("\n") <= 1
    for word in words:
        assert word in message
    assert sorted(output.parent.iterdir()) == before


def test_an_output_that_exists(tmp_path: Path) -> None:
    source = make_source(tmp_path / "in", "bf16").write()
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("folder", "file", "link"):
        refuse(source, tmp_path / name, OutputError, "already exists", "remove it")


@pytest.mark.parametrize("output", [".", "./", "/", ".."])
@pytest.mark.parametrize("options", [{}, {"dry_run": True}, {"resume": True}])
def test_an_output_without_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str, options: dict[str, Any]
) -> None:
    source = make_source(tmp_path / "in", "bf16").write()
    (tmp_path / "a/here").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a/here")
    if output == ".." and "dry_run" in options:  # it has a name, and a dry run writes nothing
        assert any("already exists" in note for note in convert(source.folder, output, **options).notes)
    else:
        with pytest.raises(OutputError, match=f"^{re.escape(str(Path(output)))}: already exists"):
            convert(source.folder, output, **options)
    monkeypatch.chdir(source.folder)
    if Path(output) == Path("."):
        with pytest.raises(OutputError, match="is the source itself"):
            convert(source.folder, output, **options)
    assert not list(tmp_path.rglob("*partial"))


def test_an_output_in_the_source(tmp_path: Path) -> None:
    source = make_source(tmp_path / "in", "bf16").write()
    (tmp_path / "link").symlink_to(source.folder)
    for output, word in (
        (source.folder, "the source itself"),
        (tmp_path / "link", "the source itself"),
        (source.folder / "new", "inside the source"),
        (tmp_path / "link" / "new", "inside the source"),
    ):
        refuse(source, output, OutputError, word)


def test_a_source_given_through_a_link(tmp_path: Path) -> None:
    source = make_source(tmp_path / "in", "bf16").write()
    (tmp_path / "link").symlink_to(source.folder)
    with pytest.raises(OutputError, match="inside the source"):
        convert(tmp_path / "link", source.folder / "new")


def test_parents_that_cannot_take_it(tmp_path: Path) -> None:
    source = make_source(tmp_path / "in", "bf16").write()
    with pytest.raises(OutputError, match="parent folder does not exist"):
        convert(source.folder, tmp_path / "a" / "b")
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="parent folder does not exist"):
        convert(source.folder, tmp_path / "file" / "b")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_parent_that_is_read_only(tmp_path: Path) -> None:
    source = make_source(tmp_path / "in", "bf16").write()
    (tmp_path / "locked").mkdir(mode=0o500)
    refuse(source, tmp_path / "locked" / "out", OutputError, "cannot be written")


def test_a_disk_that_is_too_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_source(tmp_path / "in", "bf16").write()
    convert(source.folder, tmp_path / "there")
    weights = (tmp_path / "there" / "model.safetensors").stat().st_size
    usage = type("Usage", (), {"free": weights // 2})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    refuse(source, tmp_path / "out", OutputError, "needs", "free", "--bits")
    (note,) = convert(source.folder, tmp_path / "out", dry_run=True).notes
    told = re.fullmatch(rf"{re.escape(str(tmp_path))}/out: needs ([\d.]+) (kB|MB), the disk has [\d.]+ kB free", note)
    assert told is not None, note
    written = sum(path.stat().st_size for path in (tmp_path / "there").iterdir())
    needed = float(told[1]) * {"kB": 1e3, "MB": 1e6}[told[2]]
    assert weights <= needed <= written + 1e3


def _set(word: str, index: tuple[int, ...], value: float | int) -> Callable[[Source], None]:
    def change(source: Source) -> None:
        dtype, array = source.stored[f"{UP}.{word}"]
        array = array.copy()
        if dtype == "BF16":
            array[index] = np.array(value, np.float32).view(np.uint32) >> 16
        else:
            array[index] = value
        source.stored[f"{UP}.{word}"] = (dtype, array)

    return change


@pytest.mark.parametrize(
    ("form", "change", "words"),
    [
        ("fp8", _set("weight_scale_inv", (1, 0), np.nan), ["weight_scale_inv", "[1, 0]", "nan"]),
        ("fp8", _set("weight_scale_inv", (1, 0), np.inf), ["weight_scale_inv", "[1, 0]", "inf"]),
        ("fp8", _set("weight_scale_inv", (1, 0), -1.0), ["weight_scale_inv", "[1, 0]", "-1"]),
        ("fp8", _set("weight_scale_inv", (1, 0), 0.0), ["weight_scale_inv", "[1, 0]", "zero"]),
        ("fp8", _set("weight", (200, 7), 0x7F), ["weight", "[200, 7]", "NaN"]),
        ("awq", _set("scales", (1, 200), np.nan), ["scales", "[1, 200]", "nan"]),
        ("awq", _set("scales", (1, 200), -np.inf), ["scales", "[1, 200]", "-inf"]),
        ("awq", _set("scales", (1, 200), 0.0), ["scales", "[1, 200]", "zero"]),
        ("gptq", _set("scales", (0, 99), np.inf), ["scales", "[0, 99]", "inf"]),
        ("gptq8", _set("scales", (0, 99), 0.0), ["scales", "[0, 99]", "zero"]),
        ("int4", _set("weight_scale", (99, 1), np.nan), ["weight_scale", "[99, 1]", "nan"]),
        ("bf16", _set("weight", (70, 3), np.nan), ["up_proj.weight", "[70, 3]", "nan"]),
        ("f32", _set("weight", (70, 3), -np.inf), ["up_proj.weight", "[70, 3]", "inf"]),
    ],
)
def test_numbers_that_no_quantizer_writes(
    tmp_path: Path, form: str, change: Callable[[Source], None], words: list[str]
) -> None:
    source = make_source(tmp_path / "in", form)
    change(source)
    refuse(source.write(), tmp_path / "out", SourceError, UP, *words)


@pytest.mark.parametrize(
    ("form", "word"),
    [
        ("fp8", "weight_scale_inv"),
        ("awq", "scales"),
        ("awq", "qzeros"),
        ("awq", "qweight"),
        ("gptq", "scales"),
        ("gptq", "qzeros"),
        ("int4", "weight_scale"),
        ("bf16", "weight"),
    ],
)
def test_missing_tensors(tmp_path: Path, form: str, word: str) -> None:
    source = make_source(tmp_path / "in", form)
    del source.stored[f"{UP}.{word}"]
    refuse(source.write(), tmp_path / "out", SourceError, UP, "missing")


@pytest.mark.parametrize(
    ("form", "key", "value", "words"),
    [
        ("fp8", "weight_block_size", [64, 128], ["weight_scale_inv", "shape"]),
        ("fp8", "weight_block_size", [128], ["weight_block_size"]),
        ("fp8", "weight_block_size", [0, 128], ["weight_block_size"]),
        ("fp8", "modules_to_not_convert", "lm_head", ["modules_to_not_convert", "lm_head"]),
        ("fp8", "fmt", 5, ["fmt", "5"]),
        ("awq", "group_size", 32, ["shape", "expected"]),
        ("awq", "group_size", "big", ["group_size", "big"]),
        ("awq", "bits", 4.0, ["bits", "4.0"]),
        ("awq", "bits", True, ["bits", "True"]),
        ("gptq", "group_size", 128, ["shape", "expected"]),
        ("gptq", "bits", 8, ["shape", "expected"]),
    ],
)
def test_a_config_that_disagrees(tmp_path: Path, form: str, key: str, value: Any, words: list[str]) -> None:
    source = make_source(tmp_path / "in", form)
    source.config["quantization_config"][key] = value
    error = SourceError if "expected" in words or "shape" in words else ConfigError
    refuse(source.write(), tmp_path / "out", error, *words)


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"quant_method": "bitsandbytes"}, ["bitsandbytes", "Supported", "FP8", "AWQ"]),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, ["gemv", "Supported"]),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, ["marlin", "Supported"]),
        ({"quant_method": "gptq", "bits": 3, "group_size": 64}, ["GPTQ (bits 3)", "Supported"]),
        ({"quant_method": "awq", "bits": 8, "group_size": 64}, ["AWQ (bits 8)", "Supported"]),
        ({"quant_method": "fp8", "fmt": "e5m2"}, ["FP8 (fmt e5m2)", "Supported"]),
        ({"quant_method": "compressed-tensors", "config_groups": {"a": {}, "b": {}}}, ["2 config_groups", "Supported"]),
        ({"quant_method": "compressed-tensors", **PACKED_3_BIT}, ["(num_bits 3)", "Supported"]),
        ({"quant_method": "compressed-tensors", **PACKED_BY_TENSOR}, ["(strategy tensor)", "Supported"]),
    ],
)
def test_formats_that_are_not_there(tmp_path: Path, section: dict[str, Any], words: list[str]) -> None:
    source = make_source(tmp_path / "in", "fp8")
    source.config["quantization_config"] = section
    refuse(source.write(), tmp_path / "out", MlxqwenError, *words)


def test_a_config_that_does_not_speak_of_its_quantization(tmp_path: Path) -> None:
    for form in ("fp8", "awq", "gptq", "int4"):
        source = make_source(tmp_path / form, form)
        del source.config["quantization_config"]
        refuse(source.write(), tmp_path / "out", SourceError, "config.json")


def test_a_dtype_that_codes_do_not_have(tmp_path: Path) -> None:
    source = make_source(tmp_path / "in", "awq")
    _, array = source.stored[f"{UP}.qweight"]
    source.stored[f"{UP}.qweight"] = ("F32", array.view(np.float32))
    refuse(source.write(), tmp_path / "out", SourceError, "qweight", "F32", "I32")


def test_shapes_that_are_not_the_configs(tmp_path: Path) -> None:
    source = make_source(tmp_path / "in", "bf16", MOE)
    source.config["moe_intermediate_size"] = 64
    refuse(source.write(), tmp_path / "out", SourceError, "shape", "[64, 128]")
    source.config["moe_intermediate_size"], source.config["num_experts"] = 128, 9
    refuse(source.write(), tmp_path / "out", SourceError, "mlp.gate", "[9, 128]")
    source.config["num_experts"] = 8
    del source.stored["model.layers.1.mlp.experts.5.up_proj.weight"]
    refuse(source.write(), tmp_path / "out", SourceError, "missing", "layers.1.mlp.switch_mlp.up_proj[5]")


def test_tensors_that_have_no_place(tmp_path: Path) -> None:
    source = make_source(tmp_path / "in", "bf16")
    source.stored["model.visual.weight"] = source.stored["model.norm.weight"]
    refuse(source.write(), tmp_path / "out", SourceError, "no place", "model.visual.weight")


def test_a_shard_that_was_cut_short(tmp_path: Path) -> None:
    source = make_source(tmp_path / "in", "fp8").write(shards=2)
    path = source.folder / "model-00002-of-00002.safetensors"
    os.truncate(path, path.stat().st_size - 1)
    refuse(source, tmp_path / "out", CheckpointError, "truncated", path.name)


def test_a_source_that_changes_meanwhile(tmp_path: Path) -> None:
    source = make_source(tmp_path / "in", "bf16").write()
    path = source.folder / "model.safetensors"

    def touch(stage: str, done: int, total: int) -> None:
        os.utime(path, ns=(1, 1))

    refuse(source, tmp_path / "out", SourceChangedError, "changed", progress=touch)


def test_a_source_that_shrinks_meanwhile(tmp_path: Path) -> None:
    source = make_source(tmp_path / "in", "bf16").write()
    path = source.folder / "model.safetensors"

    def cut(stage: str, done: int, total: int) -> None:
        os.truncate(path, 100)

    refuse(source, tmp_path / "out", SourceChangedError, "model.safetensors", progress=cut, workers=1)


def test_a_width_that_groups_do_not_divide(tmp_path: Path) -> None:
    config = {**DENSE, "intermediate_size": 96}
    source = make_source(tmp_path / "in", "bf16", config).write()
    report = convert(source.folder, tmp_path / "out")
    section = json.loads((tmp_path / "out/config.json").read_text())["quantization"]
    for layer in range(2):
        path = f"model.layers.{layer}.mlp.down_proj"
        assert section[path] is False
        assert any(path in note and "unquantized" in note for note in report.notes)
    refuse(source, tmp_path / "strict", ConversionError, "down_proj", "96", "64", strict=True)


def test_mlx_folders_that_are_already_so(tmp_path: Path) -> None:
    source = make_source(tmp_path / "in", "bf16").write()
    convert(source.folder, tmp_path / "mlx", bits=4)
    same: list[dict[str, Any]] = [{}, {"bits": 4}, {"bits": 4, "group_size": 64}]
    for options in same:
        with pytest.raises(ConversionError, match="already MLX-quantized"):
            convert(tmp_path / "mlx", tmp_path / "out", **options)


def test_bfloat16_that_float16_cannot_hold(tmp_path: Path) -> None:
    source = make_source(tmp_path / "in", "bf16")
    _set("weight", (70, 3), 1e6)(source)
    refuse(source.write(), tmp_path / "out", ConversionError, UP, dtype="float16", bits=16)
    refuse(source, tmp_path / "out", ConversionError, UP, dtype="float16")


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"bits": 7}, "bits"),
        ({"bits": 0}, "bits"),
        ({"bits": 8.0}, "bits"),
        ({"bits": True}, "bits"),
        ({"group_size": 64.0}, "group_size"),
        ({"keep": "*.down_proj=8"}, "keep"),
        ({"keep": {"*.down_proj": None}}, "keep"),
        ({"keep": [("*.down_proj", 8, 8)]}, "keep"),
        ({"workers": 0}, "workers"),
        ({"group_size": 16}, "group_size"),
        ({"dtype": "int8"}, "dtype"),
        ({"lm_head_bits": 1}, "lm_head_bits"),
        ({"keep": {"*.q_proj": 9}}, "q_proj"),
        ({"keep": {"*.no_such": 8}}, "no_such"),
    ],
)
def test_options_that_make_no_sense(tmp_path: Path, options: dict[str, Any], word: str) -> None:
    source = make_source(tmp_path / "in", "bf16").write()
    refuse(source, tmp_path / "out", OptionError, word, **options)


def test_sources_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(HubError):
        convert(tmp_path / "nothing", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"config\.json"):
        convert(tmp_path / "empty", tmp_path / "out")
    source = make_source(tmp_path / "llama", "bf16")
    source.config["model_type"] = "llama"
    refuse(source.write(), tmp_path / "out", ConfigError, "llama")
    (tmp_path / "gguf").mkdir()
    (tmp_path / "gguf/config.json").write_text(json.dumps(DENSE))
    (tmp_path / "gguf/model.gguf").write_bytes(b"GGUF")
    with pytest.raises(UnsupportedFormatError, match="GGUF"):
        convert(tmp_path / "gguf", tmp_path / "out")


def test_a_partial_folder_that_is_someone_elses(tmp_path: Path) -> None:
    source = make_source(tmp_path / "in", "bf16").write()
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial/thesis.txt").write_text("all of it")
    for resume in (False, True):
        with pytest.raises(OutputError, match="in the way"):
            convert(source.folder, tmp_path / "out", resume=resume)
    assert (tmp_path / "out.partial/thesis.txt").read_text() == "all of it"


def test_resuming_something_else(tmp_path: Path) -> None:
    source = make_source(tmp_path / "in", "bf16").write()
    other = make_source(tmp_path / "other", "bf16").write()

    def stop(stage: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source.folder, tmp_path / "out", progress=stop)
    assert not (tmp_path / "out").exists()
    with pytest.raises(OutputError, match="--resume"):
        convert(source.folder, tmp_path / "out")
    with pytest.raises(ResumeError, match="begun with no options, found --bits 8\n"):
        convert(source.folder, tmp_path / "out", resume=True, bits=8)
    paths = f"begun from {source.folder.resolve()}, found {other.folder.resolve()}\n"
    with pytest.raises(ResumeError, match=re.escape(paths)):
        convert(other.folder, tmp_path / "out", resume=True)
    os.utime(source.folder / "model.safetensors", ns=(1, 1))
    with pytest.raises(ResumeError, match="changed since"):
        convert(source.folder, tmp_path / "out", resume=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("versions", {"mlxqwen": "0.0.1", "mlx": "0.9"}, "begun by mlxqwen 0.0.1 and mlx 0.9, found mlxqwen "),
        ("versions", 7, "begun by other versions, found mlxqwen "),
        ("source", None, "begun from another source, found /"),
        ("source", "\x1b[2J", "begun from \\x1b[2J, found /"),
        ("options", {"bits": 5}, "begun with --bits 5, found --bits 3 --quality\n"),
        ("options", {"rm": 5}, "begun with other options, found --bits 3 --quality\n"),
        ("options", [], "begun with other options, found --bits 3 --quality\n"),
        ("plan", {}, "changed since"),
    ],
)
def test_a_manifest_that_says_something_else(tmp_path: Path, key: str, value: Any, words: str) -> None:
    source = make_source(tmp_path / "in", "bf16").write()
    options: dict[str, Any] = {"bits": 3, "quality": True}

    def stop(stage: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source.folder, tmp_path / "out", progress=stop, **options)
    manifest = tmp_path / "out.partial/conversion.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), key: value}))
    with pytest.raises(ResumeError, match=re.escape(words)):
        convert(source.folder, tmp_path / "out", resume=True, **options)
