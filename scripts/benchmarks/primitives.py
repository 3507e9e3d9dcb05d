"""The primitives of one decoded token's graph, counted, and how long the host takes to build it, beside mlx-lm.

Both run the same weights: 28 layers, few numbers wide, since the width does not change what the host does. A step is
built, counted or timed, and thrown away without evaluating it, turn by turn. On a CPU MLX spells `mx.fast.*` and
`mx.dequantize` out in many primitives that are one on a GPU; they are replaced on both sides by stand-ins
(`single_nodes`). Primitives are the nodes of `mx.export_to_dot` between a step's results (logits and cache) and the
cache that it found.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from mlxqwen.cache import make_cache
from mlxqwen.device import Device, current_device
from mlxqwen.files.checkpoint import save_safetensors
from mlxqwen.files.config import ModelConfig
from mlxqwen.model.loading import load_model
from mlxqwen.model.qwen3 import Qwen3ForCausalLM

__all__ = [
    "KINDS",
    "Decoding",
    "GraphCost",
    "compare",
    "count_primitives",
    "graph_costs",
    "single_nodes",
    "write_model",
]

LAYERS = 28
GROUP_SIZE = 64
PROMPT = [1, 2, 3, 4]
KINDS = {
    "dense, BF16": (False, None),
    "dense, 4-bit": (False, 4),
    "MoE, F32": (True, None),
    "MoE, 4-bit": (True, 4),
}
"""Name → (whether it has experts, bits). On a CPU, MLX multiplies plain experts in float32 only."""


@dataclass(frozen=True)
class GraphCost:
    """What one decoded token's graph costs the host: its primitives by name, the median seconds of building it."""

    primitives: Counter[str]
    seconds: float

    @property
    def total(self) -> int:
        """All primitives."""
        return self.primitives.total()


@dataclass(frozen=True)
class Decoding:
    """A model and its cache: `step` takes one token `[1, 1]` to logits, `state` gives the cache's arrays, `rewind` puts
    the cache back where it was when this was made."""

    step: Callable[[mx.array], mx.array]
    state: Callable[[], list[mx.array]]
    rewind: Callable[[], None]


def compare(kind: str, steps: int = 200, device: Device | None = None) -> tuple[GraphCost, GraphCost]:
    """Our cost and mlx-lm's, measured turn by turn: see `graph_costs`."""
    mine, peers = graph_costs(kind, steps, device)
    return mine, peers


def graph_costs(
    kind: str, steps: int = 200, device: Device | None = None, *, has_mlx_lm: bool = True
) -> list[GraphCost]:
    """Our cost and, where mlx-lm is there, its cost, measured turn by turn.

    Args:
        kind: one of `KINDS`.
        steps: tokens that are timed.
        device: the machine that mlxqwen takes this one for; by default a GPU, for whose kernels the stand-ins stand.
        has_mlx_lm: whether to measure mlx-lm too.
    """
    device = device or dataclasses.replace(current_device(), is_gpu=True, cores=1)
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), *KINDS[kind])
        sides = [ours(Path(folder), device), *([theirs(Path(folder))] if has_mlx_lm else [])]
    seconds: list[list[float]] = [[] for _ in sides]
    primitives = [Counter[str]() for _ in sides]
    token = mx.array([[5]])
    with single_nodes():
        for turn in range(steps + 5):
            for number, side in enumerate(sides):
                started = time.thread_time()
                logits = side.step(token)
                elapsed = time.thread_time() - started
                if turn == 4:
                    primitives[number] = count_primitives([logits, *side.state()])
                elif turn > 4:  # the first ones trace what is compiled
                    seconds[number].append(elapsed)
                del logits
                side.rewind()
    return [GraphCost(*pair) for pair in zip(primitives, map(statistics.median, seconds), strict=True)]


def ours(folder: Path, device: Device) -> Decoding:
    """mlxqwen, as `generate_tokens` runs it."""
    model = load_model(folder, device=device)
    cache = make_cache(model)
    with uncompiled():
        mx.eval(model(mx.array([PROMPT]), cache), cache.state)
    held = [(layer.keys, layer.values) for layer in cache]
    offset = cache.offset

    def rewind() -> None:
        cache.placement.offsets = [offset]
        for layer, (keys, values) in zip(cache, held, strict=True):
            layer.keys, layer.values = tuple(map(_shared, keys)), tuple(map(_shared, values))

    rewind()
    return Decoding(lambda token: model.logits(model.model(token, cache)), lambda: cache.state, rewind)


def theirs(folder: Path) -> Decoding:
    """mlx-lm, as its `generate_step` runs it."""
    from mlx_lm.models.cache import make_prompt_cache
    from mlx_lm.utils import load_model as load_theirs

    model, _ = load_theirs(folder)
    cache = make_prompt_cache(model)
    with uncompiled():
        mx.eval(model(mx.array([PROMPT]), cache), [layer.state[:2] for layer in cache])
    held = [(layer.keys, layer.values, layer.offset) for layer in cache]

    def rewind() -> None:
        for layer, (keys, values, offset) in zip(cache, held, strict=True):
            layer.keys, layer.values, layer.offset = _shared(keys), _shared(values), offset

    rewind()
    return Decoding(
        lambda token: model(token, cache),
        lambda: [array for layer in cache for array in (layer.keys, layer.values)],
        rewind,
    )


def _shared(array: mx.array) -> mx.array:
    """An array of its own over the same numbers: what is written into it leaves the other as it is."""
    return array[...]


@contextmanager
def uncompiled() -> Iterator[None]:
    """Evaluate without `mx.compile`, for which a CPU starts a C++ compiler."""
    mx.disable_compile()
    try:
        yield
    finally:
        if "MLX_DISABLE_COMPILE" not in os.environ:  # as MLX itself decides when it is imported
            mx.enable_compile()


@contextmanager
def single_nodes() -> Iterator[None]:
    """Let each `mx.fast` function of the model add one primitive, as on a GPU, and `mx.dequantize` two.

    Their results have the right shapes and dtypes, nothing else.
    """

    def rms_norm(x: mx.array, weight: mx.array | None, eps: float) -> mx.array:
        return mx.abs(x) if weight is None else mx.depends(x, weight)

    def rope(x: mx.array, dims: int, **_: Any) -> mx.array:
        return mx.abs(x)

    def attention(queries: mx.array, keys: mx.array, values: mx.array, **_: Any) -> mx.array:
        return mx.depends(queries, [keys, values])

    def dequantize(
        codes: mx.array, scales: mx.array, biases: mx.array, group_size: int, bits: int, **_: Any
    ) -> mx.array:
        width = codes.shape[-1] * 32 // bits
        return mx.broadcast_to(mx.depends(scales, [codes, biases])[..., :1], (*codes.shape[:-1], width))

    stand_ins = {
        (mx.fast, "rms_norm"): rms_norm,
        (mx.fast, "rope"): rope,
        (mx.fast, "scaled_dot_product_attention"): attention,
        (mx, "dequantize"): dequantize,
    }
    real = {(room, name): getattr(room, name) for room, name in stand_ins}
    for (room, name), function in stand_ins.items():
        setattr(room, name, function)
    try:
        yield
    finally:
        for (room, name), function in real.items():
            setattr(room, name, function)


def count_primitives(arrays: list[mx.array]) -> Counter[str]:
    """The primitives that have to run for `arrays`, by name."""
    graph = io.StringIO()
    mx.export_to_dot(graph, *arrays)
    return Counter(re.findall(r'\[label ="([^"]*)", shape=rectangle\]', graph.getvalue()))


def write_model(folder: Path, experts: bool, bits: int | None, layers: int = LAYERS) -> None:
    """Fill `folder` with a narrow random model; every matrix is quantized if `bits` are given."""
    dtype = mx.float32 if experts and bits is None else mx.bfloat16
    config: dict[str, Any] = {
        "model_type": "qwen3_moe" if experts else "qwen3",
        "hidden_size": GROUP_SIZE,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": GROUP_SIZE,
        "intermediate_size": GROUP_SIZE,
        "vocab_size": 256,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "tie_word_embeddings": True,
        "eos_token_id": 2,
    }
    if experts:
        config |= {
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": GROUP_SIZE,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }
    mx.random.seed(0)
    weights: dict[str, mx.array] = {}
    shapes = dict(tree_flatten(Qwen3ForCausalLM(ModelConfig.from_dict(config)).parameters()))
    for name, like in shapes.items():
        array = mx.random.normal(like.shape).astype(dtype) * 0.1
        if bits is None or array.ndim == 1:
            weights[name] = array
            continue
        codes, scales, biases = mx.quantize(array, group_size=GROUP_SIZE, bits=bits)
        module = name.removesuffix(".weight")
        weights |= {name: codes, f"{module}.scales": scales, f"{module}.biases": biases}
    if bits is not None:
        config["quantization"] = {"group_size": GROUP_SIZE, "bits": bits, "mode": "affine"}
    save_safetensors(folder / "model.safetensors", weights, {"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config))
