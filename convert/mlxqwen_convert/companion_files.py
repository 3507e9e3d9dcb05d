"""The files of a source that go along with its weights: which they are, and whether they can be taken."""

from __future__ import annotations

import json
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlxqwen.files.hub_download import COMPANION_FILES
from mlxqwen.files.json_file import BYTE_ORDER_MARK, parse_json, read_text
from mlxqwen_convert.errors import SourceError, SourceUnreadableError

__all__ = ["check_companions", "companion_files", "filtered_text", "is_filtered", "without_code"]

_TEMPLATES = "additional_chat_templates"
# Settings, in which libraries look for code to run. The others map tokens to ids: there, every key is a token.
_FILTERED = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.json", "generation_config.json")
_MAX_BYTES = 256 * 1024 * 1024
_MAX_FILTERED_BYTES = 4 * 1024 * 1024
_POINTER = b"version https://git-lfs"
# Names files of Python to import.
_CODE_KEYS = ("auto_map", "custom_pipelines")


def companion_files(folder: Path) -> Iterator[Path]:
    """The files of a model's folder that go along with its weights, relative to it."""
    for name in COMPANION_FILES:
        if (folder / name).is_file():
            yield Path(name)
    if (folder / _TEMPLATES).is_dir():
        for path in sorted((folder / _TEMPLATES).glob("*.jinja")):
            if path.is_file():
                yield path.relative_to(folder)


def check_companions(folder: Path) -> None:
    """Raise `SourceError` for a companion that could not be copied, before any weight is read."""
    for relative in companion_files(folder):
        check_companion(folder, relative)
        if is_filtered(relative):
            filtered_text(folder / relative)


def check_companion(folder: Path, relative: Path) -> None:
    """Raise `SourceError` unless a companion lies in the folder (or the hub's cache), is readable and of sane size."""
    path = folder / relative
    _refuse_strays(folder, path)
    try:
        found = path.stat()
        with path.open("rb") as file:
            start = file.read(len(_POINTER))
    except OSError as cause:
        raise SourceUnreadableError(f"{path}: cannot be read: {cause.strerror}", hint="Check the file.") from None
    if not stat.S_ISREG(found.st_mode) or found.st_size > _MAX_BYTES:
        raise SourceError(f"{path}: larger than {_MAX_BYTES:,} bytes, which no such file is", hint="Remove it.")
    if start == _POINTER:
        raise SourceError(
            f"{path}: a git-lfs pointer, not the file itself",
            hint="Run `git lfs pull` in the folder, or download the file again.",
        )


def _refuse_strays(folder: Path, path: Path) -> None:
    """A link may lead to another file of the model, or from a snapshot of the hub's cache to its blobs."""
    origin, real = folder.resolve(), path.resolve()
    allowed = [origin]
    if origin.parent.name == "snapshots":
        allowed.append(origin.parent.parent / "blobs")
    if not any(real.is_relative_to(place) for place in allowed):
        raise SourceError(
            f"{path}: is a link to {real}, outside of the model's folder",
            hint="What is copied goes into the output. Put the file itself in the link's place, or remove the link.",
        )


def is_filtered(relative: Path) -> bool:
    """Whether a companion is read and rid of what names code, rather than copied as it is."""
    return relative.name in _FILTERED


def filtered_text(path: Path) -> str:
    """The text of a JSON file without the keys that name code; without any, as it is but for a byte order mark.

    Raises:
        SourceError: it is not JSON, or not within the bounds of `parse_json` and of 4 MB.
    """
    text = read_text(path, error=SourceError, max_bytes=_MAX_FILTERED_BYTES).removeprefix(BYTE_ORDER_MARK)
    try:
        found = parse_json(text)
    except ValueError as cause:
        raise SourceError(f"{path}: {cause}", hint=f"Repair or remove {path.name}.") from None
    cleaned = without_code(found)
    return text if cleaned == found else json.dumps(cleaned, indent=2, ensure_ascii=False) + "\n"


def without_code(value: Any) -> Any:
    """A parsed JSON value without the keys that name code, at any depth (of which `parse_json` allows few)."""
    if isinstance(value, dict):
        return {key: without_code(below) for key, below in value.items() if key not in _CODE_KEYS}
    return [without_code(below) for below in value] if isinstance(value, list) else value
