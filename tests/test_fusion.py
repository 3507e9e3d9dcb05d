"""A fused model, and one whose decode steps are compiled as on a GPU, are the plain one in fewer primitives."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from benchmarks.primitives import compare, count_primitives, ours, single_nodes, write_model
from mlx.utils import tree_flatten, tree_map
from numpy.typing import NDArray

from mlxqwen.cache import KVCache, make_cache
from mlxqwen.device import Device, current_device
from mlxqwen.engine.token_stream import generate_tokens
from mlxqwen.files.config import ModelConfig
from mlxqwen.model.footprint import measure
from mlxqwen.model.linear import FusedLinear, fuse_children
from mlxqwen.model.loading import load_model, prepare_model
from mlxqwen.model.mlp import MLP
from mlxqwen.model.qwen3 import Qwen3ForCausalLM
from mlxqwen.sampling.params import SamplingParams
from tests.tiny_checkpoints import (
    DENSE,
    GOLDEN_MODELS,
    MOE,
    Config,
    make_weights,
    prompt,
    published_shapes,
    write_folder,
)
from tests.tolerance import assert_close, worst

CPU = Device("a CPU", is_gpu=False, memory=1 << 34, usable_memory=1 << 34)
GPU = Device("a GPU", is_gpu=True, memory=1 << 34, usable_memory=1 << 34)
can_compile = pytest.mark.skipif(
    not current_device().is_gpu and shutil.which("g++") is None,
    reason="compiled decoding is NOT TESTED: on a CPU, MLX compiles with g++, which is not installed",
)

WIDE: Config = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 32, "vocab_size": 96}
WIDE_DENSE: Config = {**DENSE, **WIDE, "num_hidden_layers": 3}
WIDE_MOE: Config = {**MOE, **WIDE, "moe_intermediate_size": 64}
Section = dict[str, Any]
FOUR_BITS: Section = {"group_size": 32, "bits": 4}
MIXED: Section = {
    **FOUR_BITS,
    "model.layers.0.self_attn.v_proj": {"group_size": 32, "bits": 8},
    "model.layers.1.mlp.gate_proj": {"group_size": 64, "bits": 4},
    "model.layers.1.mlp.switch_mlp.up_proj": {"group_size": 32, "bits": 6},
    "model.layers.1.self_attn.q_proj": False,
    "lm_head": False,
}
MODELS: dict[str, tuple[Config, Section | None]] = {
    "dense, tied": (WIDE_DENSE, None),
    "untied, multi-query, odd heads": (GOLDEN_MODELS["untied, multi-query, odd heads"][0], None),
    "MoE": (WIDE_MOE, None),
    "MoE every second layer": (GOLDEN_MODELS["moe every second layer"][0], None),
    "dense, one layer": ({**DENSE, "num_hidden_layers": 1}, None),
    "dense, quantized": (WIDE_DENSE, FOUR_BITS),
    "MoE, quantized": (WIDE_MOE, FOUR_BITS),
    "dense, mixed": (WIDE_DENSE, MIXED),
    "MoE, mixed": (WIDE_MOE, MIXED),
}


def folder_of(folder: Path, config: Config, section: Section | None = None) -> Path:
    """Random weights, quantized as a section of `config.json` says."""
    if section is None:
        return write_folder(folder, config, make_weights(config))
    weights: dict[str, NDArray[Any]] = {}
    for name, array in make_weights(config, experts="stacked").items():
        module = name.removesuffix(".weight")
        how = section.get(module, FOUR_BITS)
        if array.ndim == 1 or how is False:
            weights[name] = array
            continue
        parts = mx.quantize(mx.array(array), group_size=how["group_size"], bits=how["bits"])
        names = (name, f"{module}.scales", f"{module}.biases")
        weights |= {part: np.array(numbers) for part, numbers in zip(names, parts, strict=True)}
    return write_folder(folder, {**config, "quantization": section}, weights)


CACHES: dict[str, Callable[[Qwen3ForCausalLM, int], KVCache]] = {
    "linear": lambda model, rows: make_cache(model, batch_size=rows),
    "ring": lambda model, rows: make_cache(model, batch_size=rows, max_kv_size=12, keep=2),
    "quantized": lambda model, rows: make_cache(model, batch_size=rows, kv_bits=8, kv_group_size=32),
}


def logits_in_steps(model: Qwen3ForCausalLM, cache: KVCache, ids: mx.array) -> mx.array:
    """A prompt in two chunks, then token by token."""
    cuts = [0, 7, 15, *range(16, ids.shape[1] + 1)]
    pieces = [model(ids[:, start:stop], cache) for start, stop in pairwise(cuts)]
    return mx.concatenate(pieces, axis=1)


@can_compile
@pytest.mark.parametrize("name", MODELS)
def test_plain_fused_and_compiled_models_are_one(tmp_path: Path, name: str) -> None:
    folder = folder_of(tmp_path, *MODELS[name])
    plain = load_model(folder, device=CPU, fused=False)
    others = [load_model(folder, device=CPU), load_model(folder, device=GPU, dtype="float32")]
    ids = mx.array([prompt(20, 96, seed) for seed in range(3)])
    expected = plain(ids)
    for model in others:
        assert_close(model(ids), expected)
    for kind, make in CACHES.items():
        if kind == "quantized" and plain.config.head_dim % 32:
            continue
        for rows in (1, 3):
            expected = logits_in_steps(plain, make(plain, rows), ids[:rows])
            for model in others:
                assert_close(
                    logits_in_steps(model, make(model, rows), ids[:rows]), expected, what=f"{kind}, {rows} rows"
                )


@pytest.mark.parametrize("name", MODELS)
def test_queries_and_keys_that_are_normed_and_rotated_together_are_the_same_to_the_last_bit(
    tmp_path: Path, name: str
) -> None:
    model = load_model(folder_of(tmp_path, *MODELS[name]), device=CPU)
    ids = mx.array([prompt(20, 96, seed) for seed in range(3)])
    found = []
    for together in (True, False):
        for layer in model.layers:
            assert layer.self_attn.joins_heads
            layer.self_attn.joins_heads = together
        found.append(logits_in_steps(model, make_cache(model, batch_size=3), ids))
        for layer in model.layers:
            layer.self_attn.joins_heads = True
    assert mx.array_equal(found[0], found[1])


def test_layers_share_the_angles_of_a_step_on_a_cpu(tmp_path: Path) -> None:
    """MLX's own rotation is spelled out there, and would find them twice a layer."""
    model = load_model(folder_of(tmp_path, WIDE_DENSE), device=CPU)
    cache = make_cache(model, batch_size=2)
    mx.eval(model(mx.array([[1, 2, 3], [4, 5, 6]]), cache, lengths=[3, 2]), cache.state)
    model.model.begins_layers = False  # else the graph of the last layer alone is left
    logits = model.model(mx.array([[7], [8]]), cache)
    counts = count_primitives([logits, *cache.state])
    assert (counts["Cos"], counts["Sin"]) == (1, 1)
    assert counts["Rsqrt"] == 3 * len(model.layers) + 1


@pytest.mark.parametrize("device", [CPU, GPU], ids=["CPU", "GPU"])
def test_a_cpu_begins_a_layer_before_the_next_one_is_described(
    tmp_path: Path, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(folder_of(tmp_path, WIDE_DENSE), device=device)
    model.model.decoder = None
    cache, ids, begun = make_cache(model), mx.array([prompt(9, 96)]), list[tuple[int, ...]]()
    expected = [model(ids[:, :8], cache), model(ids[:, 8:], cache)]
    async_eval = mx.async_eval

    def recorded(*arrays: Any) -> None:
        begun.append(arrays[0].shape)
        async_eval(*arrays)

    monkeypatch.setattr(mx, "async_eval", recorded)
    model(ids)  # without a cache, as in training, nothing is evaluated
    assert begun == []
    cache = make_cache(model)
    for part, logits in zip((ids[:, :8], ids[:, 8:]), expected, strict=True):
        assert mx.array_equal(model(part, cache), logits)
    assert begun == ([] if device.is_gpu else [(8, 64)] * 2 + [(1, 64)] * 2)


@can_compile
@pytest.mark.parametrize("name", MODELS)
def test_greedy_tokens_are_the_same(tmp_path: Path, name: str) -> None:
    """Of rows of unequal length, one of which ends early: the others go on in a smaller batch."""
    folder = folder_of(tmp_path, *MODELS[name])
    found = []
    for options in ({"fused": False, "device": CPU}, {"device": CPU}, {"device": GPU, "dtype": "float32"}):
        model = load_model(folder, **options)
        stream = generate_tokens(
            model,
            [prompt(9, 96), prompt(4, 96), prompt(12, 96)],
            sampling=SamplingParams(temperature=0),
            max_tokens=[12, 3, 12],
            eos_token_ids=(),
        )
        found.append([(row, step.token) for row, step in stream])
    assert found[0] == found[1] == found[2]


def halved(model: nn.Module) -> Any:
    """Its parameters, half as large; packed codes stay."""
    return tree_map(lambda a: a if a.dtype == mx.uint32 else a / 2, model.parameters())


class Adapter(nn.Module):
    """A linear map, and a small one beside it, as LoRA has them."""

    def __init__(self, linear: nn.Module, inputs: int, outputs: int, scale: float) -> None:
        super().__init__()
        self.linear, self.scale = linear, scale
        self.down, self.up = (mx.random.normal(shape, key=mx.random.key(1)) for shape in ((inputs, 2), (2, outputs)))

    def __call__(self, x: mx.array) -> mx.array:
        return self.linear(x) + self.scale * ((x @ self.down) @ self.up)


def adapt(model: Qwen3ForCausalLM) -> None:
    """With the same arrays, but for their numbers, in two layers, and another factor in each."""
    for layer, scale in ((1, 0.02), (2, -0.1)):
        attention: nn.Module = model.model.layers[layer].self_attn
        attention.o_proj = Adapter(attention.o_proj, 4 * 32, 64, scale)


def adapt_and_train(model: Qwen3ForCausalLM) -> None:
    """An adapter that was used changes."""
    adapt(model)
    mx.eval(model(mx.array([[9]]), make_cache(model)))
    model.model.layers[2].self_attn.o_proj.up = mx.ones((2, 64))


def rescale_adapter(model: Qwen3ForCausalLM) -> None:
    """An adapter that was used gets another factor, which nothing watches."""
    adapt_and_train(model)
    attention = model.model.layers[2].self_attn
    attention.o_proj.scale = 0.3
    attention.o_proj = attention.o_proj


def replace_embeddings(model: Qwen3ForCausalLM) -> None:
    """By others, which also give the logits."""
    embeddings = nn.Embedding(model.config.vocab_size, 64)
    embeddings.weight = mx.random.normal((model.config.vocab_size, 64), key=mx.random.key(3))
    model.model.embed_tokens = embeddings


def replace_deep_down(model: Qwen3ForCausalLM) -> None:
    """A module of a module of a layer."""
    down: nn.Module = nn.Linear(128, 64, bias=False)
    down.weight = mx.random.normal((64, 128), key=mx.random.key(2)) * 0.1
    model.model.layers[0].mlp.down_proj = down


def train_compiled(model: Qwen3ForCausalLM) -> None:
    """As MLX's examples do: the function's state is read and written by `mx.compile`, past all that modules define."""
    state = model.state

    def step() -> None:
        model.update(halved(model))

    mx.compile(step, inputs=state, outputs=state)()


def change_in_place(model: Qwen3ForCausalLM) -> None:
    """Some numbers of arrays that stay what they are."""
    model.model.layers[2].mlp.down_proj.weight[3:9] = 0
    model.model.layers[1].self_attn.k_norm.weight[5] = 7.0


CHANGES: dict[str, Callable[[Qwen3ForCausalLM], object]] = {
    "numbers in place": change_in_place,
    "an item of a module": lambda model: model.model.layers[1].mlp.update(
        {"down_proj": halved(model)["model"]["layers"][1]["mlp"]["down_proj"]}
    ),
    "a compiled step of training": train_compiled,
    "adapters": adapt,
    "adapters that go on changing": adapt_and_train,
    "a module of a module": replace_deep_down,
    "a setting": lambda model: setattr(model.model.layers[1].mlp, "swiglu", lambda gate, up: gate + up),
    "layers in another order": lambda model: model.model.layers.reverse(),
    "another list of layers": lambda model: setattr(model.model, "layers", model.model.layers[::-1]),
    "update": lambda model: model.update(halved(model)),
    "update of a layer": lambda model: model.model.layers[1].update(halved(model.model.layers[1])),
    "load_weights": lambda model: model.load_weights(list(dict(tree_flatten(halved(model))).items())),
    "set_dtype": lambda model: model.set_dtype(mx.float16),
    "apply": lambda model: model.apply(lambda a: a if a.dtype == mx.uint32 else a / 2),
    "an attribute": lambda model: setattr(
        model.model.layers[0].self_attn.q_norm, "weight", mx.ones_like(model.model.layers[0].self_attn.q_norm.weight)
    ),
    "a module": lambda model: setattr(model.model.layers[1], "mlp", nn.Identity()),
    "the last norm": lambda model: setattr(model.model, "norm", nn.RMSNorm(64, eps=0.5)),
    "the embeddings": replace_embeddings,
    "the embeddings' numbers": lambda model: model.model.embed_tokens.weight.__setitem__(6, 7),
    "a norm's eps": lambda model: setattr(model.model.layers[1].input_layernorm, "eps", 0.5),
    "the eps of a head's norm": lambda model: setattr(model.model.layers[0].self_attn.k_norm, "eps", 0.5),
    "the last norm's eps": lambda model: setattr(model.model.norm, "eps", 0.5),
    "an adapter put in its place again": rescale_adapter,
}


@can_compile
@pytest.mark.parametrize("section", [None, FOUR_BITS], ids=["plain", "quantized"])
@pytest.mark.parametrize("change", CHANGES)
def test_weights_that_change_count_from_then_on(tmp_path: Path, change: str, section: Section | None) -> None:
    """Also in the middle of a reply."""
    folder = folder_of(tmp_path, WIDE_DENSE, section)

    def next_logits(device: Device, change: Callable[[Qwen3ForCausalLM], object] | None) -> mx.array:
        model = load_model(folder, device=device, dtype="float32")
        cache = make_cache(model)
        for ids in ([1, 2, 3], [4], [5]):
            mx.eval(model(mx.array([ids]), cache))
        if change is not None:
            change(model)
        return model(mx.array([[6]]), cache)

    found, expected = (next_logits(device, CHANGES[change]) for device in (GPU, CPU))
    assert_close(found, expected, dtype=mx.float16 if change == "set_dtype" else mx.float32)
    assert worst(expected, next_logits(CPU, None)) > (1e-5 if change == "set_dtype" else 1e-2)


@can_compile
def test_weights_that_were_replaced_are_let_go(tmp_path: Path) -> None:
    model = load_model(folder_of(tmp_path, {**WIDE_DENSE, "intermediate_size": 4096}), device=GPU, dtype="float32")
    cache = make_cache(model)
    mx.eval(model(mx.array([[1]]), cache))
    before = mx.get_active_memory()
    model.update(halved(model))
    mx.eval(model.parameters(), model(mx.array([[1]]), cache))
    assert mx.get_active_memory() <= before + held_by(model) // 4


def modules_of(model: Qwen3ForCausalLM, layer: int) -> set[str]:
    leaves = dict(tree_flatten(model.model.layers[layer].leaf_modules(), is_leaf=nn.Module.is_module))
    return {name for name in leaves if name.endswith("proj")}


def held_by(module: nn.Module) -> int:
    """Bytes of its weights."""
    return sum(array.nbytes for array in dict(tree_flatten(module.parameters())).values())


ATTENTION_APART = {f"self_attn.{name}_proj" for name in "qkvo"}
ATTENTION_FUSED = {"self_attn.qkv_proj", "self_attn.o_proj"}


def test_what_is_quantized_alike_is_laid_together_and_nothing_else(tmp_path: Path) -> None:
    apart, fused = {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}, {"mlp.gate_up_proj", "mlp.down_proj"}
    for section in (None, FOUR_BITS):
        model = load_model(folder_of(tmp_path / str(section), WIDE_DENSE, section))
        assert modules_of(model, 0) == modules_of(model, 2) == ATTENTION_FUSED | fused
    model = load_model(folder_of(tmp_path / "mixed", WIDE_DENSE, MIXED))
    assert modules_of(model, 0) == ATTENTION_APART | fused
    assert modules_of(model, 1) == ATTENTION_APART | apart
    assert modules_of(model, 2) == ATTENTION_FUSED | fused
    experts = load_model(folder_of(tmp_path / "experts", WIDE_MOE, MIXED))
    assert modules_of(experts, 0) == ATTENTION_APART | {"mlp.switch_mlp.gate_up_proj", "mlp.switch_mlp.down_proj"}
    assert modules_of(experts, 1) == ATTENTION_APART | {
        f"mlp.switch_mlp.{part}_proj" for part in ("gate", "up", "down")
    }


@pytest.mark.parametrize("config", [WIDE_DENSE, WIDE_MOE])
def test_apart_weights_have_their_names_and_numbers(tmp_path: Path, config: Config) -> None:
    folder = folder_of(tmp_path, config)
    arrays = dict(tree_flatten(load_model(folder, fused=False).parameters()))
    weights = make_weights(config, experts="stacked")
    assert {name: array.shape for name, array in arrays.items()} == published_shapes(config, "stacked")
    assert all(np.array_equal(np.array(array), weights[name]) for name, array in arrays.items())


@pytest.mark.parametrize("name", MODELS)
def test_fused_weights_take_what_the_footprint_says(tmp_path: Path, name: str) -> None:
    folder = folder_of(tmp_path, *MODELS[name])
    for fused in (False, True):
        before = mx.get_active_memory()
        model = load_model(folder, dtype="float32", fused=fused)
        held = held_by(model)
        assert held == measure(folder).weight_bytes(mx.float32)
        assert held <= mx.get_active_memory() - before <= 1.05 * held
        del model


@pytest.mark.parametrize("section", [None, FOUR_BITS])
@pytest.mark.parametrize("base", [DENSE, MOE])
def test_fusing_holds_one_module_twice(tmp_path: Path, base: Config, section: Section | None) -> None:
    sizes = {"hidden_size": 128, "intermediate_size": 512, "moe_intermediate_size": 128, "num_hidden_layers": 12}
    folder = folder_of(tmp_path, {**base, **sizes, "head_dim": 32}, section)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    model = load_model(folder, dtype="float32")
    assert mx.get_peak_memory() - before - held_by(model) <= held_by(model.model.layers[0])


@pytest.mark.parametrize("section", [None, FOUR_BITS], ids=["plain", "quantized"])
def test_a_prepared_model_is_read_as_often_as_is_asked(tmp_path: Path, section: Section | None) -> None:
    prepared = prepare_model(folder_of(tmp_path, WIDE_DENSE, section), device=CPU)
    first, second = prepared.read(nullcontext()), prepared.read(nullcontext())
    ids = mx.array([prompt(9, 96)])
    expected = first(ids)
    first.update(halved(first))
    assert mx.array_equal(second(ids), expected)
    assert worst(first(ids), expected) > 1e-2


def test_children_of_several_forms_stay() -> None:
    mlp = MLP(64, 64)
    mlp.up_proj = nn.QuantizedLinear.from_linear(mlp.up_proj)
    fuse_children(mlp, ("gate_proj", "up_proj"), "gate_up_proj", FusedLinear, CPU)
    assert set(mlp.children()) == {"gate_proj", "up_proj", "down_proj"}
    mlp.gate_proj = nn.QuantizedLinear.from_linear(mlp.gate_proj, bits=8)
    fuse_children(mlp, ("gate_proj", "up_proj"), "gate_up_proj", FusedLinear, CPU)
    assert set(mlp.children()) == {"gate_proj", "up_proj", "down_proj"}
    mlp.gate_proj = nn.QuantizedLinear.from_linear(nn.Linear(64, 64, bias=False))
    fuse_children(mlp, ("gate_proj", "up_proj"), "gate_up_proj", FusedLinear, CPU)
    assert set(mlp.children()) == {"gate_up_proj", "down_proj"}


@pytest.mark.parametrize("config", [DENSE, MOE])
def test_plain_models_are_trained(config: Config) -> None:
    model = Qwen3ForCausalLM(ModelConfig.from_dict(config))
    keys = iter(mx.random.split(mx.random.key(0), 64))
    model.update(tree_map(lambda a: mx.random.normal(a.shape, key=next(keys)), model.parameters()))
    ids = mx.array([prompt(12, 96)])

    def loss(model: Qwen3ForCausalLM) -> mx.array:
        return nn.losses.cross_entropy(model(ids[:, :-1]), ids[:, 1:]).mean()

    _, gradients = nn.value_and_grad(model, loss)(model)
    slopes = dict(tree_flatten(gradients))
    assert set(slopes) == set(dict(tree_flatten(model.parameters())))
    assert all(mx.isfinite(slope).all() and mx.abs(slope).max() > 0 for slope in slopes.values())


# Counts of primitives, as on a GPU: one for each `mx.fast` function


def primitives(folder: Path, experts: bool, bits: int | None, layers: int, device: Device) -> int:
    """Of one decoded token's logits and cache."""
    folder.mkdir()
    write_model(folder, experts, bits, layers)
    side = ours(folder, device)
    with single_nodes():
        return count_primitives([side.step(mx.array([[5]])), *side.state()]).total()


@can_compile
@pytest.mark.parametrize(
    ("experts", "bits", "per_layer"), [(False, None, 22), (False, 4, 22), (True, None, 37), (True, 4, 37)]
)
def test_primitives_per_decoded_token(tmp_path: Path, experts: bool, bits: int | None, per_layer: int) -> None:
    counts = [primitives(tmp_path / str(layers), experts, bits, layers, GPU) for layers in (2, 6)]
    assert (counts[1] - counts[0]) / 4 == per_layer
    assert counts[0] - 2 * per_layer <= 14


def test_a_step_is_built_without_evaluating_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_model(tmp_path, False, 4, 3)
    monkeypatch.setattr(Device, "begins_layers", False)
    for device in (CPU, GPU):
        side = ours(tmp_path, device)
        token = mx.array([[5]])
        with single_nodes():
            side.step(token)
            side.rewind()
            before = mx.get_active_memory()
            mx.reset_peak_memory()
            logits = side.step(token)
            assert mx.get_peak_memory() <= before
            if device is CPU:  # the other would have to be compiled
                mx.eval(logits)
                assert mx.get_peak_memory() > before


@can_compile
@pytest.mark.parametrize(
    ("kind", "share"), [("dense, BF16", 0.45), ("dense, 4-bit", 0.77), ("MoE, F32", 0.52), ("MoE, 4-bit", 0.7)]
)
def test_a_decoded_token_takes_fewer_primitives_than_in_mlx_lm(kind: str, share: float) -> None:
    found, other = compare(kind, steps=1)
    assert found.total <= share * other.total


def test_compiling_is_the_devices_choice(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, WIDE_DENSE)
    assert load_model(folder, device=CPU).model.decoder is None
    assert load_model(folder, device=GPU).model.decoder is not None
    assert load_model(folder, device=GPU, fused=False).model.decoder is None
