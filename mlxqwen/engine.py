"""Load, tokenize, generate, split: one object for the command line, for Python and for servers to hold."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any, Literal

import mlx.core as mx

from mlxqwen.cache import KVCache
from mlxqwen.completion import GenerationResponse, Sampling, asks_to_think, resolve_params, stream_generate
from mlxqwen.device import Device
from mlxqwen.generation import DEFAULT_MAX_TOKENS, DEFAULT_PREFILL_CHUNK
from mlxqwen.hub import resolve_model
from mlxqwen.loading import load_model
from mlxqwen.messages import soft_switch
from mlxqwen.model import Qwen3ForCausalLM
from mlxqwen.reply import Delta, Reply, ReplyParser
from mlxqwen.sampling import SamplingParams
from mlxqwen.tokenizer import Tokenizer

__all__ = ["Done", "Engine", "Event", "Timings", "Usage", "load"]


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one reply; those up to `</think>` are counted as reasoning if there was any."""

    prompt_tokens: int
    completion_tokens: int
    reasoning_tokens: int


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds until the first token and from there to the last, and tokens per second of both."""

    prefill_seconds: float
    decode_seconds: float
    prefill_tokens_per_second: float
    decode_tokens_per_second: float


@dataclass(frozen=True, slots=True)
class Done:
    """The last event: the whole reply and how it came about."""

    reply: Reply
    finish_reason: Literal["stop", "length"]
    usage: Usage
    timings: Timings


Event = Delta | Done


def load(
    path_or_id: str | PathLike[str] | None = None,
    *,
    dtype: str | mx.Dtype | None = None,
    rope_scaling: Mapping[str, Any] | None = None,
    revision: str | None = None,
    yarn_factor: float | None = None,
    force: bool = False,
) -> tuple[Qwen3ForCausalLM, Tokenizer]:
    """Load a model and its tokenizer.

    Args:
        path_or_id: a folder or a hub id such as "Qwen/Qwen3-1.7B-MLX-8bit"; nothing for the demo model of the package.
        dtype: what to compute in, by name or as MLX's; by default the checkpoint's on a GPU and float32 on a CPU.
        rope_scaling: replaces that of `config.json`, for example
            `{"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}`.
        revision: a branch, tag or commit of a hub id.
        yarn_factor: shorter for YaRN over the trained context.
        force: load even what does not fit this machine's memory.

    Raises:
        MlxqwenError: one of the tree in `mlxqwen.errors`, by what is wrong.
    """
    engine = Engine.load(
        path_or_id,
        dtype=dtype,
        rope_scaling=rope_scaling,
        revision=revision,
        yarn_factor=yarn_factor,
        force=force,
    )
    return engine.model, engine.tokenizer


class Engine:
    """A model with its tokenizer, ready to answer."""

    def __init__(self, model: Qwen3ForCausalLM, tokenizer: Tokenizer) -> None:
        self.model = model
        self.tokenizer = tokenizer

    @classmethod
    def load(
        cls,
        path_or_id: str | PathLike[str] | None = None,
        *,
        dtype: str | mx.Dtype | None = None,
        rope_scaling: Mapping[str, Any] | None = None,
        revision: str | None = None,
        yarn_factor: float | None = None,
        force: bool = False,
        device: Device | None = None,
    ) -> Engine:
        """See `load`."""
        folder = resolve_model(path_or_id, revision=revision)
        model = load_model(
            folder,
            dtype=dtype,
            rope_scaling=rope_scaling,
            yarn_factor=yarn_factor,
            force=force,
            device=device,
        )
        return cls(model, Tokenizer.from_folder(folder))

    def chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> Reply:
        """Answer a conversation; the options are those of `stream`."""
        return next(event.reply for event in self.stream(messages, **options) if isinstance(event, Done))

    def stream(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        thinking: bool | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        sampling: Sampling = None,
        max_tokens: int | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        cache: KVCache | None = None,
        prefill_chunk: int = DEFAULT_PREFILL_CHUNK,
        on_prefill: Callable[[int, int], None] | None = None,
    ) -> Iterator[Event]:
        """Answer a conversation piece by piece: reasoning, content, and `Done` at the end.

        Args:
            messages: dicts with `role` and `content`, as in OpenAI's API.
            thinking: the hard switch; None leaves it to the template, whose default is to think.
            tools: JSON schemas of functions that the model may call; its calls come as content.
            sampling: `SamplingParams`, or single options by name over the model card's profile for the mode.
            max_tokens: by default 32,768, and never more than the context has room for.
            seed: the same seed gives the same reply.
            stop, cache, prefill_chunk, on_prefill: see `mlxqwen.stream_generate`.

        Raises:
            MessagesError, TemplateError, OptionError, ContextLengthError, GenerationError.
        """
        prompt = self.prompt(messages, thinking=thinking, tools=tools)
        params = self.sampling_for(messages, thinking=thinking, sampling=sampling)
        responses = stream_generate(
            self.model,
            self.tokenizer,
            prompt,
            max_tokens=DEFAULT_MAX_TOKENS if max_tokens is None else max_tokens,
            sampling=params if seed is None else replace(params, seed=seed),
            stop=stop,
            cache=cache,
            prefill_chunk=prefill_chunk,
            on_prefill=on_prefill,
        )
        thinks = thinking is not False and asks_to_think(self.tokenizer, prompt)
        yield from split_reply(responses, thinking=thinks)

    def prompt(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        thinking: bool | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[int]:
        """The ids that the model sees of a conversation, up to where its answer begins."""
        return self.tokenizer.apply_chat_template(
            messages, tools=tools, add_generation_prompt=True, enable_thinking=thinking
        )

    def sampling_for(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        thinking: bool | None = None,
        sampling: Sampling = None,
    ) -> SamplingParams:
        """What a reply to `messages` is drawn with: the hard switch, then the soft ones, tell the card's profile."""
        thinks = thinking is not False and soft_switch(messages) is not False
        return resolve_params(self.model, sampling, thinking=thinks)


def split_reply(responses: Iterator[GenerationResponse], *, thinking: bool) -> Iterator[Event]:
    """Text as it comes → events."""
    parser = ReplyParser(thinking=thinking)
    reasoning: list[str] = []
    content: list[str] = []
    reasoning_tokens = 0
    started, first = time.perf_counter(), 0.0
    for response in responses:
        first = first or time.perf_counter()
        reasoning_tokens += parser.in_reasoning
        deltas = parser.feed(response.text)
        if response.finish_reason is not None:
            deltas += parser.finish()
        for delta in deltas:
            reasoning.append(delta.reasoning or "")
            content.append(delta.content or "")
            yield delta
        if response.finish_reason is not None:
            reply = Reply("".join(reasoning) or None, "".join(content))
            yield Done(
                reply,
                response.finish_reason,
                Usage(
                    response.prompt_tokens,
                    response.generation_tokens,
                    reasoning_tokens if reply.reasoning else 0,
                ),
                Timings(
                    first - started,
                    time.perf_counter() - first,
                    response.prompt_tps,
                    response.generation_tps,
                ),
            )
