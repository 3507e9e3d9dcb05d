"""Text in → text out with a model and a tokenizer: one prompt, as a stream, or many at once."""

from __future__ import annotations

import logging
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar, Unpack, cast

import mlx.core as mx

from mlxqwen.cache import KVCache
from mlxqwen.chat.thinking import ThinkingBudget, begins_in_thought, can_think
from mlxqwen.console import Output
from mlxqwen.engine.generation import (
    DEFAULT_DRAFT_TOKENS,
    DEFAULT_MAX_TOKENS,
    FinishReason,
    GeneratedToken,
    Tokens,
    TokenStream,
    as_token_ids,
    check_prompt,
    generate_tokens,
)
from mlxqwen.engine.loops import LoopDetector
from mlxqwen.errors import OptionError
from mlxqwen.model.qwen3 import Qwen3ForCausalLM
from mlxqwen.sampling.params import SamplingParams, resolve_sampling
from mlxqwen.text.stop import StopStrings
from mlxqwen.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from mlxqwen.engine.speculation.drafter import DraftCounts, Speculative
    from mlxqwen.engine.speculation.stream import SpeculativeStream

__all__ = [
    "BatchOptions",
    "GenerationResponse",
    "ResponseStream",
    "StreamOptions",
    "batch_generate",
    "batch_stream",
    "begins_in_thought",
    "can_think",
    "drafts_line",
    "end_token_ids",
    "generate",
    "resolve_params",
    "stream_generate",
]

logger = logging.getLogger("mlxqwen")

Prompt = str | Tokens
Sampling = SamplingParams | Mapping[str, Any] | None

_T = TypeVar("_T")


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
        reasoning_tokens: tokens of thought so far; see `mlxqwen.chat.thinking.ThinkingBudget`.
        budget_exhausted: whether the thinking budget has ended the thought.
        cached_tokens: how many of the prompt's tokens were not read, as the cache held them.
        drafted_tokens, accepted_tokens: of speculative decoding: tokens guessed so far, and those of them that were
            right.
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


class _Options(TypedDict, total=False):
    stop: str | Sequence[str]
    early_stop_text: str | None
    stop_on_loop: bool
    cache: KVCache | None
    cached_tokens: int | None
    prefill_chunk: int | None
    on_prefill: Callable[[int, int], None] | None
    speculative: Speculative
    draft_tokens: int


class StreamOptions(_Options, total=False):
    """The options of `stream_generate`, for functions that pass them on."""

    max_tokens: int
    sampling: Sampling
    thinking_budget: int | None
    expect_thought: bool
    tools: bool


class BatchOptions(_Options, total=False):
    """The options of `batch_stream`, for functions that pass them on."""

    max_tokens: int | Sequence[int]
    sampling: Sampling | Sequence[Sampling]
    thinking_budget: int | Sequence[int | None] | None
    expect_thought: bool | Sequence[bool]
    tools: bool | Sequence[bool]


def stream_generate(
    model: Qwen3ForCausalLM,
    tokenizer: Tokenizer,
    prompt: Prompt,
    *,
    max_tokens: int = DEFAULT_MAX_TOKENS,
    sampling: Sampling = None,
    stop: str | Sequence[str] = (),
    thinking_budget: int | None = None,
    early_stop_text: str | None = None,
    stop_on_loop: bool = False,
    expect_thought: bool = False,
    tools: bool = False,
    cache: KVCache | None = None,
    cached_tokens: int | None = None,
    prefill_chunk: int | None = None,
    on_prefill: Callable[[int, int], None] | None = None,
    speculative: Speculative = None,
    draft_tokens: int = DEFAULT_DRAFT_TOKENS,
) -> Iterator[GenerationResponse]:
    """Continue `prompt`, a text or token ids (a list or an array), yielding text as it becomes certain.

    Args:
        max_tokens: at most this many, and no more than the context has room for.
        sampling: `SamplingParams`, or single options by name over the profile of the model card; by default that
            profile. The prompt tells the mode: one that ends in a closed think block is not to be thought about, nor
            does a model think whose chat template knows no think block.
        stop: end before the first of these texts.
        thinking_budget: at most about this many tokens of thought, then an answer; see
            `mlxqwen.chat.thinking.ThinkingBudget`. Up to there the reply is that of the same seed without a budget.
        early_stop_text: the sentence that ends a thought over its budget; by default Qwen's.
        stop_on_loop: end a reply that repeats itself without end, as `mlxqwen.engine.loops` defines it.
        expect_thought: whether a reply that the prompt leaves free begins in thought without a `<think>` of its own.
        tools: whether the model may call tools: a call ends its thought.
        cache: see `generate_tokens`; also for `cached_tokens`, `prefill_chunk` and `on_prefill`.
        speculative: guess several tokens at once, and let one pass of the model check them: "lookup" guesses that the
            text goes on as it did before, a `mlxqwen.DraftModel` guesses what a smaller model would say. The reply is
            the same but for rounding: logits of several positions are computed by other kernels than those of one, and
            two tokens that are all but equally likely may change places. On a CPU, where a pass over several tokens
            costs nearly as much as so many passes, all but tiny models get slower.
        draft_tokens: the most that are guessed at once, up to 64.

    Raises:
        OptionError, ContextLengthError, GenerationError: see `generate_tokens`.
    """
    responses = batch_stream(
        model,
        tokenizer,
        [prompt],
        max_tokens=max_tokens,
        sampling=[sampling],
        stop=stop,
        thinking_budget=[thinking_budget],
        early_stop_text=early_stop_text,
        stop_on_loop=stop_on_loop,
        expect_thought=[expect_thought],
        tools=tools,
        cache=cache,
        cached_tokens=cached_tokens,
        prefill_chunk=prefill_chunk,
        on_prefill=on_prefill,
        speculative=speculative,
        draft_tokens=draft_tokens,
    )
    return (response for _, response in responses)


def batch_stream(
    model: Qwen3ForCausalLM,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    *,
    max_tokens: int | Sequence[int] = DEFAULT_MAX_TOKENS,
    sampling: Sampling | Sequence[Sampling] = None,
    stop: str | Sequence[str] = (),
    thinking_budget: int | Sequence[int | None] | None = None,
    early_stop_text: str | None = None,
    stop_on_loop: bool = False,
    expect_thought: bool | Sequence[bool] = False,
    tools: bool | Sequence[bool] = False,
    cache: KVCache | None = None,
    cached_tokens: int | None = None,
    prefill_chunk: int | None = None,
    on_prefill: Callable[[int, int], None] | None = None,
    speculative: Speculative = None,
    draft_tokens: int = DEFAULT_DRAFT_TOKENS,
) -> ResponseStream:
    """Continue many prompts at once, yielding `(row, response)` as text becomes certain.

    Each row gets the text that it would get alone (with a seed, that very text), and leaves when it ends;
    `ResponseStream.add` lets another join.

    Args:
        prompts: texts or lists of ids.
        max_tokens, sampling, thinking_budget, expect_thought, tools: for all, or one for each prompt; for these and
            the others see `stream_generate`.
        speculative: for one prompt only, which no other can join.
    """
    given = [] if isinstance(prompts, str) else as_token_ids(prompts)
    if not given or isinstance(given[0], int):
        found = "one prompt" if given or prompts else "none"
        raise OptionError(
            f"prompts: found {found}, expected a list of at least one text or list of token ids",
            hint="A single prompt goes into a list of its own: [prompt].",
        )
    ids = [_encode(model, tokenizer, prompt) for prompt in given]
    params = _params(model, tokenizer, ids, _one_a_row("sampling", sampling, len(ids)))
    new_row = _RowMaker(tokenizer, stop, early_stop_text, stop_on_loop)
    rows = [
        new_row(prompt, budget, expected, may_call, cached_tokens=cached_tokens or 0)
        for prompt, budget, expected, may_call in zip(
            ids,
            _one_a_row("thinking_budget", thinking_budget, len(ids)),
            _one_a_row("expect_thought", expect_thought, len(ids)),
            _one_a_row("tools", tools, len(ids)),
            strict=True,
        )
    ]
    ends = end_token_ids(model, tokenizer)
    how: dict[str, Any] = {
        "eos_token_ids": ends,
        "cache": cache,
        "cached_tokens": cached_tokens,
        "prefill_chunk": prefill_chunk,
        "on_prefill": on_prefill,
    }
    if speculative is None:
        plain = generate_tokens(model, ids, sampling=params, max_tokens=max_tokens, **how)
        return ResponseStream(model, plain, None, rows, ends, new_row)
    if len(ids) > 1:
        raise OptionError(
            f"speculative: found with {len(ids)} prompts, expected one",
            hint="Leave it out: the prompts of a batch share each pass of the model as it is.",
        )
    from mlxqwen.engine.speculation.drafter import as_drafter
    from mlxqwen.engine.speculation.stream import speculate_tokens

    (limit,) = _one_a_row("max_tokens", max_tokens, 1)
    stream = speculate_tokens(
        model,
        ids[0],
        as_drafter(speculative),
        draft_tokens=draft_tokens,
        sampling=params[0],
        max_tokens=limit,
        **how,
    )
    return ResponseStream(model, stream, stream.counts, rows, ends, new_row)


class ResponseStream:
    """What `batch_stream` returns: iterate it, `add` prompts while others run, and `stop` rows early."""

    def __init__(
        self,
        model: Qwen3ForCausalLM,
        stream: TokenStream | SpeculativeStream,
        drafts: DraftCounts | None,
        rows: Iterable[_Row],
        ends: Collection[int],
        new_row: _RowMaker,
    ) -> None:
        self._model = model
        self._stream = stream
        self._rows: dict[int, _Row] = {}  # those that have not ended
        self._begun = 0
        self._ends = ends
        self._new_row = new_row
        for row in rows:
            self._begin(row)
        self._responses = _responses(stream, drafts, self._rows, ends)

    def __iter__(self) -> Iterator[tuple[int, GenerationResponse]]:
        return self

    def __next__(self) -> tuple[int, GenerationResponse]:
        return next(self._responses)

    def add(
        self,
        prompt: Prompt,
        *,
        max_tokens: int = DEFAULT_MAX_TOKENS,
        sampling: Sampling = None,
        thinking_budget: int | None = None,
        expect_thought: bool = False,
        tools: bool = False,
    ) -> int:
        """Take in one more prompt → the number of its row, which gets the text that it would get alone.

        It joins after the step that is being told. For the options see `stream_generate`; the others are those that
        the stream began with.

        Raises:
            OptionError, ContextLengthError: as `stream_generate`; also once the stream is over. The others go on.
        """
        tokenizer = self._new_row.tokenizer
        ids = _encode(self._model, tokenizer, prompt)
        (params,) = _params(self._model, tokenizer, [ids], [sampling])
        row = self._new_row(ids, thinking_budget, expect_thought, tools)
        number = self._stream.add(ids, sampling=params, max_tokens=max_tokens)
        self._begin(row)
        return number

    def stop(self, row: int) -> None:
        """End `row` here: no further token of it is computed."""
        self._stream.stop(row)
        self._rows.pop(row, None)

    def close(self) -> None:
        """End all rows."""
        self._responses.close()

    def _begin(self, row: _Row) -> None:
        _begin(self._stream, self._begun, row, self._ends)
        self._rows[self._begun] = row
        self._begun += 1


def _begin(stream: TokenStream | SpeculativeStream, number: int, row: _Row, ends: Collection[int]) -> None:
    """Force what a reply has to begin with, where a budget of no thought asks for it."""
    stream.force(number, row.thinking.start(), unless={*row.thinking.closing, *ends})


def _responses(
    stream: TokenStream | SpeculativeStream, drafts: DraftCounts | None, rows: dict[int, _Row], ends: Collection[int]
) -> Generator[tuple[int, GenerationResponse], None, None]:
    for generated in stream:
        row = rows[generated.row]
        if generated.finish_reason != "stop" and (
            ending := row.thinking.feed(generated.token, forced=generated.forced)
        ):
            stream.force(generated.row, ending, unless={*row.thinking.closing, *ends})
        response = row.respond(generated, drafts)
        if response.finish_reason is not None:
            stream.stop(generated.row)
            del rows[generated.row]
        yield generated.row, response


@dataclass(frozen=True, slots=True)
class _RowMaker:
    """New rows of one stream, and what they have in common; for the options see `stream_generate`."""

    tokenizer: Tokenizer
    stop: str | Sequence[str]
    early_stop_text: str | None
    stop_on_loop: bool

    def __call__(
        self,
        prompt: Sequence[int],
        thinking_budget: int | None,
        expect_thought: bool,
        tools: bool,
        *,
        cached_tokens: int = 0,
    ) -> _Row:
        thinking = ThinkingBudget(
            self.tokenizer,
            prompt,
            budget=thinking_budget,
            early_stop_text=self.early_stop_text,
            expect_thought=expect_thought,
            tools=tools,
        )
        loops = LoopDetector() if self.stop_on_loop else None
        return _Row(self.tokenizer, len(prompt), cached_tokens, StopStrings(self.stop), thinking, loops)


class _Row:
    """One row's tokens → responses: its text up to a stop string or the end token, its thought, its end."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_tokens: int,
        cached_tokens: int,
        stops: StopStrings,
        thinking: ThinkingBudget,
        loops: LoopDetector | None,
    ) -> None:
        self.thinking = thinking
        self._prompt_tokens = prompt_tokens
        self._cached_tokens = cached_tokens
        self._detokenizer = tokenizer.detokenizer(skip_special_tokens=True)
        self._stops = stops
        self._loops = loops
        self._count = 0
        self._started, self._first = time.perf_counter(), 0.0

    def respond(self, generated: GeneratedToken, drafts: DraftCounts | None) -> GenerationResponse:
        """What the next token adds; `drafts` are those that it took."""
        now = time.perf_counter()
        self._first = self._first or now
        self._count += 1
        loops = self._loops is not None and self._loops.feed(generated.token)
        text, finish_reason = self._show(generated.token, generated.finish_reason or ("loop" if loops else None))
        if finish_reason is not None:
            self.thinking.finish()
        return GenerationResponse(
            text=text,
            token=generated.token,
            prompt_tokens=self._prompt_tokens,
            prompt_tps=(self._prompt_tokens - self._cached_tokens) / max(self._first - self._started, 1e-9),
            generation_tokens=self._count,
            generation_tps=(self._count - 1) / max(now - self._first, 1e-9),
            peak_memory=mx.get_peak_memory() / 1e9,
            finish_reason=finish_reason,
            reasoning_tokens=self.thinking.reasoning_tokens,
            budget_exhausted=self.thinking.exhausted,
            cached_tokens=self._cached_tokens,
            drafted_tokens=0 if drafts is None else drafts.drafted,
            accepted_tokens=0 if drafts is None else drafts.accepted,
        )

    def _show(self, token: int, finish_reason: FinishReason | None) -> tuple[str, FinishReason | None]:
        """The text that `token` makes certain, and how the row ends there, stop strings considered."""
        # A character that the last token leaves unfinished is never shown.
        text = "" if finish_reason == "stop" else self._detokenizer.add(token)
        shown, stopped = self._stops.feed(text)
        if finish_reason is not None and not stopped:
            shown += self._stops.finish()
            stopped = self._stops.found
        return shown, "stop" if stopped else finish_reason


def generate(
    model: Qwen3ForCausalLM,
    tokenizer: Tokenizer,
    prompt: Prompt,
    *,
    verbose: bool = False,
    **options: Unpack[StreamOptions],
) -> str:
    """Continue `prompt` and return the whole text, think block included.

    Args:
        verbose: also write the text as it comes, and the speed at the end, to standard output.
        **options: those of `stream_generate`.
    """
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
            f"Prompt: {last.prompt_tokens} tokens, {last.prompt_tps:.1f} tokens/s\n"
            f"Answer: {last.generation_tokens} tokens, {last.generation_tps:.1f} tokens/s\n"
            f"{drafts_line('Drafts', last.drafted_tokens, last.accepted_tokens)}"
            f"Peak memory: {last.peak_memory:.3f} GB\n"
        )
    return "".join(pieces)


def drafts_line(title: str, drafted: int, accepted: int) -> str:
    """How many guesses were right, on a line of its own; nothing where none were made."""
    if not drafted:
        return ""
    return f"{title}: {drafted:,} tokens, {accepted:,} of them accepted ({accepted / drafted:.0%})\n"


def batch_generate(
    model: Qwen3ForCausalLM,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    **options: Unpack[BatchOptions],
) -> list[str]:
    """Continue many prompts at once; each gets the text that it would get alone (with a seed, that very text).

    Args:
        prompts: texts or lists of ids.
        **options: those of `batch_stream`.
    """
    pieces: defaultdict[int, list[str]] = defaultdict(list)
    for row, response in batch_stream(model, tokenizer, prompts, **options):
        pieces[row].append(response.text)
    return ["".join(pieces[row]) for row in sorted(pieces)]


def end_token_ids(model: Qwen3ForCausalLM, tokenizer: Tokenizer) -> Collection[int]:
    """The tokens that end a reply: those of `config.json`, `generation_config.json` and the tokenizer."""
    from_tokenizer = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
    return {*model.config.eos_token_ids, *model.generation_config.eos_token_ids, *from_tokenizer}


def _encode(model: Qwen3ForCausalLM, tokenizer: Tokenizer, prompt: Prompt) -> list[int]:
    ids = tokenizer.encode(prompt) if isinstance(prompt, str) else as_token_ids(prompt)
    if ids and isinstance(ids[0], Mapping):
        raise OptionError(
            "prompt: found messages, expected text or token ids",
            hint="Render them with tokenizer.apply_chat_template(messages, add_generation_prompt=True), or use Engine.",
        )
    check_prompt(ids, model.config.vocab_size)
    return ids


def resolve_params(model: Qwen3ForCausalLM, sampling: Sampling, *, thinking: bool) -> SamplingParams:
    """`sampling` as it is if complete, else single options over `generation_config.json` and the card's profile."""
    params, notes = _resolve(model, sampling, thinking)
    _log([notes])
    return params


def _params(
    model: Qwen3ForCausalLM, tokenizer: Tokenizer, prompts: Sequence[Sequence[int]], sampling: Sequence[Sampling]
) -> list[SamplingParams]:
    """What each row is drawn with."""
    resolved = [_resolve(model, one, _thinks(tokenizer, prompt)) for prompt, one in zip(prompts, sampling, strict=True)]
    _log(notes for _, notes in resolved)
    return [params for params, _ in resolved]


def _resolve(model: Qwen3ForCausalLM, sampling: Sampling, thinking: bool) -> tuple[SamplingParams, tuple[str, ...]]:
    if isinstance(sampling, SamplingParams):
        return sampling, ()
    if sampling is not None and not isinstance(sampling, Mapping):
        raise OptionError(f"sampling: found {type(sampling).__name__}, expected SamplingParams or options by name")
    quantization = model.config.quantization
    return resolve_sampling(
        model.generation_config.values,
        thinking=thinking,
        overrides=sampling or {},
        bits=None if quantization is None else quantization.default.bits,
    )


def _log(notes: Iterable[tuple[str, ...]]) -> None:
    """Each note once, however many rows have it."""
    for note in dict.fromkeys(chain.from_iterable(notes)):
        logger.warning(note)


def _one_a_row(name: str, values: _T | Sequence[_T], rows: int) -> list[_T]:
    """A value for each row, from one for all or from a list of them."""
    each = cast(list[_T], list(values) if isinstance(values, list | tuple) else [values] * rows)
    if len(each) != rows:
        raise OptionError(f"{name}: found {len(each)} for {rows} prompts")
    return each


def _thinks(tokenizer: Tokenizer, prompt: Sequence[int]) -> bool:
    begins = begins_in_thought(tokenizer, prompt)
    return can_think(tokenizer) if begins is None else begins
