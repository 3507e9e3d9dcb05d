"""Quantized weights by the libraries that publish them, for `scripts/make_golden.py convert`.

Needs torch, transformers, accelerate and safetensors, and, without their own dependencies:

    pip install --no-deps --no-build-isolation autoawq==0.2.9 auto-gptq==0.7.1 compressed-tensors==0.20.0 loguru psutil

Each library packs the weights and restores them, in float32, with its own code on a CPU. AutoAWQ and AutoGPTQ no
longer import as a whole; only the modules that pack are loaded.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

Tensors = dict[str, torch.Tensor]

ROWS, WIDTH = 64, 256


def weights(rows: int = ROWS, width: int = WIDTH) -> torch.Tensor:
    """float16-representable float32 weights, with a group of zeros and one outlier."""
    generator = torch.Generator().manual_seed(3)
    weight = 0.02 * torch.randn(rows, width, generator=generator)
    weight[5, :128] = 0.0
    weight[6, 200] = 0.5
    return weight.half().float()


def write_convert(folder: Path) -> dict[str, Any]:
    """Write one safetensors file for each case; case → settings, library, and SHA-256 of the restored float32 rows."""
    folder.mkdir(exist_ok=True)
    cases: dict[str, Any] = {}
    for name, make, arguments in (
        ("fp8-block", fp8_block, {}),
        ("awq-g64", awq, {"group_size": 64}),
        ("awq-g128", awq, {"group_size": 128}),
        ("gptq-int4", gptq, {"bits": 4, "group_size": 64}),
        ("gptq-int4-act-order", gptq, {"bits": 4, "group_size": 64, "act_order": True}),
        ("gptq-int8", gptq, {"bits": 8, "group_size": 128}),
        ("gptq-int8-per-channel", gptq, {"bits": 8, "group_size": -1}),
        ("pack-quantized-int4", compressed, {"bits": 4, "group_size": 128, "symmetric": True}),
        ("pack-quantized-int4-asymmetric", compressed, {"bits": 4, "group_size": 32, "symmetric": False}),
        ("pack-quantized-int8-per-channel", compressed, {"bits": 8, "group_size": None, "symmetric": True}),
        ("float-quantized-per-channel", compressed_float, {"strategy": "channel"}),
        ("float-quantized-per-tensor", compressed_float, {"strategy": "tensor"}),
    ):
        tensors, restored, library = make(**arguments)
        save_file({key: value.contiguous() for key, value in tensors.items()}, folder / f"{name}.safetensors")
        rows = restored.float().contiguous().numpy()
        digest = hashlib.sha256(rows.astype("<f4").tobytes()).hexdigest()
        cases[name] = {**arguments, "library": library, "shape": list(rows.shape), "sha256": digest}
    return {"cases": cases}


def _submodule(package: str, name: str) -> types.ModuleType:
    """One module of an installed package whose own `__init__` needs what this machine lacks."""
    if package not in sys.modules:
        spec = importlib.util.find_spec(package)
        if spec is None or spec.submodule_search_locations is None:
            raise SystemExit(f"install {package} first: see the head of {Path(__file__).name}")
        stub = types.ModuleType(package)
        stub.__path__ = list(spec.submodule_search_locations)
        sys.modules[package] = stub
    parent, _, _ = name.rpartition(".")
    if parent and f"{package}.{parent}" not in sys.modules:
        stub = types.ModuleType(f"{package}.{parent}")
        stub.__path__ = [str(Path(sys.modules[package].__path__[0], *parent.split(".")))]
        sys.modules[f"{package}.{parent}"] = stub
    return importlib.import_module(f"{package}.{name}")


def fp8_block() -> tuple[Tensors, torch.Tensor, str]:
    """transformers' fine-grained FP8: blocks of 128 × 128."""
    import transformers
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize

    class Quantizer:
        quantization_config = transformers.FineGrainedFP8Config(weight_block_size=(128, 128))

    made = Fp8Quantize(Quantizer()).convert({"weight": weights(256, 256)})
    restored = Fp8Dequantize(Quantizer()).convert({key: [value] for key, value in made.items()})["weight"]
    return made, restored, f"transformers {transformers.__version__}"


def _grid(weight: torch.Tensor, bits: int, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales in float16 values and whole zeros, `[rows, groups]`, from the least to the greatest of each group."""
    groups = weight.reshape(len(weight), -1, group_size)
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    scales = ((high - low).clamp(min=1e-5) / (2**bits - 1)).half().float()
    # a zero of 0 cannot be stored in GPTQ's first format
    return scales, (-low / scales).round().clamp(1, 2**bits - 1)


def awq(group_size: int) -> tuple[Tensors, torch.Tensor, str]:
    """AutoAWQ's GEMM layout."""
    gemm = _submodule("awq", "modules.linear.gemm")
    packing = importlib.import_module("awq.utils.packing_utils")
    linear = _linear(weights())
    scales, zeros = _grid(linear.weight.data.float(), 4, group_size)
    layer = gemm.WQLinear_GEMM.from_linear(linear, 4, group_size, scales=scales.T, zeros=zeros.T)
    tensors = {"qweight": layer.qweight, "qzeros": layer.qzeros, "scales": layer.scales}
    restored = packing.dequantize_gemm(layer.qweight, layer.qzeros, layer.scales.float(), 4, group_size)
    return tensors, restored.T, "autoawq 0.2.9"


def gptq(bits: int, group_size: int, act_order: bool = False) -> tuple[Tensors, torch.Tensor, str]:
    """AutoGPTQ's layout, with zeros stored minus one."""
    module = _submodule("auto_gptq", "nn_modules.qlinear.qlinear_cuda")
    weight = weights()
    size = WIDTH if group_size == -1 else group_size
    order = torch.arange(WIDTH)
    if act_order:
        order = torch.randperm(WIDTH, generator=torch.Generator().manual_seed(4))
    g_idx = torch.empty(WIDTH, dtype=torch.int32)
    g_idx[order] = (torch.arange(WIDTH) // size).int()
    scales, zeros = _grid(weight[:, order], bits, size)
    layer = module.QuantLinear(bits, group_size, WIDTH, ROWS, bias=False)
    layer.pack(_linear(weight), scales.clone(), zeros.clone(), g_idx)
    names = ("qweight", "qzeros", "scales", "g_idx")
    tensors = {name: getattr(layer, name).detach().clone() for name in names}
    layer.scales = layer.scales.float()
    restored = layer.float()(torch.eye(WIDTH))
    return tensors, restored.detach().T, "auto-gptq 0.7.1"


def _linear(weight: torch.Tensor) -> torch.nn.Linear:
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False).half()
    linear.weight.data = weight.half()
    return linear


def compressed(bits: int, group_size: int | None, symmetric: bool) -> tuple[Tensors, torch.Tensor, str]:
    """compressed-tensors' pack-quantized, scales in bfloat16."""
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs

    strategy = "channel" if group_size is None else "group"
    arguments = QuantizationArgs(
        num_bits=bits, type="int", symmetric=symmetric, group_size=group_size, strategy=strategy
    )
    return _compressed(PackedQuantizationCompressor, arguments, group_size or WIDTH)


def compressed_float(strategy: str) -> tuple[Tensors, torch.Tensor, str]:
    """compressed-tensors' float-quantized: FP8 with a scale for each row or for the tensor, in bfloat16."""
    from compressed_tensors.compressors.naive_quantized.base import FloatQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs

    arguments = QuantizationArgs(num_bits=8, type="float", symmetric=True, strategy=strategy)
    return _compressed(FloatQuantizationCompressor, arguments, WIDTH if strategy == "channel" else None)


def _compressed(compressor: Any, arguments: Any, group_size: int | None) -> tuple[Tensors, torch.Tensor, str]:
    import compressed_tensors
    from compressed_tensors.quantization import QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    weight = weights()
    groups = weight.reshape(1, -1) if group_size is None else weight.reshape(ROWS, -1, group_size)
    low, high = groups.amin(-1), groups.amax(-1)
    scale, zero_point = calculate_qparams(low.bfloat16(), high.bfloat16(), arguments)
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
    state = {"weight": weight.bfloat16(), "weight_scale": scale, "weight_zero_point": zero_point}
    made = compressor.compress(state, scheme)
    restored = compressor.decompress({**made, "weight_scale": made["weight_scale"].float()}, scheme)["weight"]
    return made, restored, f"compressed-tensors {compressed_tensors.__version__}"
