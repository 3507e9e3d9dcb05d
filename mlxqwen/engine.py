"""Load, tokenize, generate, split: one object for the command line, for Python and for servers to hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any, TypedDict, Unpack

import mlx.core as mx

from mlxqwen.cache import KVCache
from mlxqwen.completion import Sampling, begins_in_thought, can_think, resolve_params, stream_generate
from mlxqwen.errors import MessagesError, OptionError
from mlxqwen.events import Done, Event, Timings, Usage, split_reply
from mlxqwen.generation import DEFAULT_MAX_TOKENS, DEFAULT_PREFILL_CHUNK
from mlxqwen.hub import resolve_model
from mlxqwen.loading import CheckSize, LoadOptions, prepare_model
from mlxqwen.messages import check_conversation, soft_switch, without_old_reasoning
from mlxqwen.model import Qwen3ForCausalLM
from mlxqwen.reply import Reply
from mlxqwen.sampling_params import SamplingParams
from mlxqwen.tokenizer import Tokenizer
from mlxqwen.tools import check_tool_schemas

__all__ = ["ChatOptions", "Done", "Engine", "Event", "ReplyOptions", "Timings", "Usage", "load", "split_reply"]


class ReplyOptions(TypedDict, total=False):
    """The options of `Engine.reply`, for functions that pass them on."""

    sampling: Sampling
    thinking_budget: int | None
    early_stop_text: str | None
    tools: bool
    max_tokens: int | None
    stop: str | Sequence[str]
    stop_on_loop: bool
    cache: KVCache | None
    prefill_chunk: int
    on_prefill: Callable[[int, int], None] | None


class ChatOptions(TypedDict, total=False):
    """The options of `Engine.stream`, for functions that pass them on."""

    thinking: bool | None
    thinking_budget: int | None
    early_stop_text: str | None
    tools: Sequence[Mapping[str, Any]] | None
    sampling: Sampling
    max_tokens: int | None
    seed: int | None
    stop: str | Sequence[str]
    stop_on_loop: bool
    trust_special_tokens: bool
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
        thinking_budget: int | None = None,
        early_stop_text: str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        sampling: Sampling = None,
        max_tokens: int | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        stop_on_loop: bool = False,
        trust_special_tokens: bool = False,
        cache: KVCache | None = None,
        prefill_chunk: int = DEFAULT_PREFILL_CHUNK,
        on_prefill: Callable[[int, int], None] | None = None,
    ) -> Iterator[Event]:
        """Answer a conversation piece by piece: reasoning, content and tool calls, and `Done` at the end.

        Args:
            messages: dicts with `role` and `content`, as in OpenAI's API; see `prompt`. Never modified.
            thinking: the hard switch; None leaves it to the template, whose default is to think. Where thinking is
                allowed, `/think` and `/no_think` in the latest user or system message steer it.
            thinking_budget: at most about this many tokens of thought, then an answer. 0 is `thinking=False`; one that
                is not reached, be it larger than the context, changes nothing.
            early_stop_text: the sentence that ends a thought over its budget; by default Qwen's.
            tools: JSON schemas of functions that the model may call.
            sampling: `SamplingParams`, or single options by name over the model card's profile for the mode.
            max_tokens: by default 32,768, and never more than the context has room for.
            seed: the same seed gives the same reply.
            stop: end before the first of these texts in the content; reasoning and calls may hold them.
            stop_on_loop: end a reply that repeats itself without end, as `mlxqwen.loops` defines it.
            trust_special_tokens: whether tokens spelled in the conversation, such as `<|im_end|>`, become those
                tokens. By default they are text, so that nobody can forge a turn, a thought or a call.
            cache, prefill_chunk, on_prefill: see `mlxqwen.stream_generate`.

        Raises:
            MessagesError, TemplateError, OptionError, ContextLengthError, GenerationError.
        """
        thinking = self._hard_switch(thinking, thinking_budget)
        prompt = self.prompt(messages, thinking=thinking, tools=tools, trust_special_tokens=trust_special_tokens)
        params = self._params(prompt, messages, thinking, thinking_budget, sampling)
        return self.reply(
            prompt,
            sampling=params if seed is None else replace(params, seed=seed),
            thinking_budget=thinking_budget,
            early_stop_text=early_stop_text,
            tools=bool(tools),
            max_tokens=max_tokens,
            stop=stop,
            stop_on_loop=stop_on_loop,
            cache=cache,
            prefill_chunk=prefill_chunk,
            on_prefill=on_prefill,
        )

    def reply(
        self,
        prompt: Sequence[int],
        *,
        sampling: Sampling = None,
        thinking_budget: int | None = None,
        early_stop_text: str | None = None,
        tools: bool = False,
        max_tokens: int | None = None,
        stop: str | Sequence[str] = (),
        stop_on_loop: bool = False,
        cache: KVCache | None = None,
        prefill_chunk: int = DEFAULT_PREFILL_CHUNK,
        on_prefill: Callable[[int, int], None] | None = None,
    ) -> Iterator[Event]:
        """Answer a prompt given as ids, such as `prompt` makes: the part of `stream` below messages.

        Args:
            prompt: ids; with a cache, those behind what it holds. Their end tells whether the reply begins in thought.
            sampling: by default the model card's profile, for thinking unless the prompt closes the think block.
            tools: whether the prompt offers tools: else `<tool_call>` is content.
            max_tokens: by default 32,768, and never more than the context has room for.
            thinking_budget, early_stop_text, stop, stop_on_loop: see `stream`.
            cache, prefill_chunk, on_prefill: see `mlxqwen.stream_generate`.

        Raises:
            OptionError, ContextLengthError, GenerationError. Options and lengths are checked at once, before the
            first event is asked for.
        """
        responses = stream_generate(
            self.model,
            self.tokenizer,
            prompt,
            max_tokens=DEFAULT_MAX_TOKENS if max_tokens is None else max_tokens,
            sampling=sampling,
            thinking_budget=thinking_budget,
            early_stop_text=early_stop_text,
            stop_on_loop=stop_on_loop,
            tools=tools,
            cache=cache,
            prefill_chunk=prefill_chunk,
            on_prefill=on_prefill,
        )
        # The prompt's end tells more than the switch: a template may open a think block whatever it is asked.
        return split_reply(responses, thinking=begins_in_thought(self.tokenizer, prompt), tools=tools, stop=stop)

    def prompt(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        thinking: bool | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        trust_special_tokens: bool = False,
    ) -> list[int]:
        """The ids that the model sees of a conversation, up to where its answer begins.

        Reasoning before the last question is left out, whatever the template does; what follows it, such as that of
        the current tool loop, stays.

        A last message of the assistant is gone on with, and the reply is what comes behind it. So one that holds an
        empty think block alone, `<think>\n\n</think>\n\n`, keeps the model from thinking, for this reply only; one
        that holds text is the beginning of the answer, which Qwen3's template puts behind a closed think block.

        Raises:
            MessagesError: a conversation, or schemas of tools, that no model could make sense of.
            OptionError: `thinking` is no switch.
            TemplateError: see `Tokenizer.apply_chat_template`.
        """
        if thinking is not None and not isinstance(thinking, bool):
            raise OptionError(f"thinking: found {thinking!r}, expected True, False or None")
        check_conversation(messages)
        schemas = check_tool_schemas(tools) if tools is not None else None
        prepared = without_old_reasoning(messages, trust_special_tokens=trust_special_tokens)
        goes_on = prepared[-1]["role"] == "assistant"
        if goes_on and prepared[-1].get("tool_calls"):
            raise MessagesError(
                f"messages[{len(prepared) - 1}]: found calls of tools at the end, expected their results behind them",
                hint="Add a message of role 'tool' for each call.",
            )
        return self.tokenizer.apply_chat_template(
            prepared,
            tools=schemas or None,
            add_generation_prompt=not goes_on,
            continue_final_message=goes_on,
            enable_thinking=thinking,
            trust_special_tokens=trust_special_tokens,
        )

    def sampling_for(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        thinking: bool | None = None,
        thinking_budget: int | None = None,
        sampling: Sampling = None,
    ) -> SamplingParams:
        """What a reply to `messages` is drawn with: the card's profile for the mode, single options over it.

        The mode is what the template makes of the hard switch; where it leaves the model free, the soft switches tell.
        A model that may not think, for its budget is 0, does not.
        """
        thinking = self._hard_switch(thinking, thinking_budget)
        return self._params(self.prompt(messages, thinking=thinking), messages, thinking, thinking_budget, sampling)

    def _params(
        self,
        prompt: Sequence[int],
        messages: Sequence[Mapping[str, Any]],
        thinking: bool | None,
        thinking_budget: int | None,
        sampling: Sampling,
    ) -> SamplingParams:
        thinks = begins_in_thought(self.tokenizer, prompt)
        if thinks is None:
            is_answering = messages[-1]["role"] == "assistant"
            thinks = can_think(self.tokenizer) and thinking is not False and not is_answering
            thinks = thinks and soft_switch(messages) is not False
        return resolve_params(self.model, sampling, thinking=thinks and thinking_budget != 0)

    @staticmethod
    def _hard_switch(thinking: bool | None, thinking_budget: int | None) -> bool | None:
        """No budget at all is the switch turned off."""
        return False if thinking_budget == 0 and not isinstance(thinking_budget, bool) else thinking
