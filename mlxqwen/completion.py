"""Text in → text out with a model and a tokenizer: one prompt, as a stream, or many at once."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal, TypedDict, Unpack

import mlx.core as mx

from mlxqwen.cache import KVCache
from mlxqwen.console import Output
from mlxqwen.errors import OptionError
from mlxqwen.generation import (
    DEFAULT_MAX_TOKENS,
    DEFAULT_PREFILL_CHUNK,
    Tokens,
    TokenStream,
    as_token_ids,
    check_prompt,
    generate_tokens,
)
from mlxqwen.model import Qwen3ForCausalLM
from mlxqwen.sampling import SamplingParams, resolve_sampling
from mlxqwen.stop import StopStrings
from mlxqwen.tokenizer import Tokenizer

__all__ = [
    "GenerationResponse",
    "StreamOptions",
    "batch_generate",
    "begins_in_thought",
    "can_think",
    "end_token_ids",
    "generate",
    "resolve_params",
    "stream_generate",
]

logger = logging.getLogger("mlxqwen")

Prompt = str | Tokens
Sampling = SamplingParams | Mapping[str, Any] | None


@dataclass(frozen=True, slots=True)
class GenerationResponse:
    """One more token of an answer.

    Args:
        text: the text that is now certain; may be empty in the middle of a character or of a possible stop string.
        token: its id.
        prompt_tokens: length of the prompt.
        prompt_tps: prompt tokens per second.
        generation_tokens: tokens so far.
        generation_tps: tokens per second since the first.
        peak_memory: most memory that MLX has held, in GB.
        finish_reason: on the last one, "stop" (end token or stop string) or "length".
    """

    text: str
    token: int
    prompt_tokens: int
    prompt_tps: float
    generation_tokens: int
    generation_tps: float
    peak_memory: float
    finish_reason: Literal["stop", "length"] | None


class StreamOptions(TypedDict, total=False):
    """The options of `stream_generate`, for functions that pass them on."""

    max_tokens: int
    sampling: Sampling
    stop: str | Sequence[str]
    cache: KVCache | None
    prefill_chunk: int
    on_prefill: Callable[[int, int], None] | None


def stream_generate(
    model: Qwen3ForCausalLM,
    tokenizer: Tokenizer,
    prompt: Prompt,
    *,
    max_tokens: int = DEFAULT_MAX_TOKENS,
    sampling: Sampling = None,
    stop: str | Sequence[str] = (),
    cache: KVCache | None = None,
    prefill_chunk: int = DEFAULT_PREFILL_CHUNK,
    on_prefill: Callable[[int, int], None] | None = None,
) -> Iterator[GenerationResponse]:
    """Continue `prompt`, a text or token ids (a list or an array), yielding text as it becomes certain.

    Args:
        max_tokens: at most this many, and no more than the context has room for.
        sampling: `SamplingParams`, or single options by name over the profile of the model card; by default that
            profile. The prompt tells the mode: one that ends in a closed think block is not to be thought about, nor
            does a model think whose chat template knows no think block.
        stop: end before the first of these texts.
        cache: see `generate_tokens`; also for `prefill_chunk` and `on_prefill`.

    Raises:
        OptionError, ContextLengthError, GenerationError: see `generate_tokens`.
    """
    ids = _encode(model, tokenizer, prompt)
    params = resolve_params(model, sampling, thinking=_thinks(tokenizer, ids))
    row = _RowText(tokenizer, stop)
    started = time.perf_counter()
    stream = generate_tokens(
        model,
        [ids],
        sampling=params,
        max_tokens=max_tokens,
        eos_token_ids=end_token_ids(model, tokenizer),
        cache=cache,
        prefill_chunk=prefill_chunk,
        on_prefill=on_prefill,
    )
    return _responses(stream, row, len(ids), started)


def _responses(stream: TokenStream, row: _RowText, prompt_tokens: int, started: float) -> Iterator[GenerationResponse]:
    first = 0.0
    for count, generated in enumerate(stream, start=1):
        now = time.perf_counter()
        first = first or now
        text = row.add(generated.token, generated.finish_reason)
        if row.finish_reason is not None:
            stream.stop(0)
        yield GenerationResponse(
            text=text,
            token=generated.token,
            prompt_tokens=prompt_tokens,
            prompt_tps=prompt_tokens / max(first - started, 1e-9),
            generation_tokens=count,
            generation_tps=(count - 1) / max(now - first, 1e-9),
            peak_memory=mx.get_peak_memory() / 1e9,
            finish_reason=row.finish_reason,
        )


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
            f"Peak memory: {last.peak_memory:.3f} GB\n"
        )
    return "".join(pieces)


def batch_generate(
    model: Qwen3ForCausalLM,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    *,
    max_tokens: int = DEFAULT_MAX_TOKENS,
    sampling: Sampling | Sequence[Sampling] = None,
    stop: str | Sequence[str] = (),
    prefill_chunk: int = DEFAULT_PREFILL_CHUNK,
    on_prefill: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Continue many prompts at once; each gets the text that it would get alone (with a seed, that very text).

    Args:
        prompts: texts or lists of ids.
        sampling: for all, or one for each prompt.
        max_tokens, stop, prefill_chunk, on_prefill: as for `stream_generate`.
    """
    given = [] if isinstance(prompts, str) else as_token_ids(prompts)
    if not given:
        raise OptionError("prompts: expected a list of at least one text or list of token ids")
    rows = [_encode(model, tokenizer, prompt) for prompt in given]
    each = sampling if isinstance(sampling, list | tuple) else [sampling] * len(rows)
    if len(each) != len(rows):
        raise OptionError(f"sampling: found {len(each)} for {len(rows)} prompts")
    params, notes = zip(
        *(_resolve(model, one, _thinks(tokenizer, ids)) for ids, one in zip(rows, each, strict=True)), strict=True
    )
    _log(notes)
    texts = [_RowText(tokenizer, stop) for _ in rows]
    pieces: list[list[str]] = [[] for _ in rows]
    stream = generate_tokens(
        model,
        rows,
        sampling=params,
        max_tokens=max_tokens,
        eos_token_ids=end_token_ids(model, tokenizer),
        prefill_chunk=prefill_chunk,
        on_prefill=on_prefill,
    )
    for generated in stream:
        text = texts[generated.row]
        pieces[generated.row].append(text.add(generated.token, generated.finish_reason))
        if text.finish_reason is not None:
            stream.stop(generated.row)
    return ["".join(row) for row in pieces]


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


def _resolve(model: Qwen3ForCausalLM, sampling: Sampling, thinking: bool) -> tuple[SamplingParams, tuple[str, ...]]:
    if isinstance(sampling, SamplingParams):
        return sampling, ()
    if sampling is not None and not isinstance(sampling, Mapping):
        raise OptionError(f"sampling: found {type(sampling).__name__}, expected SamplingParams or options by name")
    return resolve_sampling(model.generation_config.values, thinking=thinking, overrides=sampling or {})


def _log(notes: Iterable[tuple[str, ...]]) -> None:
    """Each note once, however many rows have it."""
    for note in dict.fromkeys(chain.from_iterable(notes)):
        logger.warning(note)


def can_think(tokenizer: Tokenizer) -> bool:
    """Whether the chat template knows think blocks; without a template nothing speaks against it."""
    return tokenizer.chat_template is None or "<think>" in tokenizer.chat_template


def _thinks(tokenizer: Tokenizer, prompt: Sequence[int]) -> bool:
    begins = begins_in_thought(tokenizer, prompt)
    return can_think(tokenizer) if begins is None else begins


def begins_in_thought(tokenizer: Tokenizer, prompt: Sequence[int]) -> bool | None:
    """How a reply begins: True behind an open `<think>`, False behind a closed block, None where the model is free."""
    end = tokenizer.decode(prompt[-8:]).rstrip()
    return True if end.endswith("<think>") else False if end.endswith("</think>") else None


class _RowText:
    """One row's tokens → its text, up to a stop string or the end token."""

    def __init__(self, tokenizer: Tokenizer, stop: str | Sequence[str]) -> None:
        self.finish_reason: Literal["stop", "length"] | None = None
        self._detokenizer = tokenizer.detokenizer(skip_special_tokens=True)
        self._stops = StopStrings(stop)

    def add(self, token: int, finish_reason: Literal["stop", "length"] | None) -> str:
        """The text that `token` makes certain."""
        # A character that the last token leaves unfinished is never shown.
        text = "" if finish_reason == "stop" else self._detokenizer.add(token)
        shown, stopped = self._stops.feed(text)
        if finish_reason is not None and not stopped:
            shown += self._stops.finish()
            stopped = self._stops.found
        self.finish_reason = "stop" if stopped else finish_reason
        return shown
