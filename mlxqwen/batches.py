"""Many prompts answered a group at a time: as many as asked for run at once, the rest wait."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice

from mlxqwen.cache import KVCache
from mlxqwen.completion import batch_stream, begins_in_thought
from mlxqwen.events import Done, ReplyEvents
from mlxqwen.model import Qwen3ForCausalLM
from mlxqwen.reply_tags import reply_tags
from mlxqwen.requests import PreparedRequest
from mlxqwen.tokenizer import Tokenizer

__all__ = ["stream_groups"]


def stream_groups(
    model: Qwen3ForCausalLM,
    tokenizer: Tokenizer,
    requests: Iterable[tuple[int, PreparedRequest]],
    *,
    batch_size: int,
    stop: str | Sequence[str],
    early_stop_text: str | None,
    stop_on_loop: bool,
    new_cache: Callable[[int], KVCache] | None,
    prefill_chunk: int,
    on_prefill: Callable[[int, int], None] | None,
) -> Iterator[tuple[int, Done]]:
    """The end of each numbered request, in the order in which they end.

    Requests are taken `batch_size` at a time, and only when those before have ended. For the other options, which hold
    for all, see `Engine.batch`.
    """
    requests = iter(requests)
    tags = reply_tags(tokenizer)
    while group := list(islice(requests, batch_size)):
        prepared = [request for _, request in group]
        replies = [
            ReplyEvents(
                thinking=begins_in_thought(tokenizer, request.prompt, expect_thought=request.expect_thought),
                tools=request.tools,
                stop=stop,
                tags=tags,
            )
            for request in prepared
        ]
        responses = batch_stream(
            model,
            tokenizer,
            [request.prompt for request in prepared],
            max_tokens=[request.max_tokens for request in prepared],
            sampling=[request.sampling for request in prepared],
            thinking_budget=[request.thinking_budget for request in prepared],
            expect_thought=[request.expect_thought for request in prepared],
            tools=[request.tools for request in prepared],
            early_stop_text=early_stop_text,
            stop_on_loop=stop_on_loop,
            cache=None if new_cache is None else new_cache(len(group)),
            prefill_chunk=prefill_chunk,
            on_prefill=on_prefill,
        )
        for row, response in responses:
            for event in replies[row].feed(response):
                if isinstance(event, Done):
                    responses.stop(row)
                    yield group[row][0], event
