"""Qwen3 checkpoints into MLX's form, streamed, exact, crash-safe.

    from mlxqwen_convert import convert

    report = convert("Qwen/Qwen3-4B-FP8", "Qwen3-4B-8bit")

Names are imported when first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlxqwen_convert.conversion import convert
    from mlxqwen_convert.errors import ConversionError
    from mlxqwen_convert.report import Report

__all__ = ["ConversionError", "Report", "convert"]

_HOME = {"convert": "conversion", "ConversionError": "errors", "Report": "report"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
