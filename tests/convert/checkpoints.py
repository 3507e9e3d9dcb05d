"""Small Qwen3 checkpoints in every source format, made with NumPy alone; what each weight means is kept beside them."""

from __future__ import annotations

import json
import shutil
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlxqwen.files.checkpoint import Checkpoint
from mlxqwen.files.hub import DEMO_FOLDER
from tests.checkpoint_arrays import arrays_of
from tests.convert import encoders
from tests.convert.encoders import Array, Floats, Grouped

Config = dict[str, Any]
# A tensor as it lies on disk: safetensors' dtype and an array of its bytes' shape.
Stored = tuple[str, Array]

DENSE: Config = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 256,
    "vocab_size": 192,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MOE: Config = {
    **DENSE,
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
FORMATS = ("bf16", "f16", "f32", "fp8", "fp8-channel", "fp8-tensor", "awq", "gptq", "gptq8", "int4", "int8")
INTEGERS = ("awq", "gptq", "gptq8", "int4", "int8")
# Rarer ones: BF16 beside F16, GPTQ's second version, zero points of compressed-tensors.
VARIANTS = ("awq-bf16", "gptq-v2", "int4-asymmetric", "int8-asymmetric")


@dataclass
class Source:
    """A checkpoint's folder, and what is in it.

    Attributes:
        meaning: weight by its name in the original model, in float32, exactly as the format defines it.
        codes: the integer form of what has one.
    """

    folder: Path
    config: Config
    stored: dict[str, Stored]
    meaning: dict[str, Floats] = field(default_factory=dict)
    codes: dict[str, Grouped] = field(default_factory=dict)

    def write(self, shards: int = 1) -> Source:
        """Write everything, over what is there."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "config.json").write_text(json.dumps(self.config))
        (self.folder / "tokenizer_config.json").write_text(
            json.dumps({"auto_map": {"x": "evil.py"}, "eos_token": "</s>"})
        )
        (self.folder / "generation_config.json").write_text(json.dumps({"temperature": 0.6}))
        (self.folder / "LICENSE").write_text("Do as you like.")
        (self.folder / "modeling_evil.py").write_text("raise SystemExit")
        names = list(self.stored)
        if shards == 1:
            write_safetensors(self.folder / "model.safetensors", self.stored)
            return self
        weight_map: dict[str, str] = {}
        for shard in range(shards):
            file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
            part = names[shard::shards]
            write_safetensors(self.folder / file, {name: self.stored[name] for name in part})
            weight_map |= dict.fromkeys(part, file)
        (self.folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        return self


def write_safetensors(path: Path, tensors: Mapping[str, Stored]) -> None:
    """One file, tensors in the given order."""
    header: dict[str, Any] = {}
    position = 0
    for name, (dtype, array) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [position, position + array.nbytes]}
        position += array.nbytes
    text = json.dumps(header).encode()
    data = b"".join(np.ascontiguousarray(array).tobytes() for _, array in tensors.values())
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Weights by their published names."""
    hidden, width, vocab, head = (config[k] for k in ("hidden_size", "intermediate_size", "vocab_size", "head_dim"))
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens": (vocab, hidden)}
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        found |= {f"{at}.input_layernorm": (hidden,), f"{at}.post_attention_layernorm": (hidden,)}
        found |= {f"{at}.self_attn.q_norm": (head,), f"{at}.self_attn.k_norm": (head,)}
        found |= {f"{at}.self_attn.q_proj": (queries, hidden), f"{at}.self_attn.k_proj": (keys, hidden)}
        found |= {f"{at}.self_attn.v_proj": (keys, hidden), f"{at}.self_attn.o_proj": (hidden, queries)}
        if "num_experts" not in config:
            found |= {f"{at}.mlp.{name}": shape for name, shape in _glu(hidden, width).items()}
            continue
        found[f"{at}.mlp.gate"] = (config["num_experts"], hidden)
        for expert in range(config["num_experts"]):
            glu = _glu(hidden, config["moe_intermediate_size"])
            found |= {f"{at}.mlp.experts.{expert}.{name}": shape for name, shape in glu.items()}
    found["model.norm"] = (hidden,)
    if not config["tie_word_embeddings"]:
        found["lm_head"] = (vocab, hidden)
    return found


def _glu(hidden: int, width: int) -> dict[str, tuple[int, int]]:
    return {"gate_proj": (width, hidden), "up_proj": (width, hidden), "down_proj": (hidden, width)}


def numbers(name: str, shape: tuple[int, ...], seed: int = 0) -> Floats:
    """The weight of that name: the same every time."""
    drawn = np.random.default_rng([seed, zlib.crc32(name.encode())]).standard_normal(shape)
    scaled = 1 + 0.2 * drawn if len(shape) == 1 else drawn * (0.5 if shape[0] == 192 else 2 / np.sqrt(shape[-1]))
    return scaled.astype(np.float32)


def make_source(
    folder: Path,
    form: str,
    config: Config = DENSE,
    *,
    group_size: int = 64,
    seed: int = 0,
    packed_router: bool = False,
    weights: Mapping[str, Floats] | None = None,
) -> Source:
    """A checkpoint in one of `FORMATS` or `VARIANTS`, of given weights or of random ones; call `write` on it."""
    config = dict(config)
    plain = {"f16": "F16", "f32": "F32", "bf16": "BF16", "fp8": "BF16", "fp8-channel": "BF16", "fp8-tensor": "BF16"}
    plain["awq-bf16"] = "BF16"
    section = quantization_config(form, group_size)
    if section is not None:
        config["quantization_config"] = section
    source = Source(folder, config, {})
    for name, shape in shapes(config).items():
        values = numbers(name, shape, seed) if weights is None else weights[name]
        quantized = len(shape) == 2 and section is not None and name not in ("model.embed_tokens", "lm_head")
        if quantized and (packed_router or not name.endswith(".mlp.gate")):
            for word, stored in _encode(source, name, values, form, group_size).items():
                source.stored[f"{name}.{word}"] = stored
        else:
            source.stored[f"{name}.weight"], source.meaning[name] = plain_tensor(values, plain.get(form, "F16"))
    return source


def plain_tensor(values: Floats, dtype: str) -> tuple[Stored, Floats]:
    """An unquantized tensor on disk, and what is left of its values."""
    if dtype == "BF16":
        return (dtype, encoders.bf16_bytes(values)), encoders.round_to_bf16(values)
    kept = values.astype(np.float16 if dtype == "F16" else np.float32)
    return (dtype, kept), kept.astype(np.float32)


def _encode(source: Source, name: str, values: Floats, form: str, group_size: int) -> dict[str, Stored]:
    if form.startswith("fp8"):
        block = {"fp8": (128, 128), "fp8-channel": (1, values.shape[1]), "fp8-tensor": None}[form]
        codes, scales = encoders.encode_fp8(values, block)
        source.meaning[name] = encoders.decode_fp8(codes, scales.reshape(-1, scales.shape[-1]), block or values.shape)
        word = "weight_scale_inv" if form == "fp8" else "weight_scale"
        return {"weight": ("F8_E4M3", codes), word: ("BF16", encoders.bf16_bytes(scales))}
    bits = 8 if "8" in form else 4
    symmetric = form in ("int4", "int8")
    grouped = encoders.quantize_grouped(values, bits, group_size, symmetric=symmetric)
    if form in ("gptq", "gptq8"):  # the first format cannot say zero
        grouped = Grouped(grouped.codes, np.maximum(grouped.zeros, 1), grouped.scales, grouped.groups)
    source.codes[name], source.meaning[name] = grouped, grouped.weight
    if form.startswith("awq"):
        tensors = encoders.encode_awq(grouped)
    elif form.startswith("gptq"):
        tensors = encoders.encode_gptq(grouped, bits, zero_offset=0 if form == "gptq-v2" else 1)
    else:
        tensors = encoders.encode_compressed_tensors(grouped, bits, symmetric=symmetric)
    dtypes = {np.dtype(np.int32): "I32", np.dtype(np.float16): "F16", np.dtype(np.int64): "I64"}
    return {word: (dtypes[array.dtype], array) for word, array in tensors.items()}


def quantization_config(form: str, group_size: int = 64) -> Config | None:
    """What `config.json` says of a format."""
    if form == "fp8":
        return {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    if form.startswith("awq"):
        return {"quant_method": "awq", "bits": 4, "group_size": group_size, "version": "gemm", "zero_point": True}
    if form.startswith("gptq"):
        bits = 8 if "8" in form else 4
        section = {"quant_method": "gptq", "bits": bits, "group_size": group_size, "desc_act": False, "sym": False}
        return {**section, "checkpoint_format": "gptq_v2" if form == "gptq-v2" else "gptq"}
    if form.startswith(("int", "fp8-")):
        weights: Config = {
            "num_bits": 8 if "8" in form else 4,
            "type": "int",
            "symmetric": "asymmetric" not in form,
            "strategy": "group",
        }
        weights |= {"strategy": "channel"} if group_size == -1 else {"group_size": group_size}
        packing = "pack-quantized"
        if form.startswith("fp8"):
            weights = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": form[4:]}
            packing = "float-quantized"
        group = {"targets": ["Linear"], "weights": weights}
        return {"quant_method": "compressed-tensors", "format": packing, "config_groups": {"group_0": group}}
    return None


def make_demo(folder: Path, form: str) -> Source:
    """The demo model in one of `FORMATS`, written with its tokenizer."""
    config = json.loads((DEMO_FOLDER / "config.json").read_text())
    arrays = arrays_of(Checkpoint.open(DEMO_FOLDER))
    weights = {name.removesuffix(".weight"): np.array(array.astype(mx.float32)) for name, array in arrays.items()}
    source = make_source(folder, form, config, weights=weights).write()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copy(DEMO_FOLDER / name, folder / name)
    return source
