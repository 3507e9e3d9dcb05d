"""What the folder of an unfinished conversion says of itself: where it was begun from, and with what options."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlxqwen.errors import ConfigError
from mlxqwen.files.json_file import read_json_object

__all__ = ["MANIFEST", "command_to_finish", "is_unfinished", "words_of_options"]

MANIFEST = "conversion.json"
_BITS = (16, 8, 6, 5, 4, 3, 2)
# In the order in which they are spelled: the values that `mlxqwen convert` has for them.
_CHOICES: Mapping[str, tuple[Any, ...]] = {
    "bits": _BITS,
    "group_size": (32, 64, 128),
    "dtype": ("bfloat16", "float16", "float32"),
    "lm_head_bits": _BITS,
    "embed_bits": _BITS,
    "device": ("gpu",),
}
_DEFAULTS = {"dtype": "auto", "device": "cpu"}
_FLAGS = ("quality", "strict")


def is_unfinished(folder: Path) -> bool:
    """Whether `folder` is what `mlxqwen convert` writes into until it is done, by its suffix and its manifest."""
    return folder.name.endswith(".partial") and os.path.isfile(folder / MANIFEST)


def command_to_finish(folder: Path) -> str:
    """The command that goes on with an unfinished conversion; `SOURCE` stands for what its manifest does not tell."""
    output = shlex.quote(str(folder).removesuffix(".partial"))
    try:
        manifest = read_json_object(folder / MANIFEST, error=ConfigError)
    except ConfigError:
        manifest = {}
    source, words = manifest.get("source"), words_of_options(manifest.get("options"))
    # An absolute path cannot be taken for an option.
    if words is None or not isinstance(source, str) or not source.isprintable() or not os.path.isabs(source):
        return f"mlxqwen convert SOURCE {output} --resume"
    return " ".join(["mlxqwen convert", shlex.quote(source), output, *([words] if words else []), "--resume"])


def words_of_options(options: object) -> str | None:
    """A manifest's options as the command line spells them, those left at their defaults left out; None if unknown."""
    if not isinstance(options, dict) or not options.keys() <= {*_CHOICES, *_FLAGS, "keep"}:
        return None
    words: list[str] = []
    for name, choices in _CHOICES.items():
        value = options.get(name)
        if value is None or value == _DEFAULTS.get(name):
            continue
        if type(value) is not type(choices[0]) or value not in choices:
            return None
        words += [_flag(name), str(value)]
    kept = _words_of_globs(options.get("keep", []))
    flags = {name: options.get(name, False) for name in _FLAGS}
    if kept is None or not all(isinstance(value, bool) for value in flags.values()):
        return None
    words += kept + [_flag(name) for name, value in flags.items() if value]
    return " ".join(words)


def _words_of_globs(pairs: object) -> list[str] | None:
    if not isinstance(pairs, list):
        return None
    words = []
    for pair in pairs:
        if not isinstance(pair, list) or len(pair) != 2:
            return None
        glob, bits = pair
        if not isinstance(glob, str) or not glob.isprintable() or type(bits) is not int or bits not in _BITS:
            return None
        words += ["--keep", shlex.quote(f"{glob}={bits}")]
    return words


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
