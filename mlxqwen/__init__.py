"""A native runtime for the Qwen3 language models on Apple's MLX."""

from __future__ import annotations

__version__ = "0.1.0"
