"""The options of a chat: the one list of them, for the engine and for functions that pass them on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, TypedDict

from mlxqwen.cache import KVCache
from mlxqwen.engine.completion import Sampling
from mlxqwen.errors import OptionError
from mlxqwen.sampling.params import SamplingParams

if TYPE_CHECKING:
    from mlxqwen.engine.prompt_cache import PromptCache

__all__ = [
    "ChatBatchOptions",
    "ChatOptions",
    "ChatRequest",
    "Messages",
    "ReplyOptions",
    "RequestOptions",
    "ToolRunOptions",
    "check_option_names",
]

Messages = Sequence[Mapping[str, Any]]


class _OwnOptions(TypedDict, total=False):
    thinking: bool | None
    thinking_budget: int | None
    sampling: Sampling
    max_tokens: int | None
    seed: int | None
    trust_special_tokens: bool
    drop_oldest: bool


class _CommonOptions(TypedDict, total=False):
    early_stop_text: str | None
    stop: str | Sequence[str]
    stop_on_loop: bool
    prefill_chunk: int | None
    on_prefill: Callable[[int, int], None] | None


class RequestOptions(_OwnOptions, total=False):
    """The options of `Engine.stream` that each conversation of a batch may have for itself."""

    tools: Sequence[Mapping[str, Any]] | None


class ChatBatchOptions(RequestOptions, _CommonOptions, total=False):
    """The options of `Engine.stream` that `Engine.batch` takes for all."""


class ToolRunOptions(_OwnOptions, _CommonOptions, total=False):
    """The options of `Engine.stream` that `Engine.run_tools` takes."""


class ChatOptions(RequestOptions, _CommonOptions, total=False):
    """The options of `Engine.stream`, which says what they mean."""

    cache: KVCache | PromptCache | None


class ReplyOptions(TypedDict, total=False):
    """The options of `Engine.reply`."""

    sampling: Sampling
    thinking_budget: int | None
    early_stop_text: str | None
    expect_thought: bool
    tools: bool
    max_tokens: int | None
    stop: str | Sequence[str]
    stop_on_loop: bool
    cache: KVCache | None
    cached_tokens: int | None
    prefill_chunk: int | None
    on_prefill: Callable[[int, int], None] | None


def check_option_names(what: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Refuse options of `what` that are not among the `known`. Raises `OptionError`."""
    known = list(known)
    for name in given:
        if name not in known:
            is_sampling = any(field.name == name for field in fields(SamplingParams))
            raise OptionError(
                f"option of {what}: found {name!r}, expected one of {', '.join(known)}",
                hint=f'Say how to sample in sampling, here sampling={{"{name}": …}}.' if is_sampling else "",
            )


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """A conversation of a batch, with options of its own over those for all."""

    messages: Messages
    options: RequestOptions = field(default_factory=RequestOptions)
