"""Token ids in, token ids out: several requests of one model as one iterator."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

from mlxqwen.cache import KVCache
from mlxqwen.checks import as_token_ids, is_integer
from mlxqwen.engine.generation import GeneratedToken
from mlxqwen.engine.handle import Handle
from mlxqwen.engine.request import CacheKind, Request, check_request
from mlxqwen.engine.schedulers import scheduler_of
from mlxqwen.errors import CacheError, OptionError
from mlxqwen.model.given import check_model
from mlxqwen.model.qwen3 import Qwen3ForCausalLM
from mlxqwen.sampling.params import SamplingParams

__all__ = ["OnPrefill", "TokenStream", "by_row", "check_rows", "generate_tokens"]

OnPrefill = Callable[[int, int], None] | None


class TokenStream:
    """Several requests of one model as one iterator of `(row, token)`: in each step, the rows in their order.

    Nothing is submitted before the first token is asked for. Rows can be added and stopped while others run.
    """

    def __init__(self, model: Qwen3ForCausalLM, on_prefill: OnPrefill = None) -> None:
        self._scheduler = scheduler_of(model)
        self._on_prefill = on_prefill
        self._requests: dict[int, Request] = {}  # of rows that are not submitted yet
        self._handles: dict[int, Handle] = {}  # of rows that have not ended
        self._ready: deque[int] = deque()
        self._count = 0
        self._is_over = False

    def __iter__(self) -> Iterator[tuple[int, GeneratedToken]]:
        return self

    def __next__(self) -> tuple[int, GeneratedToken]:
        return self.next_row()[:2]

    def submit(self, request: Request) -> int:
        """Add a row → its number. Raises `OptionError` if the stream is over."""
        if self._is_over:
            raise OptionError("add: found a stream that is over", hint="Add rows while others run, or start anew.")
        self._requests[self._count] = request
        self._count += 1
        return self._count - 1

    def stop(self, row: int) -> None:
        """End `row` now. Raises `OptionError` if there is no such row."""
        if not 0 <= row < self._count:
            raise OptionError(f"stop: found row {row}, expected a row from 0 to {self._count - 1}")
        self._requests.pop(row, None)
        if (handle := self._handles.pop(row, None)) is not None:
            handle.cancel()

    def close(self) -> None:
        """End all rows."""
        self._is_over = True
        for row in (*self._requests, *self._handles):
            self.stop(row)

    def next_row(self) -> tuple[int, GeneratedToken, Handle]:
        """The next token of any row, and the row's handle.

        Raises:
            StopIteration: all rows have ended.
            MlxqwenError: a row failed; the others go on.
        """
        while True:
            while self._ready:
                row = self._ready.popleft()
                handle = self._handles.get(row)
                try:
                    token = None if handle is None else handle.poll()
                except BaseException:  # of `on_prefill`: it ends this row alone
                    self.stop(row)
                    raise
                if handle is not None and token is not None:
                    if token.finish_reason is not None:
                        del self._handles[row]
                    return row, token, handle
                if handle is not None and handle.is_over:
                    del self._handles[row]
                    if (error := handle.take_error()) is not None:
                        self._is_over = not (self._handles or self._requests)
                        try:
                            raise error
                        finally:
                            del error  # its traceback refers to this frame
            self._submit_requests()
            if not self._handles:
                self._is_over = True
                raise StopIteration
            first = next(iter(self._handles.values()))
            if not any(handle.is_ready for handle in self._handles.values()):
                first.wait()
            self._ready.extend(row for row, handle in self._handles.items() if handle.is_ready)

    def _submit_requests(self) -> None:
        while self._requests:
            row = next(iter(self._requests))
            handle = self._scheduler.submit(self._requests.pop(row))  # the others go on where this one is refused
            handle.on_prefill = self._on_prefill
            self._handles[row] = handle


def generate_tokens(
    model: Qwen3ForCausalLM,
    prompts: Sequence[int] | Sequence[Sequence[int]] | Any,
    *,
    sampling: SamplingParams | Sequence[SamplingParams] | None = None,
    max_tokens: int | Sequence[int] | None = None,
    eos_token_ids: Collection[int] | None = None,
    cache: KVCache | CacheKind | None = None,
    on_prefill: OnPrefill = None,
    **options: Any,
) -> TokenStream:
    """Continue one prompt, or many at once, token by token, without a tokenizer.

    Args:
        prompts: ids of one prompt, or of one a row; lists or integer arrays.
        sampling: how to draw, for all rows or for each; by default from the model's own distribution. A row with a seed
            draws what it would draw alone with that seed.
        max_tokens: at most this many tokens, for all rows or for each, and never more than the context has room for.
        eos_token_ids: a row ends after drawing one of these; by default those of the model's `config.json`.
        cache, on_prefill: see `stream_generate`; a `KVCache` has a row for each prompt.
        **options: further fields of `mlxqwen.engine.request.Request`.

    Returns:
        An iterator of `(row, token)`. Nothing runs before the first is asked for.

    Raises:
        ContextLengthError, OptionError, CacheError: at once.
        GenerationError: while iterating, if a row's logits are NaN.
    """
    check_model(model, "generate_tokens(model, prompts)")
    given = as_token_ids(prompts)
    rows = [as_token_ids(row) for row in given] if given and not _is_id(given[0]) else [given]
    check_rows(cache, len(rows))
    limits, params = by_row("max_tokens", max_tokens, len(rows)), by_row("sampling", sampling, len(rows))
    stream = TokenStream(model, on_prefill)
    for row, prompt in enumerate(rows):
        request = Request(
            prompt=tuple(prompt),
            sampling=SamplingParams() if params[row] is None else params[row],
            max_tokens=limits[row],
            end_token_ids=frozenset(model.config.eos_token_ids if eos_token_ids is None else eos_token_ids),
            cache=CacheKind() if cache is None else cache,
            cache_row=row,
            reports_progress=on_prefill is not None,
            **options,
        )
        check_request(request, model)
        stream.submit(request)
    return stream


def _is_id(value: object) -> bool:
    return is_integer(value) or isinstance(value, str | float)


def check_rows(cache: object, rows: int) -> None:
    """Check that a cache has `rows` rows. Raises `CacheError`."""
    if isinstance(cache, KVCache) and cache.batch_size != rows:
        raise CacheError(f"cache: made for {cache.batch_size} rows, found {rows} prompts")


def by_row(name: str, value: Any, rows: int) -> list[Any]:
    """One value a row: `value` itself for all rows, or the items of a list. Raises `OptionError`."""
    values = list(value) if isinstance(value, list | tuple) else [value] * rows
    if len(values) != rows:
        raise OptionError(f"{name}: found {len(values)} for {rows} prompts")
    return values
