"""Whole conversions: every format to every target, against independent decoders and both loaders."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm.utils
import numpy as np
import pytest
from make_checkpoint import SHAPES, make_checkpoint

from mlxqwen.files.checkpoint import Checkpoint
from mlxqwen.files.hub import DEMO_FOLDER
from mlxqwen.model.loading import load_model
from mlxqwen_convert import affine, convert, tasks
from mlxqwen_convert.layout import lay_out
from mlxqwen_convert.plan import Options, make_plan
from tests.checkpoint_arrays import arrays_of
from tests.convert.checkpoints import DENSE, FORMATS, INTEGERS, MOE, VARIANTS, Source, make_source
from tests.convert.encoders import Floats, unpack_affine, unpack_words

MOE_DEMO = Path(__file__).resolve().parents[1] / "data" / "moe_demo"
TOKENS = [[3, 17, 90, 5, 41, 77, 2, 150]]


def arrays(folder: Path) -> dict[str, Any]:
    """NumPy arrays of a folder's tensors; BF16 widened."""
    found = {}
    for name, array in arrays_of(Checkpoint.open(folder)).items():
        found[name] = np.array(array.astype(mx.float32) if array.dtype == mx.bfloat16 else array)
    return found


def mlx_name(name: str) -> tuple[str, int | None]:
    """Where MLX keeps a published weight: its module, and which expert of it."""
    if ".experts." not in name:
        return name, None
    block, _, rest = name.partition(".experts.")
    expert, _, projection = rest.partition(".")
    return f"{block}.switch_mlp.{projection}", int(expert)


def restored(tensors: dict[str, Any], config: dict[str, Any], name: str) -> Floats:
    """A published weight as the output has it, by NumPy."""
    module, expert = mlx_name(name)
    words = {w: tensors[f"{module}.{w}"] for w in ("weight", "scales", "biases") if f"{module}.{w}" in tensors}
    if expert is not None:
        words = {word: array[expert] for word, array in words.items()}
    if "scales" not in words:
        return words["weight"].astype(np.float32)
    own = config["quantization"].get(module, config["quantization"])
    return unpack_affine(words["weight"], words["scales"], words["biases"], own["bits"])


def assert_both_loaders_agree(folder: Path) -> None:
    """The same logits by mlxqwen and by mlx-lm, both in float32."""
    ours = load_model(folder, dtype="float32")
    theirs, _ = mlx_lm.utils.load_model(folder)
    theirs.set_dtype(mx.float32)
    tokens = mx.array(TOKENS)
    mine, other = np.array(ours(tokens)), np.array(theirs(tokens))
    assert np.abs(mine - other).max() <= 1e-4 * np.abs(other).max()


@pytest.mark.parametrize("config", [DENSE, MOE], ids=["dense", "moe"])
@pytest.mark.parametrize("form", [*FORMATS, *VARIANTS])
def test_every_format_becomes_what_it_means(tmp_path: Path, form: str, config: dict[str, Any]) -> None:
    source = make_source(tmp_path / "in", form, config).write(shards=3)
    report = convert(source.folder, tmp_path / "out")
    tensors, written = arrays(tmp_path / "out"), json.loads((tmp_path / "out/config.json").read_text())
    bits = written["quantization"]["bits"]
    assert bits == (8 if "8" in form else 4)
    assert written["quantization_config"] == written["quantization"]
    assert written["torch_dtype"] == {"f32": "float32", "f16": "float16"}.get(
        form, "float16" if form in (*INTEGERS, *VARIANTS) else "bfloat16"
    )
    # a step of the coarsest grid, for what is quantized anew; the rounding of a bias for what is repacked
    limit = 2e-3 if form in (*INTEGERS, *VARIANTS) else 0.13 if bits == 4 else 0.01
    for name, meaning in source.meaning.items():
        found = restored(tensors, written, name)
        assert found.shape == meaning.shape
        error = np.linalg.norm(found - meaning) / np.linalg.norm(meaning)
        assert error <= limit, name
        if name in source.codes:
            module, expert = mlx_name(name)
            words = tensors[f"{module}.weight"] if expert is None else tensors[f"{module}.weight"][expert]
            assert np.array_equal(unpack_words(words, bits, meaning.shape[1]), source.codes[name].codes)
    assert report.verified
    assert_both_loaders_agree(tmp_path / "out")


@pytest.mark.parametrize("form", [*FORMATS, *VARIANTS])
def test_16_bits_in_float32_are_exact(tmp_path: Path, form: str) -> None:
    source = make_source(tmp_path / "in", form, MOE).write()
    report = convert(source.folder, tmp_path / "out", bits=16, dtype="float32")
    tensors, written = arrays(tmp_path / "out"), json.loads((tmp_path / "out/config.json").read_text())
    assert "quantization" not in written
    assert "quantization_config" not in written
    for name, meaning in source.meaning.items():
        assert np.array_equal(restored(tensors, written, name), meaning), name
    assert all(row.relative_error == 0 for row in report.kinds)


@pytest.mark.parametrize("bits", [8, 6, 5, 4, 3, 2])
def test_floats_never_lose_more_than_mlx_would(tmp_path: Path, bits: int) -> None:
    source = make_source(tmp_path / "in", "bf16").write()
    convert(source.folder, tmp_path / "out", bits=bits)
    tensors, written = arrays(tmp_path / "out"), json.loads((tmp_path / "out/config.json").read_text())
    for name, meaning in source.meaning.items():
        if meaning.ndim == 1:
            continue
        weight, scales, biases = mx.quantize(mx.array(meaning).astype(mx.bfloat16), group_size=64, bits=bits)
        scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
        theirs = mx.dequantize(weight, scales, biases, group_size=64, bits=bits)
        ours = np.linalg.norm(restored(tensors, written, name) - meaning)
        assert ours <= np.linalg.norm(np.array(theirs) - meaning) * (1 + 1e-6), name


@pytest.mark.parametrize("demo", [DEMO_FOLDER, MOE_DEMO], ids=["dense", "moe"])
@pytest.mark.parametrize("bits", [4, *(pytest.param(bits, marks=pytest.mark.slow) for bits in (8, 6, 5, 3, 2))])
def test_no_tensor_of_the_demo_loses_more_than_by_mlx_lm(tmp_path: Path, demo: Path, bits: int) -> None:
    mlx_lm.convert(str(demo), str(tmp_path / "theirs"), quantize=True, q_bits=bits, q_group_size=64)
    convert(demo, tmp_path / "ours", bits=bits)
    exact, sections, found = arrays(demo), [], []
    for folder in (tmp_path / "ours", tmp_path / "theirs"):
        sections.append(json.loads((folder / "config.json").read_text())["quantization"])
        found.append(arrays(folder))
    compared = 0
    for name in {name.removesuffix(".scales") for name in found[0] if name.endswith(".scales")}:
        if name.endswith(".mlp.gate"):
            continue  # never below 8 bits here, whatever is asked for
        errors = []
        meaning = exact_weight(exact, name)
        for section, tensors in zip(sections, found, strict=True):
            own = section.get(name, section)
            assert (own["bits"], own["group_size"]) == (bits, 64)
            words = (tensors[f"{name}.{word}"] for word in ("weight", "scales", "biases"))
            weight, scales, biases = (array.reshape(-1, array.shape[-1]) for array in words)
            errors.append(np.linalg.norm(unpack_affine(weight, scales, biases, bits).astype(np.float64) - meaning))
        assert errors[0] <= errors[1] * (1 + 1e-6), name
        compared += 1
    assert compared > 10


def exact_weight(tensors: dict[str, Any], name: str) -> Floats:
    """A module's weight in an unquantized checkpoint, experts one above the other."""
    if f"{name}.weight" in tensors:
        weight = tensors[f"{name}.weight"]
        return weight.reshape(-1, weight.shape[-1]).astype(np.float32)
    block, _, projection = name.partition(".switch_mlp.")
    experts = (f"{block}.experts.{expert}.{projection}.weight" for expert in range(1 << 10))
    return np.concatenate([tensors[expert] for expert in experts if expert in tensors]).astype(np.float32)


@pytest.mark.parametrize("form", ["awq", "gptq"])
@pytest.mark.parametrize("group_size", [32, 128])
def test_other_groups_are_repacked(tmp_path: Path, form: str, group_size: int) -> None:
    source = make_source(tmp_path / "in", form, group_size=group_size).write()
    convert(source.folder, tmp_path / "out")
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert written["quantization"]["group_size"] == group_size
    tensors = arrays(tmp_path / "out")
    for name, grouped in source.codes.items():
        assert np.array_equal(unpack_words(tensors[f"{name}.weight"], 4, grouped.codes.shape[1]), grouped.codes)
        assert np.array_equal(tensors[f"{name}.scales"], grouped.scales)


@pytest.mark.parametrize("form", ["gptq", "gptq8", "int4", "int8"])
def test_a_scale_for_each_row_is_repeated(tmp_path: Path, form: str) -> None:
    source = make_source(tmp_path / "in", form, MOE, group_size=-1).write()
    convert(source.folder, tmp_path / "out")
    tensors, written = arrays(tmp_path / "out"), json.loads((tmp_path / "out/config.json").read_text())
    assert written["quantization"]["group_size"] == 128
    for name, grouped in source.codes.items():
        module, expert = mlx_name(name)
        words = tensors[f"{module}.weight"] if expert is None else tensors[f"{module}.weight"][expert]
        bits = written["quantization"]["bits"]
        assert np.array_equal(unpack_words(words, bits, grouped.codes.shape[1]), grouped.codes)
        error = np.linalg.norm(restored(tensors, written, name) - source.meaning[name])
        assert error <= 2e-3 * np.linalg.norm(source.meaning[name])


def test_smaller_groups_repeat_the_scales(tmp_path: Path) -> None:
    source = make_source(tmp_path / "in", "awq", group_size=128).write()
    report = convert(source.folder, tmp_path / "out", group_size=32)
    tensors = arrays(tmp_path / "out")
    for name, grouped in source.codes.items():
        assert np.array_equal(tensors[f"{name}.scales"], np.repeat(grouped.scales, 4, axis=1))
        assert np.array_equal(unpack_words(tensors[f"{name}.weight"], 4, grouped.codes.shape[1]), grouped.codes)
    assert {row.method for row in report.kinds} == {"repack", "copy"}


def test_a_packed_router_keeps_its_codes_in_eight_bits(tmp_path: Path) -> None:
    source = make_source(tmp_path / "in", "awq", MOE, packed_router=True).write()
    convert(source.folder, tmp_path / "out")
    tensors, written = arrays(tmp_path / "out"), json.loads((tmp_path / "out/config.json").read_text())
    for layer in range(2):
        router = f"model.layers.{layer}.mlp.gate"
        assert written["quantization"][router] == {"group_size": 64, "bits": 8}
        codes = unpack_words(tensors[f"{router}.weight"], 8, 128)
        assert np.array_equal(codes, source.codes[router].codes)
    assert_both_loaders_agree(tmp_path / "out")


def test_integer_sources_at_other_bits_are_quantized_from_their_floats(tmp_path: Path) -> None:
    source = make_source(tmp_path / "in", "awq").write()
    report = convert(source.folder, tmp_path / "out", bits=8)
    tensors, written = arrays(tmp_path / "out"), json.loads((tmp_path / "out/config.json").read_text())
    for name in source.codes:
        meaning = source.meaning[name]
        error = np.linalg.norm(restored(tensors, written, name) - meaning) / np.linalg.norm(meaning)
        assert error < 0.01
    assert {row.method for row in report.kinds} == {"quantize", "copy"}


def test_act_order_is_quantized_again_and_says_so(tmp_path: Path) -> None:
    source = make_source(tmp_path / "in", "gptq")
    name = "model.layers.0.mlp.up_proj"
    order = np.random.default_rng(1).permutation(128)
    groups = (np.arange(128) // 64)[order]
    from tests.convert import encoders
    from tests.convert.checkpoints import numbers

    grouped = encoders.quantize_grouped(numbers(name, (256, 128)), 4, 64, groups=groups)
    grouped = encoders.Grouped(grouped.codes, np.maximum(grouped.zeros, 1), grouped.scales, grouped.groups)
    for word, array in encoders.encode_gptq(grouped, 4).items():
        source.stored[f"{name}.{word}"] = (source.stored[f"{name}.{word}"][0], array)
    source.write()
    report = convert(source.folder, tmp_path / "out")
    assert any("act-order" in note for note in report.notes)
    assert report.modules[name]["method"] == "quantize"
    tensors, written = arrays(tmp_path / "out"), json.loads((tmp_path / "out/config.json").read_text())
    error = np.linalg.norm(restored(tensors, written, name) - grouped.weight) / np.linalg.norm(grouped.weight)
    assert error < 0.13


def test_overrides_reach_both_loaders(tmp_path: Path) -> None:
    source = make_source(tmp_path / "in", "bf16", MOE).write()
    convert(
        source.folder,
        tmp_path / "out",
        bits=3,
        keep={"*.down_proj": 8, "*.0.self_attn.*": 16, "*.mlp.gate": 2},
        lm_head_bits=6,
        embed_bits=5,
    )
    section = json.loads((tmp_path / "out/config.json").read_text())["quantization"]
    assert section["lm_head"]["bits"] == 6
    assert section["model.embed_tokens"]["bits"] == 5
    assert section["model.layers.1.mlp.switch_mlp.down_proj"]["bits"] == 8
    assert section["model.layers.0.self_attn.q_proj"] is False
    assert section["model.layers.0.mlp.gate"]["bits"] == 8, "the router is never below 8 bits"
    assert_both_loaders_agree(tmp_path / "out")


def test_fused_experts_are_the_same_as_separate_ones(tmp_path: Path) -> None:
    separate = make_source(tmp_path / "in", "bf16", MOE).write()
    fused = Source(tmp_path / "fused", separate.config, {})
    for name, stored in separate.stored.items():
        if ".experts." not in name:
            fused.stored[name] = stored
    for layer in range(2):
        at = f"model.layers.{layer}.mlp.experts"
        words = {
            p: np.stack([separate.stored[f"{at}.{e}.{p}.weight"][1] for e in range(8)])
            for p in ("gate_proj", "up_proj", "down_proj")
        }
        fused.stored[f"{at}.gate_up_proj"] = ("BF16", np.concatenate([words["gate_proj"], words["up_proj"]], axis=1))
        fused.stored[f"{at}.down_proj"] = ("BF16", words["down_proj"])
    fused.write()
    convert(separate.folder, tmp_path / "a")
    convert(fused.folder, tmp_path / "b")
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


def test_mlx_folders_are_quantized_again(tmp_path: Path) -> None:
    source = make_source(tmp_path / "in", "bf16", MOE).write()
    convert(source.folder, tmp_path / "eight", bits=8)
    report = convert(tmp_path / "eight", tmp_path / "four", bits=4)
    assert report.source_format == "MLX 8-bit"
    assert_both_loaders_agree(tmp_path / "four")


def test_mlx_codes_move_to_smaller_groups(tmp_path: Path) -> None:
    source = make_source(tmp_path / "in", "bf16").write()
    convert(source.folder, tmp_path / "a")
    report = convert(tmp_path / "a", tmp_path / "b", group_size=32)
    assert {row.method for row in report.kinds} == {"repack", "copy"}
    one, other = arrays(tmp_path / "a"), arrays(tmp_path / "b")
    assert all(np.array_equal(one[name], other[name]) for name in one if name.endswith(".weight"))
    assert_both_loaders_agree(tmp_path / "b")


def test_the_callers_cache_limit_is_left_as_it_was(tmp_path: Path) -> None:
    source = make_source(tmp_path / "in", "bf16").write()
    before = mx.set_cache_limit(12_345_678)
    try:
        convert(source.folder, tmp_path / "out")
        assert mx.set_cache_limit(12_345_678) == 12_345_678
    finally:
        mx.set_cache_limit(before)


def test_searching_for_scales_helps(tmp_path: Path) -> None:
    source = make_source(tmp_path / "in", "bf16").write()
    plain = convert(source.folder, tmp_path / "plain", bits=3)
    better = convert(source.folder, tmp_path / "better", bits=3, quality=True)
    for name, facts in plain.modules.items():
        if facts["method"] == "quantize":
            assert better.modules[name]["relative_error"] < facts["relative_error"], name


@pytest.mark.parametrize("bits", [8, 6, 5, 4, 3, 2])
@pytest.mark.parametrize("demo", [DEMO_FOLDER, MOE_DEMO], ids=["dense", "moe"])
def test_the_demo_models_in_both_loaders(tmp_path: Path, demo: Path, bits: int) -> None:
    report = convert(demo, tmp_path / "out", bits=bits)
    assert_both_loaders_agree(tmp_path / "out")
    routers = [row.target for row in report.kinds if row.kind == "router"]
    assert routers == (["8-bit g64"] if demo == MOE_DEMO else [])
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (demo / name).read_bytes()


@pytest.mark.parametrize("equal", [True, False])
def test_a_head_that_is_there_though_tied(tmp_path: Path, equal: bool) -> None:
    source = make_source(tmp_path / "in", "bf16", {**DENSE, "tie_word_embeddings": True})
    dtype, embeddings = source.stored["model.embed_tokens.weight"]
    head = embeddings.copy()
    if not equal:
        head[100, 100] ^= 1
    source.stored["lm_head.weight"] = (dtype, head)
    source.write()
    report = convert(source.folder, tmp_path / "out")
    assert any(("equals" if equal else "differs") in note for note in report.notes)
    assert not any(name.startswith("lm_head") for name in Checkpoint.open(tmp_path / "out").tensors)


def test_what_is_copied_and_what_never_is(tmp_path: Path) -> None:
    source = make_source(tmp_path / "in", "bf16")
    source.config["auto_map"] = {"AutoModel": "modeling_evil.Model"}
    source.write()
    convert(source.folder, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "LICENSE",
        "README.md",
        "config.json",
        "conversion_report.json",
        "generation_config.json",
        "model.safetensors",
        "model.safetensors.index.json",
        "tokenizer_config.json",
    ]
    assert "auto_map" not in (tmp_path / "out/config.json").read_text()
    assert json.loads((tmp_path / "out/tokenizer_config.json").read_text()) == {"eos_token": "</s>"}


def test_shards_are_bounded_and_loaders_follow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_source(tmp_path / "in", "bf16", MOE).write()
    convert(source.folder, tmp_path / "one")
    monkeypatch.setattr("mlxqwen_convert.plan.lay_out", lambda tensors, _: lay_out(tensors, 200_000))
    convert(source.folder, tmp_path / "many")
    shards = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(shards) > 2
    assert all(path.stat().st_size < 260_000 for path in shards)
    one, many = arrays(tmp_path / "one"), arrays(tmp_path / "many")
    assert one.keys() == many.keys()
    assert all(np.array_equal(one[name], many[name]) for name in one)
    assert_both_loaders_agree(tmp_path / "many")


@pytest.mark.parametrize(("form", "workers"), [("gptq", 1), ("awq", 2), ("bf16", 5), ("gptq", 16), ("fp8", 16)])
def test_the_number_of_workers_changes_nothing(
    tmp_path: Path, form: str, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlxqwen_convert.tasks.WEIGHTS_PER_TASK", 8192)
    monkeypatch.setattr("mlxqwen_convert.conversion.weights_in_flight", lambda plan: 16384)
    source = make_source(tmp_path / "in", form, MOE).write()
    convert(source.folder, tmp_path / "a", workers=workers)
    monkeypatch.undo()
    convert(source.folder, tmp_path / "b", workers=1)
    for path in (tmp_path / "a").iterdir():
        if path.name not in ("README.md",):
            assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


def test_workers_for_all_cores_up_to_sixteen(monkeypatch: pytest.MonkeyPatch) -> None:
    for cores, workers in ((1, 1), (12, 12), (16, 16), (64, 16)):
        monkeypatch.setattr("sys.platform", "darwin")
        monkeypatch.setattr("os.cpu_count", lambda cores=cores: cores)
        assert tasks.cores() == workers
        monkeypatch.setattr("sys.platform", "linux")
        monkeypatch.setattr(tasks, "usable_cores", lambda cores=cores: cores)
        assert tasks.cores() == workers


def test_a_plan_writes_nothing_and_foretells_the_size(tmp_path: Path) -> None:
    source = make_source(tmp_path / "in", "fp8", MOE).write()
    before = sorted(source.folder.iterdir())
    report = convert(source.folder, tmp_path / "out", dry_run=True)
    assert not report.output
    assert list(tmp_path.iterdir()) == [source.folder]
    assert sorted(source.folder.iterdir()) == before
    plan = make_plan(source.folder, Options())
    assert plan.target_bytes == report.target_bytes
    convert(source.folder, tmp_path / "out")
    assert (tmp_path / "out/model.safetensors").stat().st_size == plan.target_bytes


def _peak_of(source: Path, output: Path, *options: str) -> int:
    """Bytes that a whole `mlxqwen convert` held at most. A child counts what its parent held: that one is small."""
    code = (
        "import os, subprocess, sys\n"
        "process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)\n"
        "_, status, usage = os.wait4(process.pid, 0)\n"
        "print(status, usage.ru_maxrss * (1 if sys.platform == 'darwin' else 1024))\n"
    )
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), str(root / "convert")])}
    command = [sys.executable, "-m", "mlxqwen", "convert", str(source), str(output), *options]
    run = [sys.executable, "-c", code, *command]
    status, peak = subprocess.run(run, env=environment, capture_output=True, text=True, check=True).stdout.split()
    assert status == "0"
    return int(peak)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "sizes", "form"),
    [
        ("Qwen3-0.6B", {"num_hidden_layers": 2, "vocab_size": 49_152}, "bf16"),
        ("Qwen3-4B", {"num_hidden_layers": 1, "vocab_size": 16_384}, "gptq"),
        ("Qwen3-30B-A3B", {"num_hidden_layers": 1, "num_experts": 20, "vocab_size": 8_192}, "fp8"),
    ],
)
def test_memory_does_not_depend_on_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: str, sizes: dict[str, int], form: str
) -> None:
    monkeypatch.setitem(SHAPES, shape, {**SHAPES[shape], **sizes})
    make_checkpoint(tmp_path / "in", shape, form=form, holes=True)  # drawing numbers takes several times the conversion
    weights = sum(path.stat().st_size for path in (tmp_path / "in").glob("*.safetensors"))
    peak = _peak_of(tmp_path / "in", tmp_path / "out")
    shutil.rmtree(tmp_path / "in")
    shutil.rmtree(tmp_path / "out")
    assert peak <= 96 << 20 < weights


@pytest.mark.parametrize("bits", [4, 8])
def test_every_block_of_a_chunk_is_read_where_it_lies(tmp_path: Path, bits: int) -> None:
    """A matrix of many chunks and blocks, quantized by NumPy, beside MLX's codes of the whole."""
    source = make_source(tmp_path / "in", "bf16", {**DENSE, "vocab_size": 20_000}).write()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mlxqwen_convert.bfloat16._WEIGHTS_PER_BLOCK", 1 << 13)
        patch.setattr("mlxqwen_convert.pipeline._LARGEST_NUMPY_CHUNK", 1 << 16)
        convert(source.folder, tmp_path / "out", bits=bits, workers=2)
    tensors = mx.load(str(tmp_path / "out/model.safetensors"))
    assert isinstance(tensors, dict)
    for name in ("model.embed_tokens", "lm_head"):
        weight = mx.array(source.meaning[name]).astype(mx.bfloat16)
        for word, expected in affine.quantize(weight, 64, bits, mx.bfloat16)._asdict().items():
            assert mx.array_equal(tensors[f"{name}.{word}"], expected), (name, word)
