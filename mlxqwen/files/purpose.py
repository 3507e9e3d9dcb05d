"""What a sound folder of a Qwen3 model is for, where it is for anything else than generating text."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

from mlxqwen.errors import ConfigError, MlxqwenError, UnsupportedFormatError
from mlxqwen.files.adapters import MERGE
from mlxqwen.files.json_file import parse_json, read_text

__all__ = ["other_purpose", "refuse_other_purpose"]

HEADS = re.compile(
    r"(model\.)?(score|classifier|classification_head|qa_outputs|v_head|value_head|reward_head|regression_head)\b.*"
)
ADAPTED = re.compile(r".*\.(lora_(A|B|a|b|embedding_A|embedding_B|magnitude_vector)|base_layer|modules_to_save)(\..*)?")
# transformers names classes of models by what they are for: Qwen3Model, Qwen3ForSequenceClassification.
OTHER_CLASS = re.compile(r"\w*(Model|For(?!CausalLM$)\w+)", re.ASCII)
MOST_BYTES = 1 << 20


def other_purpose(folder: Path, architecture: str | None, names: Collection[str]) -> str | None:
    """What the folder holds that is no language model, in words; None where nothing says so.

    Args:
        folder: of the model.
        architecture: the first of the `architectures` of its config.
        names: of its tensors.
    """
    adapted = next((name for name in names if ADAPTED.fullmatch(name)), None)
    if adapted is not None:
        return f"a model with an adapter that is not merged ({adapted[:120]})"
    head = next((name for name in names if HEADS.fullmatch(name)), None)
    if head is not None:
        return f"a classifier or reward model ({head[:120]})"
    if "layers.0.input_layernorm.weight" in names or "embed_tokens.weight" in names:
        return "an embedding model (its tensors are those of a bare Qwen3Model, without a head)"
    if pools(folder):
        return "an embedding model (modules.json pools its outputs)"
    if architecture is not None and OTHER_CLASS.fullmatch(architecture):
        kind = "an embedding model" if architecture in ("Qwen3Model", "Qwen3MoeModel") else "no language model"
        return f"{kind} (config.json says {architecture})"
    return None


def refuse_other_purpose(folder: Path, architecture: str | None, names: Collection[str]) -> None:
    """Raise `UnsupportedFormatError` for a folder that is for something else. Arguments: see `other_purpose`."""
    purpose = other_purpose(folder, architecture, names)
    if purpose is not None:
        hint = f"{MERGE}." if "adapter" in purpose else "mlxqwen generates text and runs nothing else."
        raise UnsupportedFormatError(f"{folder}: {purpose}, expected a language model", hint=hint)


def pools(folder: Path) -> bool:
    """Whether sentence-transformers' `modules.json` says that a pooling layer follows the model."""
    path = folder / "modules.json"
    if not path.is_file():
        return False
    try:
        found = parse_json(read_text(path, error=ConfigError, max_bytes=MOST_BYTES))
    except (MlxqwenError, ValueError):
        return False
    modules = found if isinstance(found, list) else []
    kinds = [str(module.get("type")) for module in modules if isinstance(module, dict)]
    return any(kind.endswith(".Pooling") for kind in kinds)
