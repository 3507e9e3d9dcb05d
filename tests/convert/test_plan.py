"""Plans: what becomes of every module, sizes, layout, all before a weight is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxqwen.errors import OptionError
from mlxqwen.files.checkpoint import ITEM_BYTES, read_header
from mlxqwen_convert.layout import OutputTensor, lay_out
from mlxqwen_convert.plan import Options, Plan, make_plan
from tests.convert.checkpoints import DENSE, FORMATS, INTEGERS, MOE, make_source, plain_tensor


def plan_of(tmp_path: Path, form: str, config: dict[str, Any] = DENSE, **options: Any) -> Plan:
    return make_plan(make_source(tmp_path / "in", form, config).write().folder, Options(**options))


@pytest.mark.parametrize("form", FORMATS)
def test_defaults(tmp_path: Path, form: str) -> None:
    plan = plan_of(tmp_path, form, MOE)
    bits = 4 if form in ("bf16", "f16", "f32", "awq", "gptq", "int4") else 8
    assert plan.target is not None
    assert plan.target.bits == bits
    assert plan.dtype == {"f16": "F16", "f32": "F32"}.get(form, "F16" if form in INTEGERS else "BF16")
    methods = {entry.module.kind: entry.method for entry in plan.modules}
    assert methods["norms"] == "copy"
    assert methods["experts"] == ("repack" if form in INTEGERS else "quantize")
    assert methods["embeddings"] == ("copy" if form in INTEGERS else "quantize")


def test_the_last_glob_counts(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, "bf16", keep=(("*.down_proj", 8), ("model.layers.0.*", 6)), embed_bits=5)
    targets = {entry.module.path: entry.target and entry.target.bits for entry in plan.modules}
    assert targets["model.layers.0.mlp.down_proj"] == 6
    assert targets["model.layers.1.mlp.down_proj"] == 8
    assert targets["model.layers.1.mlp.up_proj"] == 4
    assert targets["model.embed_tokens"] == 5
    assert targets["model.layers.0.input_layernorm"] is None


def test_the_router_is_never_below_eight_bits(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, "bf16", MOE, bits=2, keep=(("*.gate", 3),))
    routers = [entry for entry in plan.modules if entry.module.kind == "router"]
    assert len(routers) == 2
    assert all(entry.target is not None and entry.target.bits == 8 for entry in routers)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("bits", [None, 16, 3])
def test_heads_are_sound_files(tmp_path: Path, form: str, bits: int | None) -> None:
    plan = plan_of(tmp_path, form, MOE, bits=bits)
    for shard in plan.shards:
        path = tmp_path / shard.name
        with path.open("wb") as file:
            file.write(shard.head)
            file.truncate(shard.size)
        tensors, metadata = read_header(path)
        assert metadata == {"format": "mlx"}
        assert {t.name: (t.dtype, t.shape, t.start) for t in tensors.values()} == {
            t.name: (t.dtype, t.shape, t.start) for t in shard.tensors
        }
        assert all(t.start % ITEM_BYTES[t.dtype] == 0 for t in tensors.values())


def test_fingerprints_tell_options_apart(tmp_path: Path) -> None:
    folder = make_source(tmp_path / "in", "bf16").write().folder
    prints = [
        json.dumps(make_plan(folder, options).fingerprint({}), sort_keys=True)
        for options in (Options(), Options(bits=8), Options(quality=True), Options(keep=(("*.q_proj", 8),)))
    ]
    assert len(set(prints)) == len(prints)
    assert prints[0] == json.dumps(make_plan(folder, Options()).fingerprint({}), sort_keys=True)


@pytest.mark.parametrize("form", ["awq", "gptq", "int4"])
def test_groups_that_mlx_lacks_are_quantized_again_and_it_says_so(tmp_path: Path, form: str) -> None:
    plan = make_plan(make_source(tmp_path / "in", form, group_size=16).write().folder, Options())
    again = [note for note in plan.notes if "quantized again to 4 bits, groups of 64" in note]
    assert len(again) == 1
    assert "groups of 16" in again[0]
    assert {entry.method for entry in plan.modules if entry.module.kind == "mlp"} == {"quantize"}


@pytest.mark.parametrize("options", [{"bits": 8}, {"group_size": 128}])
def test_codes_that_cannot_be_kept_as_asked(tmp_path: Path, options: dict[str, Any]) -> None:
    assert sum("quantized again" in note for note in plan_of(tmp_path, "awq", **options).notes) == 1


@pytest.mark.parametrize("options", [{}, {"group_size": 32}, {"bits": 16}])
def test_codes_that_are_kept_need_no_word(tmp_path: Path, options: dict[str, Any]) -> None:
    assert not any("quantized again" in note for note in plan_of(tmp_path, "awq", **options).notes)


@pytest.mark.parametrize(
    ("form", "scales", "dtype"),
    [
        ("int4", "BF16", "BF16"),
        ("int8", "BF16", "BF16"),
        ("int4", "F32", "F16"),
        ("int4", "F16", "F16"),
        ("int4-asymmetric", "BF16", "F16"),
        ("gptq", "BF16", "F16"),
        ("awq", "F32", "F16"),
    ],
)
def test_the_dtype_that_loses_nothing(tmp_path: Path, form: str, scales: str, dtype: str) -> None:
    source = make_source(tmp_path / "in", form)
    for name, (_, array) in source.stored.items():
        if name.endswith(("_scale", ".scales")):
            source.stored[name] = plain_tensor(array.astype(np.float32), scales)[0]
    plan = make_plan(source.write().folder, Options())
    assert plan.dtype == dtype


@pytest.mark.parametrize(
    ("form", "options", "expected"),
    [
        ("gptq", {"quality": True}, ["--quality has no effect: the source's codes are kept as they are"]),
        ("gptq", {"quality": True, "embed_bits": 8}, []),
        ("gptq", {"quality": True, "bits": 3}, []),
        ("bf16", {"quality": True, "group_size": 32}, []),
        ("fp8", {"quality": True, "bits": 16}, ["--quality has no effect: nothing is quantized"]),
        ("fp8", {"group_size": 32, "bits": 16}, ["--group-size has no effect: nothing is quantized"]),
        ("fp8", {"quality": True, "group_size": 32, "bits": 16, "keep": (("*.down_proj", 4),)}, []),
        ("awq", {"group_size": 32}, []),
        ("awq", {}, []),
    ],
)
def test_options_without_effect_are_told(
    tmp_path: Path, form: str, options: dict[str, Any], expected: list[str]
) -> None:
    notes = plan_of(tmp_path, form, **options).notes
    assert [note for note in notes if "no effect" in note] == expected


def test_bits_for_a_head_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"(?s)lm_head_bits.*no head of its own.*\nUse embed_bits \(--embed-bits\)"):
        plan_of(tmp_path / "one", "bf16", {**DENSE, "tie_word_embeddings": True}, lm_head_bits=8)
    with pytest.raises(OptionError, match=r"(?s)lm_head_bits.*no head of its own.*\nLeave it out\."):
        plan_of(tmp_path / "both", "bf16", {**DENSE, "tie_word_embeddings": True}, lm_head_bits=8, embed_bits=8)


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="counts what the system read")
@pytest.mark.parametrize("form", ["bf16", "fp8", "gptq", "int4"])
def test_a_plan_reads_no_weights(tmp_path: Path, form: str) -> None:
    config = {**DENSE, "hidden_size": 512, "intermediate_size": 2048}
    source = make_source(tmp_path / "in", form, config).write(shards=3)
    weights = sum(path.stat().st_size for path in source.folder.glob("*.safetensors"))
    make_plan(source.folder, Options())  # what is imported is read only once
    before = bytes_read()
    plan = make_plan(source.folder, Options())
    # beside headers and config, an order of inputs for each module of GPTQ
    assert bytes_read() - before < min(weights // 20, 200_000)
    assert plan.source_bytes > 2_000_000


def bytes_read() -> int:
    """What this process has read so far, from disk or from the system's cache."""
    return int(Path("/proc/self/io").read_text().split()[1])


TENSOR = st.tuples(st.sampled_from(["U32", "F32", "BF16", "F16"]), st.integers(1, 40))
SIZES = st.lists(st.lists(TENSOR, min_size=1, max_size=3), min_size=1, max_size=20)


@given(SIZES, st.integers(1, 400))
def test_any_layout_fills_its_files(sizes: list[list[tuple[str, int]]], limit: int) -> None:
    groups = [
        [OutputTensor(f"{module}.{number}", dtype, (count,)) for number, (dtype, count) in enumerate(tensors)]
        for module, tensors in enumerate(sizes)
    ]
    shards = lay_out(groups, limit)
    assert sorted(t.name for shard in shards for t in shard.tensors) == sorted(t.name for g in groups for t in g)
    for number, shard in enumerate(shards):
        position = len(shard.head)
        for tensor in shard.tensors:
            assert tensor.shard == number
            assert tensor.start == position
            assert tensor.start % ITEM_BYTES[tensor.dtype] == 0
            position += tensor.nbytes
        assert position == shard.size
        modules = {tensor.name.partition(".")[0] for tensor in shard.tensors}
        assert len(modules) == 1 or position - len(shard.head) <= limit
