"""Many prompts answered together: as many as asked for run at once, and where one ends the next begins."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice

from mlxqwen.cache import KVCache
from mlxqwen.chat.reply_tags import reply_tags
from mlxqwen.engine.completion import batch_stream, begins_in_thought
from mlxqwen.engine.events import Done, ReplyEvents
from mlxqwen.engine.requests import PreparedRequest
from mlxqwen.model.qwen3 import Qwen3ForCausalLM
from mlxqwen.text.tokenizer import Tokenizer

__all__ = ["stream_batch"]


def stream_batch(
    model: Qwen3ForCausalLM,
    tokenizer: Tokenizer,
    requests: Iterable[tuple[int, PreparedRequest]],
    *,
    batch_size: int,
    stop: str | Sequence[str],
    early_stop_text: str | None,
    stop_on_loop: bool,
    new_cache: Callable[[int], KVCache] | None,
    prefill_chunk: int | None,
    on_prefill: Callable[[int, int], None] | None,
) -> Iterator[tuple[int, Done]]:
    """The end of each numbered request, in the order in which they end.

    `batch_size` requests are taken at first, then one for each that has ended. For the other options, which hold for
    all, see `Engine.batch`.
    """
    requests = iter(requests)
    first = list(islice(requests, batch_size))
    if not first:
        return
    tags = reply_tags(tokenizer)

    def events_of(request: PreparedRequest) -> ReplyEvents:
        begins = begins_in_thought(tokenizer, request.prompt, expect_thought=request.expect_thought)
        return ReplyEvents(thinking=begins, tools=request.tools, stop=stop, tags=tags)

    replies = {row: (number, events_of(request)) for row, (number, request) in enumerate(first)}
    prepared = [request for _, request in first]
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
        cache=None if new_cache is None else new_cache(len(prepared)),
        prefill_chunk=prefill_chunk,
        on_prefill=on_prefill,
    )
    for row, response in responses:
        number, events = replies[row]
        for event in events.feed(response):
            if isinstance(event, Done):
                responses.stop(row)
                del replies[row]
                yield number, event
                for following, request in islice(requests, 1):
                    added = responses.add(
                        request.prompt,
                        max_tokens=request.max_tokens,
                        sampling=request.sampling,
                        thinking_budget=request.thinking_budget,
                        expect_thought=request.expect_thought,
                        tools=request.tools,
                    )
                    replies[added] = following, events_of(request)
