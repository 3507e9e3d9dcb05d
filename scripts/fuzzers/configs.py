"""Configs: any change of a sound `config.json` is a config whose sizes fit together, or an error of ours."""

from __future__ import annotations

import json
import random
import tempfile
from pathlib import Path
from typing import Any

from mlxqwen.errors import MlxqwenError
from mlxqwen.files.config import ModelConfig
from mlxqwen.files.hub import DEMO_FOLDER

_ODD: list[Any] = [
    *(0, -1, 1, 3, 1 << 31, 1 << 63, 1 << 70, 0.5, 1e308, True, None, "", "qwen3", "qwen3_moe", [], [1], {}, {"a": 1}),
    *({"rope_type": "yarn", "factor": 4.0}, {"type": "linear", "factor": 2}, {"bits": 4, "group_size": 64}),
]
_MORE = ["rope_scaling", "rope_parameters", "layer_types", "quantization", "quantization_config", "num_experts", "x"]


def make_config(seed: int) -> dict[str, Any]:
    """The demo's config, with a few changes."""
    draw = random.Random(seed)
    config: dict[str, Any] = json.loads((DEMO_FOLDER / "config.json").read_text())
    for _ in range(draw.randrange(1, 4)):
        key = draw.choice([*config, *_MORE])
        if key in config and draw.random() < 0.2:
            del config[key]
        else:
            config[key] = draw.choice(_ODD)
    return config


def check(seed: int) -> str | None:
    """What broke: an error that is none of ours, or sizes that no model has. None if nothing."""
    config = make_config(seed)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(config))
        try:
            read = ModelConfig.from_folder(Path(folder))
        except MlxqwenError:
            return None
        except Exception as error:
            return f"{config}: {error!r}"
    sizes = (read.hidden_size, read.num_hidden_layers, read.head_dim, read.vocab_size, read.context_length)
    if not all(type(size) is int and 0 < size < 1 << 40 for size in sizes):
        return f"{config}: sizes {sizes}"
    return None if read.num_attention_heads % read.num_key_value_heads == 0 else f"{config}: heads"
