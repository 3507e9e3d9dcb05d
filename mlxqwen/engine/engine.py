"""`Engine`: a model with its tokenizer, for the command line, for Python and for servers.

Long by what it says of its arguments: each method is a view of a few lines.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal, Unpack

import mlx.core as mx

from mlxqwen.chat.reply import Reply
from mlxqwen.chat.thinking_modes import check_budget_use
from mlxqwen.checks import check_integer
from mlxqwen.device import current_device
from mlxqwen.engine.batch import DEFAULT_BATCH_SIZE, answer_batch
from mlxqwen.engine.chat_request import ChatOptions, ChatRequest, Messages, Responder, as_messages, option_names
from mlxqwen.engine.events import Done, Event, Timings, Usage
from mlxqwen.engine.given import check_loaded
from mlxqwen.engine.handle import Handle, events_of
from mlxqwen.engine.loading import Converter, MakeRoom, load_models
from mlxqwen.engine.options import DEFAULT_MAX_ROUNDS, ConstraintFactory
from mlxqwen.engine.request import DEFAULT_DRAFT_TOKENS, Request, check_draft_tokens
from mlxqwen.engine.schedulers import close_scheduler, scheduler_of
from mlxqwen.engine.stores import open_prompt_cache, prefix_cache_bytes, use_store
from mlxqwen.engine.text_generation import Sampling, check_keywords, stream_generate, text_request
from mlxqwen.engine.token_stream import OnPrefill
from mlxqwen.errors import MlxqwenError, OptionError
from mlxqwen.model.loading import LoadOptions
from mlxqwen.model.qwen3 import Qwen3ForCausalLM
from mlxqwen.sampling.params import SamplingParams
from mlxqwen.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from mlxqwen.cache import KVCache
    from mlxqwen.cache.disk_tier import DiskTier
    from mlxqwen.engine.speculation.drafter import Speculative
    from mlxqwen.engine.tool_loop import ToolEvent, ToolRun, Tools

__all__ = [
    "DEFAULT_BATCH_SIZE",
    "ChatOptions",
    "ChatRequest",
    "Done",
    "Engine",
    "Event",
    "Timings",
    "Usage",
    "load",
]


def load(
    path_or_id: str | PathLike[str] | None = None,
    *,
    model: str | PathLike[str] | None = None,
    dtype: str | mx.Dtype | None = None,
    rope_scaling: Mapping[str, Any] | None = None,
    revision: str | None = None,
    yarn_factor: float | None = None,
    yarn: Literal["auto"] | None = None,
    force: bool = False,
    ignore_adapter: bool = False,
    fused: bool = True,
    on_convert: Callable[[str, int, int], None] | None = None,
) -> tuple[Qwen3ForCausalLM, Tokenizer]:
    """Load a model and its tokenizer.

    Args:
        path_or_id: a folder, a hub id such as "Qwen/Qwen3-1.7B-MLX-8bit", or with "modelscope:" before it one of
            ModelScope; nothing for the demo model of the package.
            FP8, AWQ, GPTQ and compressed-tensors weights are converted once, into the user's cache folder.
        model: another name for `path_or_id`.
        dtype: what to compute in, by name or as MLX's; by default the checkpoint's on a GPU and float32 on a CPU.
        rope_scaling: replaces that of `config.json`, for example
            `{"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}`.
        revision: a branch, tag or commit of a hub id.
        yarn_factor: extends the trained context this many times by YaRN.
        yarn: "auto" scales each request by its own length, as the model cards advise: not at all if it fits the trained
            context, else by the least of the factors 2 and 4 that holds it. What counts is the prompt and a
            `max_tokens` that is given; without one, the prompt and 4,096 tokens, or a quarter of the trained context
            if that is less. `Done.yarn_factor` tells it. A `rope_scaling` beside it gives the trained context and the
            ramp.
        force: load even what does not fit this machine's memory.
        ignore_adapter: load the weights alone where an adapter lies beside them, which is refused otherwise.
        fused: lay projections of the same input together, which is quicker; `False` keeps every weight under its name
            in an MLX checkpoint, to change, train, save or quantize.
        on_convert: called as a conversion goes on: "converting" or "verifying", weights done, weights in all.

    Raises:
        MlxqwenError: one of the trees in `mlxqwen.errors` and `mlxqwen_convert.errors`, by what is wrong.
    """
    engine = Engine.load(
        path_or_id,
        model=model,
        dtype=dtype,
        rope_scaling=rope_scaling,
        revision=revision,
        yarn_factor=yarn_factor,
        yarn=yarn,
        force=force,
        ignore_adapter=ignore_adapter,
        fused=fused,
        on_convert=on_convert,
    )
    return engine.model, engine.tokenizer


def _check_speculative(speculative: Speculative, draft_tokens: int | None, draft: object = None) -> None:
    """Check the options of speculative decoding. Raises `OptionError`."""
    if draft_tokens is not None:
        check_draft_tokens(draft_tokens)
        if speculative is None and draft is None:
            raise OptionError(
                f"draft_tokens: found {draft_tokens}, expected none where nothing guesses",
                hint='Give speculative="lookup" or a draft model, or leave out draft_tokens.',
            )
    if speculative is not None:
        from mlxqwen.engine.speculation.drafter import as_drafter

        as_drafter(speculative)


class Engine:
    """A model with its tokenizer, ready to answer.

    Args:
        prefix_cache: how much memory the store of what was read may take, shared by all replies of the model: bytes,
            text such as "2GB", or "off"; by default an eighth of what the machine has for models.
        prompt_cache: a folder that keeps it on disk, for later runs; it may take a tenth of the disk.
        max_running: the most replies of the model that decode at once; by default 256.
        checks_memory: whether replies wait for memory, and are refused where there is too little.

    Attributes:
        model, tokenizer: as given.
        scheduler: what computes the replies of the model, shared by all engines of it.
        speculative, draft_tokens: what guesses several tokens at once, for one pass of the model to check, and the most
            that it guesses; see `mlxqwen.stream_generate`. Replies are the same as without, except for rounding.
    """

    def __init__(
        self,
        model: Qwen3ForCausalLM,
        tokenizer: Tokenizer,
        *,
        speculative: Speculative = None,
        draft_tokens: int | None = None,
        prefix_cache: int | str | None = None,
        prompt_cache: str | PathLike[str] | DiskTier | None = None,
        max_running: int | None = None,
        checks_memory: bool = True,
    ) -> None:
        check_loaded(model, tokenizer, "Engine(model, tokenizer), or Engine.load(…)")
        _check_speculative(speculative, draft_tokens)
        self.model = model
        self.tokenizer = tokenizer
        self.speculative = speculative
        self.draft_tokens = DEFAULT_DRAFT_TOKENS if draft_tokens is None else draft_tokens
        self.scheduler = scheduler_of(model)
        if prefix_cache is not None or prompt_cache is not None:
            use_store(self.scheduler, prefix_cache, prompt_cache, current_device())
        if max_running is not None:
            self.scheduler.max_running = check_integer("max_running", max_running, 1)
        if not checks_memory:
            self.scheduler.checks_memory = False

    @classmethod
    def load(
        cls,
        path_or_id: str | PathLike[str] | None = None,
        *,
        model: str | PathLike[str] | None = None,
        revision: str | None = None,
        on_convert: Callable[[str, int, int], None] | None = None,
        draft: str | PathLike[str] | None = None,
        speculative: Speculative = None,
        draft_tokens: int | None = None,
        prefix_cache: int | str | None = None,
        prompt_cache: str | PathLike[str] | None = None,
        max_running: int | None = None,
        converter: Converter | None = None,
        make_room: MakeRoom | None = None,
        **options: Unpack[LoadOptions],
    ) -> Engine:
        """See `load`. All that can be wrong is found before the weights are read or converted.

        Args:
            draft: folder or hub id of a smaller model with the same tokenizer, which guesses what this one will say. It
                reads each prompt along with this one. `revision` is not for it.
            speculative: what guesses instead; see `Engine`.
            prefix_cache, prompt_cache, max_running: see `Engine`.
            converter: what to do with weights in a form that is not run; by default `mlxqwen_convert` converts them.
            make_room: called with the bytes that the weights will take in memory, before they are read.
        """
        if model is not None:
            if path_or_id is not None:
                raise OptionError("model: found beside path_or_id, expected one of them, as they mean the same")
            path_or_id = model
        _check_speculative(speculative, draft_tokens, draft)
        prefix_cache_bytes(prefix_cache, options.get("device") or current_device())
        shared: dict[str, Any] = {
            "draft_tokens": draft_tokens,
            "prefix_cache": prefix_cache,
            "prompt_cache": None if prompt_cache is None else open_prompt_cache(prompt_cache),
            "max_running": max_running,
            "checks_memory": not options.get("force", False),
        }
        if draft is not None and speculative is not None:
            raise OptionError("draft and speculative: found both, expected one", hint="One of them does the guessing.")
        loaded, tokenizer, draft_model = load_models(
            path_or_id,
            draft=draft,
            revision=revision,
            on_convert=on_convert,
            converter=converter,
            make_room=make_room,
            **options,
        )
        if draft_model is not None:
            from mlxqwen.engine.speculation.draft_model import DraftModel

            speculative = DraftModel(draft_model)
        return cls(loaded, tokenizer, speculative=speculative, **shared)

    def __repr__(self) -> str:
        config, quantization = self.model.config, self.model.config.quantization
        weights = (
            str(self.model.dtype).removeprefix("mlx.core.")
            if quantization is None
            else f"{quantization.default.bits}-bit weights"
        )
        return (
            f"<Engine: {config.model_type}, {config.num_hidden_layers} layers, {weights}, context of "
            f"{config.context_length:,} tokens{', closed' if self.scheduler.is_closed else ''}>"
        )

    @property
    def _responder(self) -> Responder:
        return Responder(self.model, self.tokenizer, self.speculative, self.draft_tokens)

    def close(self) -> None:
        """End all replies of the model with an error, and write what the prompt cache has not written yet.

        Other engines of the same model are closed with it.
        """
        close_scheduler(self.scheduler)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def check_open(self) -> None:
        """Raise `OptionError` once it is closed."""
        if self.scheduler.is_closed:
            raise OptionError(
                "engine: found in use after close(), expected an open one",
                hint="Make a new Engine, or close this one behind its last reply.",
            )

    def chat(self, messages: Messages | str, **options: Any) -> Reply:
        """Answer a conversation; the options are those of `stream`."""
        option_names("a chat", options)
        return next(event.reply for event in self.stream(messages, **options) if isinstance(event, Done))

    def stream(
        self,
        messages: Messages | str,
        *,
        thinking: bool | None = None,
        thinking_budget: int | None = None,
        early_stop_text: str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        sampling: Sampling = None,
        max_tokens: int | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        skip_special_tokens: bool = True,
        stop_on_loop: bool = False,
        trust_special_tokens: bool = False,
        drop_oldest: bool = False,
        template_variables: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool | None = None,
        cache: KVCache | None = None,
        max_kv_size: int | None = None,
        keep: int = 4,
        kv_bits: int | None = None,
        logprobs: int | None = None,
        prefill_chunk: int | None = None,
        on_prefill: OnPrefill = None,
        priority: int = 0,
        salt: str = "",
        constraints: Sequence[ConstraintFactory] = (),
        response_format: object = None,
        tool_choice: str | Mapping[str, Any] | None = None,
        parallel_tool_calls: bool = True,
    ) -> Iterator[Event]:
        """Answer a conversation piece by piece: reasoning, content and tool calls, and `Done` at the end.

        Nothing runs before the first event is asked for. Any thread may ask for the next one, one at a time. A stream
        that is closed, or that nobody refers to any more, ends its reply.

        Args:
            messages: dicts with `role` and `content`, as in OpenAI's API; see `prompt`. Never modified. Text is what a
                user says.
            thinking: the hard switch: True allows thinking, False does not, None leaves it to the chat template, whose
                default is to think. Where thinking is allowed, `/think` and `/no_think` in the latest user or system
                message steer it. With True and no `/no_think`, everything up to `</think>` is reasoning, even if the
                model does not open its thought, and a reply without `</think>` is reasoning alone. Otherwise a reply
                is content unless it opens with `<think>`. If the template has no such switch, a value that the model
                does not follow is logged once, and read as None.
            thinking_budget: at most about this many tokens of thought, then an answer. 0 is `thinking=False`, and
                refused with True, as any other budget is with False. A budget that is not reached changes nothing, even
                one larger than the context.
            early_stop_text: the sentence that ends a thought over its budget; by default Qwen's. Only with a budget.
            tools: JSON schemas of functions that the model may call.
            sampling: `SamplingParams`, or single options by name over the model card's profile for the mode.
            max_tokens: by default 32,768, and never more than the context has room for.
            seed: the same seed gives the same reply.
            stop: end before the first of these texts in the content; reasoning and calls may hold them. At most 64,
                of 1,024 characters each.
            skip_special_tokens: whether special tokens leave no text in the reply; end tokens never do.
            stop_on_loop: end a reply that repeats itself without end, as `mlxqwen.engine.loops` defines it.
            trust_special_tokens: whether tokens spelled in the conversation, such as `<|im_end|>`, become those
                tokens. By default they are text, so that nobody can forge a turn, a thought or a call.
            drop_oldest: answer what `fit` leaves of a conversation that is too long, rather than raise.
            template_variables: further variables of the chat template, by name.
            add_generation_prompt: whether the header of the answer follows the messages.
            continue_final_message: whether the reply goes on with the last message, which is the assistant's then; by
                default wherever it is.
            cache: a `KVCache` that the prompt follows; see `mlxqwen.stream_generate`.
            max_kv_size, keep, kv_bits: of a new cache; see `mlxqwen.make_cache`.
            logprobs: tell with each token, in `Done.logprobs`, how likely it was, and so many of the likeliest; see
                `mlxqwen.engine.logprobs`.
            prefill_chunk, on_prefill, priority, salt: see `mlxqwen.stream_generate`.
            constraints: what restricts the draws; see `mlxqwen.engine.options`.
            response_format: what the content has to be, behind a free thought: a pydantic model, a JSON Schema,
                OpenAI's `response_format`, or vLLM's `{"regex": …}`, `{"choice": […]}` and `{"grammar": …}`; see
                docs/structured_output.md. A reply that ends by `max_tokens`, `stop` or `stop_on_loop` may be cut off.
            tool_choice: "auto", "none", "required", or one function as in OpenAI's API. Calls that are required, and
                those of tools with `strict`, fit the tools' schemas.
            parallel_tool_calls: False for at most one call in a reply.

        Raises:
            MessagesError, TemplateError, OptionError, ContextLengthError: at once, before the first event is asked for.
            GenerationError: while iterating.
        """
        self.check_open()
        check_budget_use(self.tokenizer, thinking, thinking_budget, early_stop_text)
        options = ChatOptions(
            thinking=thinking,
            thinking_budget=thinking_budget,
            early_stop_text=early_stop_text,
            tools=tools,
            sampling=sampling,
            max_tokens=max_tokens,
            seed=seed,
            stop=stop,
            skip_special_tokens=skip_special_tokens,
            stop_on_loop=stop_on_loop,
            trust_special_tokens=trust_special_tokens,
            drop_oldest=drop_oldest,
            template_variables=template_variables,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            cache=cache,
            max_kv_size=max_kv_size,
            keep=keep,
            kv_bits=kv_bits,
            logprobs=logprobs,
            prefill_chunk=prefill_chunk,
            on_prefill=on_prefill,
            priority=priority,
            salt=salt,
            constraints=constraints,
            response_format=response_format,
            tool_choice=tool_choice,
            parallel_tool_calls=parallel_tool_calls,
        )
        request, _ = self._responder.request(as_messages(messages), options)
        return events_of(lambda: self._submit(request, on_prefill))

    def reply(
        self,
        prompt: Sequence[int] | str,
        *,
        on_prefill: OnPrefill = None,
        **options: Any,
    ) -> Iterator[Event]:
        """Answer a prompt given as ids, such as `prompt` makes: the part of `stream` below messages.

        Args:
            prompt: ids, or text. Their end tells whether the reply begins in thought.
            on_prefill: see `mlxqwen.stream_generate`.
            **options: those of `mlxqwen.stream_generate`, but that `stop` ends the content alone. With `split=False`
                all of the reply is content, its tags included.

        Raises:
            OptionError, ContextLengthError: at once, before the first event is asked for.
            GenerationError: while iterating.
        """
        self.check_open()
        check_keywords("Engine.reply", options, stream_generate, "split")
        own = {"speculative": self.speculative, "draft_tokens": self.draft_tokens, **options}
        reports = on_prefill is not None
        request = text_request(self.model, self.tokenizer, prompt, reports_progress=reports, **own)
        return events_of(lambda: self._submit(request, on_prefill))

    def _submit(self, request: Request, on_prefill: OnPrefill) -> Handle:
        handle = self.scheduler.submit(request)
        handle.on_prefill = on_prefill
        return handle

    def run_tools(
        self,
        messages: Messages | str,
        tools: Tools,
        *,
        max_rounds: int = DEFAULT_MAX_ROUNDS,
        **options: Any,
    ) -> ToolRun:
        """Answer a conversation with the help of functions: the last event of `stream_tools`."""
        from mlxqwen.engine.tool_loop import ToolRun

        events = self.stream_tools(messages, tools, max_rounds=max_rounds, **options)
        return next(event for event in events if isinstance(event, ToolRun))

    def stream_tools(
        self,
        messages: Messages | str,
        tools: Tools,
        *,
        max_rounds: int = DEFAULT_MAX_ROUNDS,
        **options: Any,
    ) -> Iterator[ToolEvent]:
        """Answer a conversation with the help of functions, as `mlxqwen.engine.tool_loop.stream_tool_loop` says.

        Args:
            messages: the conversation; never modified.
            tools: functions by name, or a list of functions; their schemas come from their signatures and docstrings.
            max_rounds: the most replies.
            **options: those of `stream`, for each reply, except `tools` and `cache`. A `tool_choice` that asks for a
                call asks the first reply alone.
        """
        from mlxqwen.engine.tool_loop import stream_tool_loop, tool_choices

        _refuse_cache(options)
        option_names("a run with tools", options, "tools", "cache")
        choices = tool_choices(options.get("tool_choice"))

        def answer(messages: Messages, schemas: Sequence[Mapping[str, Any]]) -> Iterator[Event]:
            return self.stream(messages, **{**options, "tools": schemas, "tool_choice": next(choices)})

        return stream_tool_loop(answer, as_messages(messages), tools, max_rounds=max_rounds)

    def batch(
        self,
        conversations: Iterable[Messages | str | ChatRequest],
        *,
        batch_size: int = DEFAULT_BATCH_SIZE,
        on_error: Callable[[int, MlxqwenError], None] | None = None,
        **options: Any,
    ) -> Iterator[tuple[int, Done]]:
        """Answer many conversations, many at once, each as it would be alone.

        Args:
            conversations: lists of messages, texts of a user, or `ChatRequest` for options of their own. Taken as they
                are needed.
            batch_size: how many run at once; memory grows with it. Where one ends, the next begins.
            on_error: told of a conversation that cannot be answered, which is then left out.
            **options: those of `stream`, for all, except `cache`.

        Returns:
            `(index, done)` in the order in which replies end.

        Raises:
            OptionError: at once, for a batch size or options for all that are out of range.
            MlxqwenError: while iterating, for a conversation that cannot be answered, if there is no `on_error`.
        """
        self.check_open()
        _refuse_cache(options)
        option_names("a batch", options, "cache")
        return answer_batch(
            self._responder,
            self.scheduler,
            conversations,
            options,
            batch_size=batch_size,
            on_error=on_error,
        )

    def prompt(
        self,
        messages: Messages | str,
        *,
        thinking: bool | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        trust_special_tokens: bool = False,
    ) -> list[int]:
        """The ids that the model sees of a conversation, up to where its answer begins.

        Reasoning before the last question is left out, whatever the template does; what follows it, such as that of
        the current tool loop, stays.

        If the last message is the assistant's, the reply continues it. So a message with only an empty think block,
        `<think>\n\n</think>\n\n`, keeps the model from thinking in this reply; a message with text is the beginning
        of the answer, which Qwen3's template puts after a closed think block.

        Raises:
            MessagesError: messages, or schemas of tools, that are not valid.
            OptionError: `thinking` is no switch.
            TemplateError: see `Tokenizer.apply_chat_template`.
        """
        options = ChatOptions(thinking=thinking, tools=tools, trust_special_tokens=trust_special_tokens)
        return self._responder.render(as_messages(messages), options)

    def fit(
        self,
        messages: Messages | str,
        *,
        max_tokens: int | None = None,
        thinking: bool | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        trust_special_tokens: bool = False,
        cache: KVCache | None = None,
        max_kv_size: int | None = None,
    ) -> list[Mapping[str, Any]]:
        """The messages without as few of the oldest turns as needed for the reply to have room.

        The system message and the last turn always stay; a call of a tool and its result go together.

        Args:
            messages: never modified; what comes back holds the same dicts.
            max_tokens: the most that the reply may have. Room is left for it, at most a quarter of the
                context, which is the default, too.
            thinking, tools, trust_special_tokens: as for `prompt`.
            cache: what it holds already takes room too. In one that slides within the context everything fits.
            max_kv_size: of a new cache.

        Raises:
            ContextLengthError: the last turn alone is too long.
        """
        options = ChatOptions(
            max_tokens=max_tokens,
            thinking=thinking,
            tools=tools,
            trust_special_tokens=trust_special_tokens,
            cache=cache,
            max_kv_size=max_kv_size,
        )
        return self._responder.fit(as_messages(messages), options)

    def sampling_for(self, messages: Messages | str, **options: Any) -> SamplingParams:
        """The `SamplingParams` that `stream` would use for `messages`.

        The mode is what the template makes of the hard switch; where it leaves the model free, the soft switches tell.
        A model whose thinking budget is 0 does not think.

        Args:
            messages: as for `stream`. They may be too long for the context.
            **options: those of `stream`.
        """
        option_names("a chat", options)
        return self._responder.sampling(as_messages(messages), ChatOptions(**options))


def _refuse_cache(options: Mapping[str, Any]) -> None:
    if options.get("cache") is not None:
        raise OptionError("cache: found one, expected none", hint="Each prompt here is whole, and begins anew.")
