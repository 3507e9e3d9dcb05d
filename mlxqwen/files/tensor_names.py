"""Names of a Qwen3 model's tensors: without wrappers' prefixes, and told from what no forward pass needs."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable

__all__ = ["ROOTS", "foreign_prefix", "is_rotary_buffer", "is_scale_of_activations", "without_wrappers"]

# torch.compile; DataParallel, FSDP and activation checkpointing; PEFT; models of several modalities.
WRAPPERS = frozenset(
    {"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "base_model", "language_model"}
)
ROOTS = ("model.embed_tokens.", "model.layers.", "model.norm.", "lm_head.")
"""What the names of a Qwen3 model's tensors begin with."""
ROTARY_BUFFER = re.compile(r"model\.(layers\.[0-9]{1,4}\.self_attn\.)?rotary_emb\.inv_freq")
# Of activations and of a key/value cache, as vLLM, llm-compressor, ModelOpt and FBGEMM calibrate them.
SCALE_OF_ACTIVATIONS = re.compile(r"(input|output|q|k|v|kv|prob)_(scale|zero_point)|input_scale_ub")


def without_wrappers(name: str) -> str:
    """A module's or tensor's name without the prefixes of known wrappers, wherever they stand in it.

    `_orig_mod.model.norm.weight`, `base_model.model.model.norm.weight` and `model.language_model.norm.weight` are
    `model.norm.weight`. A name that is none of a Qwen3 model's even then stays as it is.
    """
    if name.startswith(ROOTS) and WRAPPERS.isdisjoint(name.split(".")):
        return name
    words = [word for word in name.split(".") if word not in WRAPPERS]
    while len(words) > 1 and words[0] == "model" and words[1] in ("model", "lm_head"):
        del words[0]
    bare = ".".join(words)
    return bare if f"{bare}.".startswith(ROOTS) else name


def is_rotary_buffer(name: str) -> bool:
    """Whether a tensor holds RoPE's frequencies, which follow from the config."""
    return ROTARY_BUFFER.fullmatch(name) is not None


def is_scale_of_activations(name: str) -> bool:
    """Whether a tensor scales activations or a key/value cache."""
    return SCALE_OF_ACTIVATIONS.fullmatch(name.rpartition(".")[2]) is not None


def foreign_prefix(names: Iterable[str], missing: Collection[str]) -> str | None:
    """What stands before most of the `missing` names where they were found after all; None if they were not.

    Names without `model.` stand before nothing: the prefix is empty.
    """
    ends = set(missing)
    short = {name.removeprefix("model.") for name in ends}
    prefixes: Counter[str] = Counter()
    for name in names:
        if name in short:
            prefixes[""] += 1
        for dot in (i for i, letter in enumerate(name) if letter == "."):
            if name[dot + 1 :] in ends or (name[dot + 1 :] in short and not name[: dot + 1].endswith("model.")):
                prefixes[name[: dot + 1]] += 1
                break
    most = prefixes.most_common(1)
    return most[0][0] if most and 2 * most[0][1] >= len(ends) else None
