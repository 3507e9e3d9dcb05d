"""Names and shapes against the model itself; where the experts of each layout lie."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from make_checkpoint import SHAPES
from mlx.utils import tree_flatten

from mlxqwen.files.checkpoint import TensorInfo
from mlxqwen.files.config import ModelConfig
from mlxqwen.model.footprint import measure
from mlxqwen.model.qwen3 import Qwen3ForCausalLM
from mlxqwen_convert.names import Module, modules, parts_of
from tests.convert.checkpoints import DENSE, MOE, make_source

CONFIGS: list[dict[str, Any]] = [
    DENSE,
    {**DENSE, "tie_word_embeddings": True},
    MOE,
    {**MOE, "num_hidden_layers": 4, "decoder_sparse_step": 2},
    {**MOE, "num_hidden_layers": 3, "mlp_only_layers": [0, 2]},
]


@pytest.mark.parametrize("config", CONFIGS, ids=range(len(CONFIGS)))
def test_modules_are_those_of_the_model(config: dict[str, Any]) -> None:
    parsed = ModelConfig.from_dict(config)
    ours = {f"{module.path}.weight": module.shape for module in modules(parsed)}
    parameters: Any = Qwen3ForCausalLM(parsed).parameters()
    flat: Any = tree_flatten(parameters)
    assert ours == {name: tuple(array.shape) for name, array in flat}


@pytest.mark.parametrize("name", SHAPES)
def test_parameters_of_the_releases(name: str, tmp_path: Path) -> None:
    config = ModelConfig.from_dict(SHAPES[name])
    count = sum(module.parameters for module in modules(config))
    billions = {"235B-A22B": 235.1, "30B-A3B": 30.5, "32B": 32.8, "14B": 14.8, "8B": 8.2, "4B": 4.0, "1.7B": 1.7}
    expected = billions.get(name.removeprefix("Qwen3-"), 0.6)
    assert count / 1e9 == pytest.approx(expected, rel=0.02)


def tensor(name: str, shape: tuple[int, ...], start: int = 100, item: int = 2) -> TensorInfo:
    size = item
    for n in shape:
        size *= n
    return TensorInfo(name, "BF16", shape, Path("model.safetensors"), start, start + size)


def test_parts_of_fused_experts() -> None:
    module = Module("model.layers.0.mlp.switch_mlp.up_proj", "experts", (3, 4, 8))
    fused = tensor("model.layers.0.mlp.experts.gate_up_proj", (3, 8, 8))
    parts = parts_of(module, {"model.layers.0.mlp.experts": {"gate_up_proj": fused}})
    assert [(part["weight"].shape, part["weight"].start, part["weight"].nbytes) for part in parts] == [
        ((4, 8), 100 + 64 + 128 * expert, 64) for expert in range(3)
    ]


def test_parts_of_stacked_experts() -> None:
    module = Module("model.layers.0.mlp.switch_mlp.up_proj", "experts", (3, 4, 8))
    parts = parts_of(module, {module.path: {"weight": tensor(f"{module.path}.weight", (3, 4, 8))}})
    assert [(part["weight"].shape, part["weight"].start) for part in parts] == [
        ((4, 8), 100 + 64 * e) for e in range(3)
    ]


def test_parts_that_are_missing_are_empty() -> None:
    module = Module("model.layers.0.mlp.switch_mlp.up_proj", "experts", (3, 4, 8))
    assert parts_of(module, {}) == ({}, {}, {})


def test_the_plan_counts_as_the_footprint_does(tmp_path: Path) -> None:
    source = make_source(tmp_path / "in", "bf16", MOE).write()
    parsed = ModelConfig.from_dict(json.loads((source.folder / "config.json").read_text()))
    assert sum(module.parameters for module in modules(parsed)) == measure(source.folder).parameters
