"""Plans: what becomes of every module, sizes, layout, all before a weight is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxqwen.checkpoint import ITEM_BYTES, read_header
from mlxqwen_convert.layout import OutputTensor, lay_out
from mlxqwen_convert.plan import Options, Plan, make_plan
from tests.convert.checkpoints import DENSE, FORMATS, INTEGERS, MOE, make_source


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
