"""The fields of `POST /v1/chat/completions`: OpenAI's, and those that vLLM and SGLang add."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from mlxqwen.server.bodies import Form
from mlxqwen.server.settings import MOST_CHOICES

__all__ = ["LONGEST_TEXT", "BiasField", "ChatFields", "ReplyFields", "StreamOptions"]

LONGEST_TEXT = 4_000_000
"""Characters that are encoded though no model may have room for them."""
_MOST_MESSAGES = 100_000
_MOST_TOOLS = 1024
_MOST_BIASES = 4096
_LONGEST_STOP_LIST = 64

Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
BiasField = Annotated[dict[str, Number], Field(max_length=_MOST_BIASES)]
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


class StreamOptions(Form):
    """`stream_options`."""

    include_usage: bool | None = None


class ReplyFields(Form):
    """What chat and text completions have in common. Ranges that are not here are the engine's to check."""

    aside: ClassVar[tuple[str, ...]] = ("user", "service_tier")

    model: Annotated[str, Field(max_length=512)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    temperature: Number | None = None
    top_p: Number | None = None
    top_k: int | None = None
    min_p: Number | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    stop: str | Annotated[list[str], Field(max_length=_LONGEST_STOP_LIST)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**64 - 1)] | None = None
    presence_penalty: Number | None = None
    frequency_penalty: Number | None = None
    repetition_penalty: Number | None = None
    logit_bias: BiasField | None = None
    user: str | None = None
    ignore_eos: bool | None = None
    min_tokens: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    stop_token_ids: Annotated[list[int], Field(max_length=_LONGEST_STOP_LIST)] | None = None
    skip_special_tokens: bool | None = None
    cache_salt: str | None = None
    priority: int | None = None
    thinking_budget: Annotated[int, Field(ge=0)] | None = None
    thinking_token_budget: Annotated[int, Field(ge=0)] | None = None
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    guided_json: str | bool | dict[str, Any] | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    regex: str | None = None
    json_schema: str | dict[str, Any] | None = None
    ebnf: str | None = None
    service_tier: Any = None
    # Asked for, these are refused: see `mlxqwen.server.refusals`.
    best_of: int | None = None
    use_beam_search: bool | None = None
    prompt_logprobs: Any = None


class ChatFields(ReplyFields):
    """A chat completion."""

    aside: ClassVar[tuple[str, ...]] = (
        *ReplyFields.aside,
        *("metadata", "prediction", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"),
        *("prompt_cache_options", "audio", "web_search_options", "moderation"),
    )

    messages: Annotated[list[dict[str, Any]], Field(min_length=1, max_length=_MOST_MESSAGES)]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Annotated[list[dict[str, Any]], Field(max_length=_MOST_TOOLS)] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Effort | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    include_reasoning: bool | None = None
    separate_reasoning: bool | None = None
    modalities: list[str] | None = None
    audio: Any = None
    functions: Any = None
    function_call: Any = None
    web_search_options: Any = None
    prediction: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None
    prompt_cache_options: Any = None
    moderation: Any = None
