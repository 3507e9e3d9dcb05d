"""Text in, text out: one prompt as a stream, or many at once.

Both stand in one file, as they take the same options and make the same requests of them.
"""

from __future__ import annotations

import logging
import sys
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from mlxqwen.cache import KVCache
from mlxqwen.chat.thinking import begins_in_thought
from mlxqwen.chat.thinking_modes import thinking_modes
from mlxqwen.checks import as_token_ids, check_token_ids, is_integer
from mlxqwen.console import Output, counted
from mlxqwen.engine.generation import FinishReason
from mlxqwen.engine.given import check_loaded
from mlxqwen.engine.logprobs import TokenLogprobs
from mlxqwen.engine.options import ConstraintFactory
from mlxqwen.engine.request import DEFAULT_DRAFT_TOKENS, CacheKind, Request, check_request
from mlxqwen.engine.token_stream import OnPrefill, TokenStream, by_row, check_rows
from mlxqwen.errors import OptionError
from mlxqwen.model.qwen3 import Qwen3ForCausalLM
from mlxqwen.sampling.params import SamplingParams, resolve_sampling
from mlxqwen.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from mlxqwen.chat.structured.tool_choice import CallRules
    from mlxqwen.engine.speculation.drafter import Speculative

__all__ = [
    "GenerationResponse",
    "ResponseStream",
    "Sampling",
    "batch_generate",
    "batch_stream",
    "check_keywords",
    "drafts_line",
    "end_token_ids",
    "generate",
    "resolve_params",
    "stream_generate",
    "text_request",
    "yarn_line",
]

logger = logging.getLogger("mlxqwen")

Prompt = str | Sequence[int] | Any
Sampling = SamplingParams | Mapping[str, Any] | None


@dataclass(frozen=True, slots=True)
class GenerationResponse:
    """One more token of an answer.

    Args:
        text: the text that is now certain; may be empty in the middle of a character or of a possible stop string.
        token: its id.
        prompt_tokens: length of the prompt.
        prompt_tps: prompt tokens per second, those of the cache not counted.
        generation_tokens: tokens so far.
        generation_tps: tokens per second since the first.
        peak_memory: most memory that MLX has held, in GB.
        finish_reason: on the last one, "stop" (end token or stop string), "length" or "loop".
        reasoning_tokens: tokens of thought so far; see `mlxqwen.Usage`.
        budget_exhausted: whether the thinking budget has ended the thought.
        cached_tokens: how many of the prompt's tokens were not read, as they were known.
        drafted_tokens, accepted_tokens: of speculative decoding: tokens guessed so far, and those of them that were
            right.
        yarn_factor: see `mlxqwen.Done`.
        logprobs: how likely the token was, if that was asked for.
    """

    text: str
    token: int
    prompt_tokens: int
    prompt_tps: float
    generation_tokens: int
    generation_tps: float
    peak_memory: float
    finish_reason: FinishReason | None
    reasoning_tokens: int = 0
    budget_exhausted: bool = False
    cached_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    yarn_factor: float | None = None
    logprobs: TokenLogprobs | None = None


def text_request(
    model: Qwen3ForCausalLM,
    tokenizer: Tokenizer,
    prompt: Prompt,
    *,
    sampling: Sampling = None,
    max_tokens: int | None = None,
    expect_thought: bool = False,
    cache: KVCache | CacheKind | None = None,
    speculative: Speculative = None,
    noted: set[str] | None = None,
    calls: CallRules | None = None,
    **options: Any,
) -> Request:
    """A checked request to continue a text or token ids.

    Args:
        sampling: `SamplingParams`, or single options over the profile that the prompt's mode has.
        max_tokens: by default 32,768.
        expect_thought: whether a reply that the prompt leaves free begins in thought without a tag of its own.
        speculative: what guesses.
        noted: what was noted of `generation_config.json` already, and is not noted again; added to.
        calls: which calls of tools the reply makes; None for what the model likes.
        **options: further fields of `Request`, and single options of `SamplingParams`.

    Raises:
        OptionError, ContextLengthError, CacheError: it cannot be answered.
    """
    sampling = _with_single(sampling, {name: options.pop(name) for name in _SAMPLING_NAMES & options.keys()})
    ids = tokenizer.encode(prompt) if isinstance(prompt, str) else as_token_ids(prompt)
    if ids and isinstance(ids[0], Mapping):
        raise OptionError(
            "prompt: found messages, expected text or token ids",
            hint="Render them with tokenizer.apply_chat_template(messages, add_generation_prompt=True), or use Engine.",
        )
    if cache is not None and not isinstance(cache, KVCache | CacheKind):
        raise OptionError(f"cache: found {type(cache).__name__}, expected what make_cache(model) returns")
    if not isinstance(prompt, str):
        ids = check_token_ids("prompt", ids, model.config.vocab_size)
    drafter = None
    if speculative is not None:
        from mlxqwen.engine.speculation.drafter import as_drafter

        drafter = as_drafter(speculative, model.config)
    begins = begins_in_thought(tokenizer, ids) if ids else None
    if isinstance(sampling, SamplingParams):
        params = sampling
    else:
        thinks = thinking_modes(tokenizer).default if begins is None else begins
        params = resolve_params(model, sampling, thinking=thinks, noted=noted)
    ends = frozenset(end_token_ids(model, tokenizer))
    if options.get("response_format") is not None or (calls is not None and not calls.is_free):
        made = _reply_constraint(model, tokenizer, ends, options.get("response_format"), calls)
        options["constraints"] = (*options.get("constraints", ()), *made)
    request = Request(
        prompt=tuple(ids),
        sampling=params,
        max_tokens=max_tokens,
        end_token_ids=ends,
        tokenizer=tokenizer,
        begins_in_thought=True if begins is None and expect_thought else begins,
        cache=CacheKind() if cache is None else cache,
        drafter=drafter,
        **options,
    )
    check_request(request, model)
    return request


def _reply_constraint(
    model: Qwen3ForCausalLM,
    tokenizer: Tokenizer,
    ends: frozenset[int],
    response_format: object,
    calls: CallRules | None,
) -> tuple[ConstraintFactory, ...]:
    """What keeps the reply to a form and to the calls that it may make. Raises `OptionError`."""
    from mlxqwen.chat.structured.reply_rules import reply_constraint  # of no use to most replies
    from mlxqwen.chat.structured.response_format import read_response_format
    from mlxqwen.chat.structured.tool_choice import CallRules

    rules = CallRules("auto", (), most_one=False) if calls is None else calls
    made = reply_constraint(tokenizer, model.config.vocab_size, ends, read_response_format(response_format), rules)
    return () if made is None else (made,)


def stream_generate(
    model: Qwen3ForCausalLM,
    tokenizer: Tokenizer,
    prompt: Prompt,
    *,
    max_tokens: int | None = None,
    sampling: Sampling = None,
    stop: str | Sequence[str] = (),
    thinking_budget: int | None = None,
    early_stop_text: str | None = None,
    skip_special_tokens: bool = True,
    stop_on_loop: bool = False,
    expect_thought: bool = False,
    tools: bool = False,
    cache: KVCache | CacheKind | None = None,
    cached_tokens: int | None = None,
    logprobs: int | None = None,
    prefill_chunk: int | None = None,
    on_prefill: OnPrefill = None,
    speculative: Speculative = None,
    draft_tokens: int = DEFAULT_DRAFT_TOKENS,
    priority: int = 0,
    salt: str = "",
    constraints: Sequence[ConstraintFactory] = (),
    response_format: object = None,
    **single: Any,
) -> Iterator[GenerationResponse]:
    """Continue `prompt`, a text or token ids (a list or an array), yielding text as it becomes certain.

    Args:
        max_tokens: at most this many, by default 32,768, and no more than the context has room for. If the model scales
            by request (`load(…, yarn="auto")`), prompt and a limit that is given decide the factor.
        sampling: `SamplingParams`, or single options by name over the profile of the model card; by default that
            profile. The prompt tells the mode: one that ends in a closed think block is not to be thought about, nor
            does a model think whose chat template has no switch for it and opens no think block.
        stop: end before the first of these texts: at most 64 of 1,024 characters.
        thinking_budget: at most about this many tokens of thought, then an answer; see
            `mlxqwen.chat.budget.ThinkingBudget`. Up to there the reply is that of the same seed without a budget.
        early_stop_text: the sentence that ends a thought over its budget; by default Qwen's.
        skip_special_tokens: whether special tokens leave no text; end tokens never do.
        stop_on_loop: end a reply that repeats itself without end, as `mlxqwen.engine.loops` defines it.
        expect_thought: whether a reply that the prompt leaves free begins in thought without a `<think>` of its own.
        tools: whether the model may call tools: a call that nothing follows ends its thought.
        cache: a `KVCache` of one row that holds what came before the prompt, and at the end everything but the last
            token (a device that overlaps steps may have added that too: `offsets` tell). By default what
            was read of other prompts is shared.
        cached_tokens: how many of the cache's first tokens are those of the prompt: these are not read again, and what
            the cache holds after them is forgotten as generation starts. By default the prompt follows all it
            holds.
        logprobs: tell with each token how likely it was, and so many of the likeliest, up to 20.
        prefill_chunk: prompt tokens a step; memory grows with it, and by default it is kept small.
        on_prefill: called with (tokens done, tokens in all) before the first chunk and after each; tokens that were
            known are not counted.
        speculative: guess several tokens at once, and let one pass of the model check them: "lookup" guesses that the
            text goes on as it did before, a `mlxqwen.DraftModel` guesses what a smaller model would say. The reply is
            the same except for rounding: logits of several positions are computed by other kernels than those of one,
            and two tokens that are all but equally likely may change places. On a CPU, where a pass over several tokens
            costs nearly as much as one pass for each, all but tiny models get slower. Nothing is guessed while other
            replies of the model run.
        draft_tokens: the most that are guessed at once, up to 64.
        priority: -100 to 100; where replies wait for each other, lower goes first.
        salt: only requests of the same salt share what was read of their prompts.
        constraints: what restricts the draws; see `mlxqwen.engine.options`.
        response_format: what the text has to be, behind a thought; see `mlxqwen.Engine.stream`.
        **single: options of `SamplingParams` by name, in place of `sampling`: `temperature=0.7, seed=1`.

    Raises:
        OptionError, ContextLengthError, CacheError: at once.
        GenerationError: while iterating, if the model's logits are NaN.
    """
    check_keywords("stream_generate", single, stream_generate)
    check_loaded(model, tokenizer, "stream_generate(model, tokenizer, prompt)")
    if is_integer(prompt):
        raise OptionError(f"prompt: found {prompt}, expected text or token ids")
    responses = batch_stream(
        model,
        tokenizer,
        [prompt],
        max_tokens=max_tokens,
        sampling=[sampling],
        stop=stop,
        thinking_budget=[thinking_budget],
        early_stop_text=early_stop_text,
        skip_special_tokens=skip_special_tokens,
        stop_on_loop=stop_on_loop,
        expect_thought=[expect_thought],
        tools=tools,
        cache=cache,
        cached_tokens=cached_tokens,
        logprobs=logprobs,
        prefill_chunk=prefill_chunk,
        on_prefill=on_prefill,
        speculative=speculative,
        draft_tokens=draft_tokens,
        priority=priority,
        salt=salt,
        constraints=constraints,
        response_format=response_format,
        **single,
    )
    return (response for _, response in responses)


_ELSEWHERE = {
    "temp": "temperature=…",
    "max_new_tokens": "max_tokens=…",
    "max_length": "max_tokens=…, which does not count the prompt",
    "do_sample": "temperature=0 for the most likely tokens",
    "sampler": "sampling=SamplingParams(…), or temperature=…, top_p=… and so on",
    "logits_processors": "constraints=…, or presence_penalty=…, repetition_penalty=…, logit_bias=…",
    "prompt_cache": "cache=make_cache(model)",
    "past_key_values": "cache=make_cache(model)",
    "max_kv_size": "cache=make_cache(model, max_kv_size=…)",
    "kv_bits": "cache=make_cache(model, kv_bits=…)",
    "kv_group_size": "cache=make_cache(model, kv_bits=…, kv_group_size=…)",
    "prefill_step_size": "prefill_chunk=…",
    "prompt_progress_callback": "on_prefill=…",
    "draft_model": "speculative=DraftModel(model)",
    "num_draft_tokens": "draft_tokens=…",
    "stop_strings": "stop=…",
    "streamer": "for piece in stream_generate(…)",
    "enable_thinking": "tokenizer.apply_chat_template(…, enable_thinking=…), or Engine.chat(…, thinking=…)",
}
"""What keywords of other libraries are here."""

_SAMPLING_NAMES = frozenset(one.name for one in fields(SamplingParams))


def check_keywords(name: str, given: Iterable[str], function: Callable[..., Any], *more: str) -> None:
    """Raise `TypeError` for what is no keyword of `function`, no sampling option and not among `more`."""
    known = {*(function.__kwdefaults__ or ()), *_SAMPLING_NAMES, *more}
    for keyword in given:
        if keyword not in known:
            way_out = f"; here it is {_ELSEWHERE[keyword]}" if keyword in _ELSEWHERE else ""
            raise TypeError(f"{name}() got an unexpected keyword argument {keyword!r}{way_out}")


def _with_single(sampling: Sampling, single: Mapping[str, Any]) -> Sampling:
    """Add sampling options that were given by themselves. Raises `OptionError` for one that is given twice."""
    if not single:
        return sampling
    if isinstance(sampling, SamplingParams):
        raise OptionError(
            f"{next(iter(single))}: found beside sampling=SamplingParams(…), expected one of them",
            hint=f"Give sampling=dataclasses.replace(params, {next(iter(single))}=…), or no SamplingParams.",
        )
    for name in sampling or ():
        if name in single:
            raise OptionError(f"{name}: found beside sampling and in it, expected one of them")
    return {**(sampling or {}), **single}


def batch_stream(
    model: Qwen3ForCausalLM,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    *,
    on_prefill: OnPrefill = None,
    **options: Any,
) -> ResponseStream:
    """Continue many prompts at once, yielding `(row, response)` as text becomes certain.

    Each row gets the text that it would get alone (with a seed, that very text), and leaves when it ends;
    `ResponseStream.add` lets another join.

    Args:
        prompts: texts or lists of ids.
        **options: those of `stream_generate`; `max_tokens`, `sampling`, `thinking_budget`, `expect_thought` and `tools`
            for all, or a list with one for each prompt. A `cache` has a row for each prompt.
    """
    check_keywords("batch_stream", options, stream_generate)
    check_loaded(model, tokenizer, "batch_stream(model, tokenizer, prompts)")
    given = [] if isinstance(prompts, str) else as_token_ids(prompts)
    if not given or is_integer(given[0]):
        found = "one prompt" if given or prompts else "none"
        raise OptionError(
            f"prompts: found {found}, expected a list of at least one text or list of token ids",
            hint="A single prompt goes into a list of its own: [prompt].",
        )
    check_rows(options.get("cache"), len(given))
    own = {name: by_row(name, options.pop(name), len(given)) for name in _OF_A_ROW if name in options}
    stream = ResponseStream(model, tokenizer, on_prefill, options)
    for row, prompt in enumerate(given):
        stream.append(prompt, row, {name: values[row] for name, values in own.items()})
    return stream


_OF_A_ROW = ("max_tokens", "sampling", "thinking_budget", "expect_thought", "tools")


class ResponseStream:
    """The iterator that `batch_stream` returns: `add` prompts while others run, and `stop` rows early."""

    def __init__(
        self, model: Qwen3ForCausalLM, tokenizer: Tokenizer, on_prefill: OnPrefill, options: Mapping[str, Any]
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._options = dict(options)
        self._reports = on_prefill is not None
        self._stream = TokenStream(model, on_prefill)
        self._noted: set[str] = set()

    def __iter__(self) -> Iterator[tuple[int, GenerationResponse]]:
        return self

    def __next__(self) -> tuple[int, GenerationResponse]:
        row, token, handle = self._stream.next_row()
        text = "".join(delta.content or "" for delta in token.deltas)
        return row, GenerationResponse(
            text=text,
            token=token.token,
            prompt_tokens=len(handle.request.prompt),
            prompt_tps=handle.prompt_speed(),
            generation_tokens=handle.token_count,
            generation_tps=handle.decode_speed(),
            peak_memory=mx.get_peak_memory() / 1e9,
            finish_reason=token.finish_reason,
            reasoning_tokens=token.reasoning_tokens,
            budget_exhausted=token.budget_exhausted,
            cached_tokens=handle.cached_tokens,
            drafted_tokens=token.drafted_tokens,
            accepted_tokens=token.accepted_tokens,
            yarn_factor=handle.yarn_factor,
            logprobs=token.logprobs,
        )

    def append(self, prompt: Prompt, cache_row: int | None, own: Mapping[str, Any]) -> int:
        """Add a prompt that follows a row of the cache, or with None a new row → the number of its row."""
        request = text_request(
            self._model,
            self._tokenizer,
            prompt,
            split=False,
            cache_row=cache_row,
            reports_progress=self._reports,
            noted=self._noted,
            **{**self._options, **own},
        )
        return self._stream.submit(request)

    def add(
        self,
        prompt: Prompt,
        *,
        max_tokens: int | None = None,
        sampling: Sampling = None,
        thinking_budget: int | None = None,
        expect_thought: bool = False,
        tools: bool = False,
    ) -> int:
        """Add a prompt → the number of its row, which gets the text that it would get alone.

        For the options see `stream_generate`; the others are those that the stream began with.

        Raises:
            OptionError, ContextLengthError: as `stream_generate`; also once the stream is over. The others go on.
        """
        own = {
            "max_tokens": max_tokens,
            "sampling": sampling,
            "thinking_budget": thinking_budget,
            "expect_thought": expect_thought,
            "tools": tools,
            "cached_tokens": None,
        }
        return self.append(prompt, None, own)

    def stop(self, row: int) -> None:
        """End `row` now. Raises `OptionError` if there is no such row."""
        self._stream.stop(row)

    def close(self) -> None:
        """End all rows."""
        self._stream.close()


def generate(
    model: Qwen3ForCausalLM, tokenizer: Tokenizer, prompt: Prompt, *, verbose: bool = False, **options: Any
) -> str:
    """Continue `prompt` and return the whole text, think block included.

    Args:
        verbose: also write the text as it comes, and the speed at the end, to standard output.
        **options: those of `stream_generate`.
    """
    check_keywords("generate", options, stream_generate)
    check_loaded(model, tokenizer, "generate(model, tokenizer, prompt)")
    pieces = []
    last = None
    output = Output(sys.stdout)
    for last in stream_generate(model, tokenizer, prompt, **options):
        pieces.append(last.text)
        if verbose:
            output.write(last.text)
    if verbose and last is not None:
        output.end_line()
        output.write(
            f"{'=' * 10}\n"
            f"Prompt: {counted(last.prompt_tokens, 'token')}, {last.prompt_tps:.1f} tokens/s\n"
            f"Answer: {counted(last.generation_tokens, 'token')}, {last.generation_tps:.1f} tokens/s\n"
            f"{drafts_line('Drafts', last.drafted_tokens, last.accepted_tokens)}"
            f"{yarn_line('YaRN', last.yarn_factor)}"
            f"Peak memory: {last.peak_memory:.3f} GB\n"
        )
    return "".join(pieces)


def drafts_line(title: str, drafted: int, accepted: int) -> str:
    """A line that tells how many guesses were right; empty if there were none."""
    if not drafted:
        return ""
    return f"{title}: {drafted:,} tokens, {accepted:,} of them accepted ({accepted / drafted:.0%})\n"


def yarn_line(title: str, factor: float | None) -> str:
    """A line that tells the YaRN factor of a reply; empty where the model does not scale by request."""
    if factor is None:
        return ""
    return f"{title}: {'not scaled' if factor == 1 else f'factor {factor:g}'}\n"


def batch_generate(
    model: Qwen3ForCausalLM, tokenizer: Tokenizer, prompts: Sequence[Prompt], **options: Any
) -> list[str]:
    """Continue many prompts at once; each gets the text that it would get alone (with a seed, that very text).

    Args:
        prompts: texts or lists of ids.
        **options: those of `batch_stream`.
    """
    check_keywords("batch_generate", options, stream_generate)
    check_loaded(model, tokenizer, "batch_generate(model, tokenizer, prompts)")
    pieces: defaultdict[int, list[str]] = defaultdict(list)
    for row, response in batch_stream(model, tokenizer, prompts, **options):
        pieces[row].append(response.text)
    return ["".join(pieces[row]) for row in sorted(pieces)]


def end_token_ids(model: Qwen3ForCausalLM, tokenizer: Tokenizer) -> Collection[int]:
    """The tokens that end a reply: those of `config.json`, `generation_config.json` and the tokenizer."""
    from_tokenizer = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
    return {*model.config.eos_token_ids, *model.generation_config.eos_token_ids, *from_tokenizer}


def resolve_params(
    model: Qwen3ForCausalLM, sampling: Sampling, *, thinking: bool, noted: set[str] | None = None
) -> SamplingParams:
    """`sampling` if it is `SamplingParams`, else single options over `generation_config.json` and the profile.

    Values of that file that are ignored are logged, except those in `noted`; they are added to it.
    """
    if isinstance(sampling, SamplingParams):
        return sampling
    if sampling is not None and not isinstance(sampling, Mapping):
        raise OptionError(f"sampling: found {type(sampling).__name__}, expected SamplingParams or options by name")
    quantization = model.config.quantization
    params, notes = resolve_sampling(
        model.generation_config.values,
        thinking=thinking,
        overrides=sampling or {},
        bits=None if quantization is None else quantization.default.bits,
    )
    noted = set() if noted is None else noted
    for note in notes:
        if note not in noted:
            noted.add(note)
            logger.warning(note)
    return params
