"""A native runtime for the Qwen3 language models on Apple's MLX.

    from mlxqwen import load, generate

    model, tokenizer = load("Qwen/Qwen3-1.7B-MLX-8bit")
    print(generate(model, tokenizer, prompt="Hello", max_tokens=100))

Names are imported when first used, so that `import mlxqwen` alone costs next to nothing.
"""

from __future__ import annotations

TYPE_CHECKING = False  # as in `typing`, whose import would cost more than all the rest
if TYPE_CHECKING:
    from typing import Any

    from mlxqwen.cache import KVCache, load_cache, make_cache
    from mlxqwen.chat_options import ChatRequest
    from mlxqwen.completion import GenerationResponse, batch_generate, batch_stream, generate, stream_generate
    from mlxqwen.conversation import Conversation
    from mlxqwen.engine import Engine, load
    from mlxqwen.errors import MlxqwenError
    from mlxqwen.events import Done, Event, Timings, Usage, assistant_message
    from mlxqwen.prompt_cache import PromptCache
    from mlxqwen.reply import Delta, Reply, ReplyParser, ToolCall, ToolCallDelta, parse_reply
    from mlxqwen.sampling_params import SamplingParams
    from mlxqwen.speculation.draft_model import DraftModel
    from mlxqwen.tool_loop import ToolResult, ToolRun
    from mlxqwen.tools import call_tool, tool_schema

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
    "PromptCache",
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
    "ChatRequest": "chat_options",
    "GenerationResponse": "completion",
    "batch_generate": "completion",
    "batch_stream": "completion",
    "generate": "completion",
    "stream_generate": "completion",
    "Conversation": "conversation",
    "Engine": "engine",
    "load": "engine",
    "MlxqwenError": "errors",
    "Done": "events",
    "Event": "events",
    "Timings": "events",
    "Usage": "events",
    "assistant_message": "events",
    "PromptCache": "prompt_cache",
    "Delta": "reply",
    "Reply": "reply",
    "ReplyParser": "reply",
    "ToolCall": "reply",
    "ToolCallDelta": "reply",
    "parse_reply": "reply",
    "SamplingParams": "sampling_params",
    "DraftModel": "speculation.draft_model",
    "ToolResult": "tool_loop",
    "ToolRun": "tool_loop",
    "call_tool": "tools",
    "tool_schema": "tools",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
