"""Load, tokenize, generate, split: one object for the command line, for Python and for servers to hold."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack

import mlx.core as mx

from mlxqwen.cache import KVCache
from mlxqwen.completion import (
    GenerationResponse,
    Sampling,
    begins_in_thought,
    can_think,
    resolve_params,
    stream_generate,
)
from mlxqwen.errors import OptionError
from mlxqwen.generation import DEFAULT_MAX_TOKENS, DEFAULT_PREFILL_CHUNK
from mlxqwen.hub import resolve_model
from mlxqwen.loading import CheckSize, LoadOptions, prepare_model
from mlxqwen.messages import soft_switch
from mlxqwen.model import Qwen3ForCausalLM
from mlxqwen.reply import Delta, Reply, ReplyParser
from mlxqwen.sampling import SamplingParams
from mlxqwen.stop import StopStrings
from mlxqwen.tokenizer import Tokenizer

__all__ = ["ChatOptions", "Done", "Engine", "Event", "Timings", "Usage", "load", "split_reply"]


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


class ChatOptions(TypedDict, total=False):
    """The options of `Engine.stream`, for functions that pass them on."""

    thinking: bool | None
    tools: Sequence[Mapping[str, Any]] | None
    sampling: Sampling
    max_tokens: int | None
    seed: int | None
    stop: str | Sequence[str]
    cache: KVCache | None
    prefill_chunk: int
    on_prefill: Callable[[int, int], None] | None


def load(
    path_or_id: str | PathLike[str] | None = None,
    *,
    dtype: str | mx.Dtype | None = None,
    rope_scaling: Mapping[str, Any] | None = None,
    revision: str | None = None,
    yarn_factor: float | None = None,
    force: bool = False,
    on_convert: Callable[[str, int, int], None] | None = None,
) -> tuple[Qwen3ForCausalLM, Tokenizer]:
    """Load a model and its tokenizer.

    Args:
        path_or_id: a folder or a hub id such as "Qwen/Qwen3-1.7B-MLX-8bit"; nothing for the demo model of the package.
            FP8, AWQ, GPTQ and compressed-tensors weights are converted once, into the user's cache folder.
        dtype: what to compute in, by name or as MLX's; by default the checkpoint's on a GPU and float32 on a CPU.
        rope_scaling: replaces that of `config.json`, for example
            `{"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}`.
        revision: a branch, tag or commit of a hub id.
        yarn_factor: shorter for YaRN over the trained context.
        force: load even what does not fit this machine's memory.
        on_convert: called as a conversion goes on: "converting" or "verifying", weights done, weights in all.

    Raises:
        MlxqwenError: one of the trees in `mlxqwen.errors` and `mlxqwen_convert.errors`, by what is wrong.
    """
    engine = Engine.load(
        path_or_id,
        dtype=dtype,
        rope_scaling=rope_scaling,
        revision=revision,
        yarn_factor=yarn_factor,
        force=force,
        on_convert=on_convert,
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
        revision: str | None = None,
        on_convert: Callable[[str, int, int], None] | None = None,
        **options: Unpack[LoadOptions],
    ) -> Engine:
        """See `load`. All that can be wrong is found before the weights are read or converted."""
        folder = resolve_model(path_or_id, revision=revision)

        def convert(source: Path, check_size: CheckSize) -> Path:
            from mlxqwen_convert.cached import converted

            def check(dtype: mx.Dtype, packed_bytes: int, numbers: int) -> None:
                check_size(dtype, packed_bytes, numbers)
                Tokenizer.from_folder(source)  # complains before the conversion

            return converted(source, check=check, progress=on_convert)

        read_model = prepare_model(folder, convert=convert, **options)
        tokenizer = Tokenizer.from_folder(folder)
        return cls(read_model(), tokenizer)

    def chat(self, messages: Sequence[Mapping[str, Any]], **options: Unpack[ChatOptions]) -> Reply:
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
            stop: end before the first of these texts in the content; reasoning may hold them.
            cache, prefill_chunk, on_prefill: see `mlxqwen.stream_generate`.

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
            cache=cache,
            prefill_chunk=prefill_chunk,
            on_prefill=on_prefill,
        )
        # The prompt's end tells more than the switch: a template may open a think block whatever it is asked.
        return split_reply(responses, thinking=begins_in_thought(self.tokenizer, prompt), stop=stop)

    def prompt(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        thinking: bool | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[int]:
        """The ids that the model sees of a conversation, up to where its answer begins."""
        if thinking is not None and not isinstance(thinking, bool):
            raise OptionError(f"thinking: found {thinking!r}, expected True, False or None")
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
        """What a reply to `messages` is drawn with: the card's profile for the mode, single options over it.

        The mode is what the template makes of the hard switch; where it leaves the model free, the soft switches tell.
        """
        opening = [{"role": "user", "content": "Hello"}]
        thinks = begins_in_thought(self.tokenizer, self.prompt(opening, thinking=thinking))
        if thinks is None:
            thinks = can_think(self.tokenizer) and thinking is not False and soft_switch(messages) is not False
        return resolve_params(self.model, sampling, thinking=thinks)


def split_reply(
    responses: Iterator[GenerationResponse], *, thinking: bool | None, stop: str | Sequence[str] = ()
) -> Iterator[Event]:
    """Text as it comes → events, up to a stop string in the content; `thinking` as for `ReplyParser`."""
    return _events(responses, ReplyParser(thinking=thinking), StopStrings(stop))


def _events(responses: Iterator[GenerationResponse], parser: ReplyParser, stops: StopStrings) -> Iterator[Event]:
    reasoning: list[str] = []
    content: list[str] = []
    reasoning_tokens = 0
    started, first = time.perf_counter(), 0.0
    for response in responses:
        first = first or time.perf_counter()
        was_in_reasoning = parser.in_reasoning
        deltas = parser.feed(response.text)
        if was_in_reasoning or parser.in_reasoning:
            reasoning_tokens = response.generation_tokens
        if response.finish_reason is not None:
            deltas += parser.finish()
        for delta in deltas:
            if delta.reasoning is not None:
                reasoning.append(delta.reasoning)
                yield delta
            elif shown := stops.feed(delta.content or "")[0]:
                content.append(shown)
                yield Delta(content=shown)
        if response.finish_reason is not None and (shown := stops.finish()):
            content.append(shown)
            yield Delta(content=shown)
        finish_reason = "stop" if stops.found else response.finish_reason
        if finish_reason is None:
            continue
        reply = Reply("".join(reasoning) or None, "".join(content))
        yield Done(
            reply,
            finish_reason,
            Usage(response.prompt_tokens, response.generation_tokens, reasoning_tokens if reply.reasoning else 0),
            Timings(first - started, time.perf_counter() - first, response.prompt_tps, response.generation_tps),
        )
        return
