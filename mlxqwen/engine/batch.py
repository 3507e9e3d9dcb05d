"""Many conversations answered together: `batch_size` at once, and where one ends the next begins."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from mlxqwen.checks import check_integer
from mlxqwen.engine.chat_request import ChatOptions, ChatRequest, Messages, Responder, as_messages, option_names
from mlxqwen.engine.events import Done
from mlxqwen.engine.handle import Handle
from mlxqwen.engine.scheduler import Scheduler
from mlxqwen.errors import GenerationError, MessagesError, MlxqwenError
from mlxqwen.files.json_file import json_kind
from mlxqwen.text.stop import StopStrings

__all__ = ["DEFAULT_BATCH_SIZE", "answer_batch"]

DEFAULT_BATCH_SIZE = 8


def answer_batch(
    responder: Responder,
    scheduler: Scheduler,
    conversations: Iterable[Messages | str | ChatRequest],
    options: Mapping[str, Any],
    *,
    batch_size: int,
    on_error: Callable[[int, MlxqwenError], None] | None,
) -> Iterator[tuple[int, Done]]:
    """See `Engine.batch`."""
    if not isinstance(conversations, Iterable):
        raise MessagesError(f"conversations: found {json_kind(conversations)}, expected a list of conversations")
    batch_size = check_integer("batch_size", batch_size, 1)
    for_all = ChatOptions(**options)
    StopStrings(for_all.stop)
    responder.cache_of(for_all)
    if for_all.prefill_chunk is not None:
        check_integer("prefill_chunk", for_all.prefill_chunk, 1)
    if for_all.early_stop_text is not None:
        from mlxqwen.chat.thinking import check_early_stop_text

        responder.tokenizer.encode_plain(check_early_stop_text(for_all.early_stop_text))
    return _answers(responder, scheduler, iter(enumerate(conversations)), options, batch_size, on_error)


def _answers(
    responder: Responder,
    scheduler: Scheduler,
    conversations: Iterator[tuple[int, Messages | str | ChatRequest]],
    options: Mapping[str, Any],
    batch_size: int,
    on_error: Callable[[int, MlxqwenError], None] | None,
) -> Iterator[tuple[int, Done]]:
    running: dict[int, Handle] = {}
    ended: list[tuple[int, Done]] = []
    failed: list[tuple[int, Exception]] = []
    while True:
        while len(running) < batch_size:
            submitted = _submit_next(responder, scheduler, conversations, options, on_error)
            if submitted is None:
                break
            running[submitted[0]] = submitted[1]
        if not running:
            return
        first = next(iter(running.values()))
        if not any(handle.is_ready for handle in running.values()):
            first.wait()
        for index, handle in list(running.items()):
            try:
                if (done := handle.poll_done()) is not None:
                    del running[index]
                    ended.append((index, done))
            except Exception as error:
                handle.cancel()
                del running[index]
                failed.append((index, error))
        yield from ended
        ended.clear()
        while failed:
            _refuse(*failed.pop(0), on_error)


def _submit_next(
    responder: Responder,
    scheduler: Scheduler,
    conversations: Iterator[tuple[int, Messages | str | ChatRequest]],
    options: Mapping[str, Any],
    on_error: Callable[[int, MlxqwenError], None] | None,
) -> tuple[int, Handle] | None:
    """Submit the next conversation that can be answered; None if there is no other."""
    for index, one in conversations:
        request = one if isinstance(one, ChatRequest) else ChatRequest(one)
        try:
            option_names("one conversation", request.options, "cache")
            chosen = ChatOptions(**{**options, **request.options})
            made, _ = responder.request(as_messages(request.messages), chosen)
            handle = scheduler.submit(made)
            handle.on_prefill = chosen.on_prefill
            return index, handle
        except MlxqwenError as error:
            _refuse(index, error, on_error)
    return None


def _refuse(index: int, error: Exception, on_error: Callable[[int, MlxqwenError], None] | None) -> None:
    """Tell that a conversation is not answered: to `on_error`, else by raising. What is not ours is raised as it is."""
    if not isinstance(error, MlxqwenError):
        if on_error is None:
            raise error
        on_error(index, GenerationError(f"{type(error).__name__}: {error}"))
    elif on_error is None:
        raise type(error)(f"conversations[{index}]: {error.problem}", hint=error.hint) from error
    else:
        on_error(index, error)
