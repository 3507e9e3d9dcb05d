"""The files beside the weights: config, tokenizer, template, licence. Data only, never code."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlxqwen_convert.errors import SourceError
from mlxqwen_convert.pipeline import unwritable
from mlxqwen_convert.plan import DTYPES, Plan

__all__ = ["companion_files", "config_text", "copy_companions"]

_NAMES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "LICENSE",
    "LICENSE.txt",
    "LICENSE.md",
    "LICENCE",
    "NOTICE",
    "NOTICE.txt",
)
_TEMPLATES = "additional_chat_templates"
_MAX_BYTES = 256 * 1024 * 1024
# Keys of a config that describe the source's weights, or name code to run.
_DROPPED = ("quantization", "quantization_config", "compression_config", "auto_map", "_name_or_path")


def companion_files(folder: Path) -> Iterator[Path]:
    """The files of a model's folder that go along with its weights, relative to it."""
    for name in _NAMES:
        if (folder / name).is_file():
            yield Path(name)
    if (folder / _TEMPLATES).is_dir():
        for path in sorted((folder / _TEMPLATES).glob("*.jinja")):
            if path.is_file():
                yield path.relative_to(folder)


def copy_companions(source: Path, target: Path) -> None:
    """Copy them; links are followed, since the hub's cache is made of them."""
    for relative in companion_files(source):
        path = source / relative
        try:
            if path.stat().st_size > _MAX_BYTES:
                raise SourceError(
                    f"{path}: larger than {_MAX_BYTES:,} bytes, which no such file is", hint="Download it again."
                )
            (target / relative).parent.mkdir(exist_ok=True)
            if relative.name == "tokenizer_config.json":
                _copy_without_code(path, target / relative)
            else:
                shutil.copyfile(path, target / relative)
        except OSError as cause:
            if cause.errno in (errno.EACCES, errno.EIO, errno.ENOENT) and cause.filename == str(path):
                raise SourceError(f"{path}: cannot be read: {cause.strerror}", hint="Check the file.") from None
            raise unwritable(target / relative, cause) from None
        descriptor = os.open(target / relative, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def _copy_without_code(path: Path, target: Path) -> None:
    """`auto_map` names Python files to import; without it the file stays byte for byte as it is."""
    text = path.read_text(encoding="utf-8", errors="surrogateescape")
    if '"auto_map"' in text:
        try:
            found = json.loads(text)
        except ValueError:
            found = None
        if isinstance(found, dict) and "auto_map" in found:
            del found["auto_map"]
            text = json.dumps(found, indent=2, ensure_ascii=False) + "\n"
    target.write_text(text, encoding="utf-8", errors="surrogateescape")


def config_text(plan: Plan) -> str:
    """`config.json` of the output: the source's, with its own quantization and dtype."""
    config: dict[str, Any] = {key: value for key, value in plan.raw_config.items() if key not in _DROPPED}
    dtype = next(name for name, short in DTYPES.items() if short == plan.dtype)
    config["dtype" if "dtype" in config else "torch_dtype"] = dtype
    section = plan.quantization()
    if section is not None:
        config["quantization"] = section
        config["quantization_config"] = section
    return json.dumps(dict(sorted(config.items())), indent=4, ensure_ascii=False) + "\n"
