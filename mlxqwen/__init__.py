"""A native runtime for the Qwen3 language models on Apple's MLX.

    from mlxqwen import load, generate

    model, tokenizer = load("Qwen/Qwen3-1.7B-MLX-8bit")
    print(generate(model, tokenizer, prompt="Hello", max_tokens=100))

Names are imported when first used, so that `import mlxqwen` alone costs next to nothing.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False  # as in `typing`, whose import would cost more than all the rest
if TYPE_CHECKING:
    from typing import Any

    from mlxqwen.cache import KVCache, load_cache, make_cache
    from mlxqwen.chat.reply import Delta, Reply, ToolCall, ToolCallDelta
    from mlxqwen.chat.reply_parser import ReplyParser, parse_reply
    from mlxqwen.chat.tools import call_tool, tool_schema
    from mlxqwen.engine.chat_request import ChatRequest
    from mlxqwen.engine.conversation import Conversation
    from mlxqwen.engine.engine import Engine, load
    from mlxqwen.engine.events import Done, Event, Timings, Usage, assistant_message
    from mlxqwen.engine.speculation.draft_model import DraftModel
    from mlxqwen.engine.text_generation import (
        GenerationResponse,
        batch_generate,
        batch_stream,
        generate,
        stream_generate,
    )
    from mlxqwen.engine.tool_loop import ToolResult, ToolRun
    from mlxqwen.errors import MlxqwenError
    from mlxqwen.sampling.params import SamplingParams

__version__ = "0.1.0"

__all__ = [
    "ChatRequest",
    "Conversation",
    "Delta",
    "Done",
    "DraftModel",
    "Engine",
    "Event",
    "GenerationResponse",
    "KVCache",
    "MlxqwenError",
    "Reply",
    "ReplyParser",
    "SamplingParams",
    "Timings",
    "ToolCall",
    "ToolCallDelta",
    "ToolResult",
    "ToolRun",
    "Usage",
    "__version__",
    "assistant_message",
    "batch_generate",
    "batch_stream",
    "call_tool",
    "generate",
    "load",
    "load_cache",
    "make_cache",
    "parse_reply",
    "stream_generate",
    "tool_schema",
]

_HOME = {
    "KVCache": "cache",
    "load_cache": "cache",
    "make_cache": "cache",
    "ChatRequest": "engine.chat_request",
    "GenerationResponse": "engine.text_generation",
    "batch_generate": "engine.text_generation",
    "batch_stream": "engine.text_generation",
    "generate": "engine.text_generation",
    "stream_generate": "engine.text_generation",
    "Conversation": "engine.conversation",
    "Engine": "engine.engine",
    "load": "engine.engine",
    "MlxqwenError": "errors",
    "Done": "engine.events",
    "Event": "engine.events",
    "Timings": "engine.events",
    "Usage": "engine.events",
    "assistant_message": "engine.events",
    "Delta": "chat.reply",
    "Reply": "chat.reply",
    "ReplyParser": "chat.reply_parser",
    "ToolCall": "chat.reply",
    "ToolCallDelta": "chat.reply",
    "parse_reply": "chat.reply_parser",
    "SamplingParams": "sampling.params",
    "DraftModel": "engine.speculation.draft_model",
    "ToolResult": "engine.tool_loop",
    "ToolRun": "engine.tool_loop",
    "call_tool": "chat.tools",
    "tool_schema": "chat.tools",
}


class _BeforeMLX:
    """Sees the first import of `mlx.core`, which binds MLX's products to the libraries that are there by then."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> None:
        """Load OpenBLAS before `mlx.core`; finds nothing itself."""
        if name == "mlx.core":
            sys.meta_path.remove(_BeforeMLX)
            from mlxqwen.blas import load_openblas

            load_openblas()


if sys.platform == "linux" and "mlx.core" not in sys.modules:
    sys.meta_path.insert(0, _BeforeMLX)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
