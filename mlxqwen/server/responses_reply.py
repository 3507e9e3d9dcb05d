"""Replies as OpenAI's responses: items of thought, text and calls, whole or as events in their order.

Both stand in one file, as an event has the items of the whole, in the state that they have then.
"""

from __future__ import annotations

import os
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from mlxqwen.sampling.params import SamplingParams
from mlxqwen.server.background import Background
from mlxqwen.server.blocks import Block, Blocks, Step
from mlxqwen.server.chat_request import Prepared
from mlxqwen.server.errors import ApiError, openai_error
from mlxqwen.server.event_stream import event
from mlxqwen.server.logprobs import ChoiceLogprobs
from mlxqwen.server.presenter import Presenter
from mlxqwen.server.replies import Replies
from mlxqwen.server.responses_request import ResponsesFields, input_items, messages_of, with_ids
from mlxqwen.server.responses_store import ResponseStore

__all__ = ["ResponseReply", "response_usage"]

_PREFIXES = {"reasoning": "rs", "content": "msg", "call": "fc"}
# Thought has two names: clients of either kind break off at the other one.
_OPEN_RESPONSES_EVENTS = {"reasoning": "response.reasoning", "content": "response.output_text"}
_OPENAI_EVENTS = {"reasoning": "response.reasoning_text", "content": "response.output_text"}


class ResponseReply(Presenter):
    """The reply to one response that was asked for.

    Args:
        fields: the request's.
        name: of the model.
        store: knows of it while it is on its way, and keeps it afterwards if that is wanted.
        before: messages of the responses that it follows.
        is_for_openai: whether a thought's events have OpenAI's name; otherwise, unless `reasoning` is asked for, they
            have Open Responses'.
    """

    def __init__(
        self,
        fields: ResponsesFields,
        name: str,
        store: ResponseStore,
        before: Sequence[dict[str, Any]],
        *,
        is_for_openai: bool = False,
    ) -> None:
        self._fields = fields
        self._name = name
        self._sampling: SamplingParams | None = None
        self._store = store
        self._before = before
        self._replies: Replies | None = None
        self._is_cancelled = self._is_forgotten = False
        self._items = with_ids(input_items(fields.input))
        self.background: Background | None = None
        self._created = int(time.time())
        self._id = f"resp_{os.urandom(16).hex()}"
        self._blocks = Blocks(1 if fields.parallel_tool_calls is False else None)
        is_for_openai = is_for_openai or fields.reasoning is not None
        self._part_events = _OPENAI_EVENTS if is_for_openai else _OPEN_RESPONSES_EVENTS
        self._summarizes = fields.reasoning is not None and fields.reasoning.summary is not None
        self._ids: list[str] = []
        self._number = 0
        self._logprobs: ChoiceLogprobs | None = None
        self._give_up: Callable[[], object] | None = None

    def begin(self, prepared: Prepared) -> None:
        """Take what the request came to."""
        request = prepared.requests[0]
        self._sampling = request.sampling
        if request.logprobs is not None:
            self._logprobs = ChoiceLogprobs(prepared.model.engine.tokenizer, request.end_token_ids)

    @property
    def id(self) -> str:
        """The id of the response."""
        return self._id

    def comment(self) -> bytes:
        """An event that says that the response is on its way, while nothing else does."""
        return self._event("response.in_progress", response=self._response("in_progress"))

    def waiting(self, give_up: Callable[[], object]) -> bytes:
        """Events that say that the response is queued; from the first on it may be asked for, and cancelled."""
        queued = self._response("queued")
        created = b"" if self._give_up is not None else self._event("response.created", response=queued)
        self._give_up = give_up
        self._store.running[self._id] = self
        return created + self._event("response.queued", response=queued)

    async def whole(self, replies: Replies) -> dict[str, Any]:
        """The reply that is not streamed."""
        with self._running(replies):
            async for batch in replies.tokens():
                for _, token in batch:
                    list(self._blocks.feed(token.deltas))
                    if self._logprobs is not None:
                        self._logprobs.feed(token)
                if self._blocks.is_cut:
                    replies.end(0)
        return self._over(replies)

    def shown(self) -> dict[str, Any]:
        """The response, as far as it has come."""
        begun = self._replies is not None and self._replies.handles[0].has_begun
        status = "cancelled" if self._is_cancelled else "in_progress" if begun else "queued"
        response = self._response(status)
        response["output"] = self._output("incomplete" if self._is_cancelled else "in_progress")
        return response

    def input_items(self) -> list[dict[str, Any]]:
        """What was put in, with ids."""
        return self._items

    def cancel(self) -> dict[str, Any]:
        """End the reply where it is → the response, as far as it has come."""
        self._is_cancelled = True
        if self._replies is not None:
            self._replies.end(0)
        elif self._give_up is not None:
            self._give_up()
        return self.shown()

    def forget(self) -> None:
        """End the reply, and keep nothing of it."""
        self._is_forgotten = True
        self.cancel()

    @contextmanager
    def _running(self, replies: Replies) -> Iterator[None]:
        self._replies = replies
        self._store.running[self._id] = self
        try:
            yield
        finally:
            self.close()

    async def chunks(self, replies: Replies) -> AsyncGenerator[bytes]:
        """The events of the reply that is streamed."""
        with self._running(replies):
            begun = self._response("in_progress")
            created = b"" if self._give_up is not None else self._event("response.created", response=begun)
            yield created + self._event("response.in_progress", response=begun)
            async for batch in replies.tokens():
                events = []
                for _, token in batch:
                    told = None if self._logprobs is None else self._logprobs.feed(token)
                    logprobs = told["content"] if told else []
                    events += [self._told(step, logprobs) for step in self._blocks.feed(token.deltas)]
                yield b"".join(events)
                if self._blocks.is_cut:
                    replies.end(0)
            yield b"".join(self._told(step, []) for step in self._blocks.finish())
        yield self._told_over(replies)

    def _told_over(self, replies: Replies | None) -> bytes:
        over = self._over(replies)
        kind = "completed" if over["status"] == "completed" else "incomplete"
        return self._event(f"response.{kind}", response=over) + b"data: [DONE]\n\n"

    def close(self) -> None:
        """It is on its way no more."""
        self._store.running.pop(self._id, None)

    def failure(self, error: ApiError) -> bytes:
        """What ends a stream in which something went wrong."""
        self.close()
        if self._is_cancelled and self._replies is None:
            return self._told_over(None)
        told = openai_error(error)["error"]
        failed = self._response("failed", error={"code": told["code"] or "server_error", "message": told["message"]})
        failed["output"] = self._output("incomplete")
        if self.background is not None:  # who asks for it later learns of it
            self._keep(failed)
        return self._event("response.failed", response=failed) + b"data: [DONE]\n\n"

    def _event(self, kind: str, **values: Any) -> bytes:
        number, self._number = self._number, self._number + 1
        return event({"type": kind, "sequence_number": number, **values}, kind)

    def _over(self, replies: Replies | None) -> dict[str, Any]:
        """The response that is over, without replies if it was cancelled before any; it is kept if that is wanted."""
        done = None if replies is None else replies.done.get(0)
        details: dict[str, Any] | None = None
        if self._is_cancelled or done is None:
            status = "cancelled"
        elif done.finish_reason == "length" and not self._blocks.is_cut:
            status, details = "incomplete", {"reason": "max_output_tokens"}
        else:
            status = "completed"
        response = self._response(status, incomplete_details=details)
        response["output"] = self._output("completed" if status == "completed" else "incomplete")
        response["completed_at"] = int(time.time()) if status == "completed" else None
        if replies is not None:
            response["usage"] = response_usage(replies)
            if done is not None and replies.ended_in_thought(0):
                response["ended_in_thought"] = True
        if self._fields.store is not False:
            self._keep(response)
        return response

    def _keep(self, response: dict[str, Any]) -> None:
        if not self._is_forgotten:
            messages = [*self._before, *messages_of([*self._items, *response["output"]], [])]
            self._store.keep(response, self._items, messages)

    def _response(self, status: str, **values: Any) -> dict[str, Any]:
        fields = self._fields
        sampling = self._sampling or fields  # while its model is not there, what was asked for
        reasoning = fields.reasoning
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "completed_at": None,
            "status": status,
            "background": fields.background is True,
            "error": None,
            "incomplete_details": None,
            "instructions": fields.instructions,
            "max_output_tokens": fields.max_output_tokens,
            "max_tool_calls": None,
            "model": self._name,
            "output": [],
            "parallel_tool_calls": fields.parallel_tool_calls is not False,
            "previous_response_id": fields.previous_response_id,
            "reasoning": {
                "effort": None if reasoning is None else reasoning.effort,
                "summary": None if reasoning is None else reasoning.summary,
            },
            "store": fields.store is not False,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "presence_penalty": sampling.presence_penalty,
            "frequency_penalty": sampling.frequency_penalty,
            "text": {"format": (fields.text.format if fields.text is not None else None) or {"type": "text"}},
            "tool_choice": fields.tool_choice or "auto",
            "tools": [_shown_tool(tool) for tool in fields.tools or ()],
            "top_logprobs": fields.top_logprobs or 0,
            "truncation": fields.truncation or "disabled",
            "usage": None,
            "user": fields.user,
            "metadata": fields.metadata or {},
            "service_tier": "default",
            "safety_identifier": None,
            "prompt_cache_key": None,
            **values,
        }

    def _output(self, last: str) -> list[dict[str, Any]]:
        """All items; the last one has the status `last`."""
        blocks = self._blocks.blocks
        return [self._item(block, last if block is blocks[-1] else "completed") for block in blocks]

    def _item_id(self, block: Block) -> str:
        while len(self._ids) <= block.index:
            kind = self._blocks.blocks[len(self._ids)].kind
            self._ids.append(f"{_PREFIXES[kind]}_{os.urandom(12).hex()}")
        return self._ids[block.index]

    def _item(self, block: Block, status: str, *, empty: bool = False) -> dict[str, Any]:
        item: dict[str, Any] = {"id": self._item_id(block), "status": status}
        if block.kind == "call":
            arguments = "" if empty else block.text
            return {
                **item,
                "type": "function_call",
                "call_id": block.call_id,
                "name": block.name,
                "arguments": arguments,
            }
        content = [] if empty else [self._part(block, block.text)]
        if block.kind == "reasoning":
            summary, content = (content, []) if self._summarizes else ([], content)
            return {**item, "type": "reasoning", "summary": summary, "content": content}
        return {**item, "type": "message", "role": "assistant", "content": content}

    def _part(self, block: Block, text: str) -> dict[str, Any]:
        if block.kind == "reasoning":
            return {"type": "summary_text" if self._summarizes else "reasoning_text", "text": text}
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": self._told_logprobs(block, text)}

    def _told_logprobs(self, block: Block, text: str) -> list[dict[str, Any]]:
        """Of the first text that is shown whole: further ones, behind calls, have none of their own."""
        if self._logprobs is None or not text:
            return []
        first = next(one for one in self._blocks.blocks if one.kind == "content")
        return self._logprobs.content if first is block else []

    def _told(self, step: Step, logprobs: list[dict[str, Any]]) -> bytes:
        """The events of one step."""
        block = step.block
        place = {"item_id": self._item_id(block), "output_index": block.index}
        part = {**place, "content_index": 0}
        if block.kind == "reasoning" and self._summarizes:
            return self._told_summary(step, {**place, "summary_index": 0})
        own = {"logprobs": logprobs} if block.kind == "content" else {}
        if step.kind == "open":
            item = self._item(block, "in_progress", empty=True)
            added = self._event("response.output_item.added", output_index=block.index, item=item)
            if block.kind == "call":
                return added
            return added + self._event("response.content_part.added", **part, part=self._part(block, ""))
        if step.kind == "fill":
            if block.kind == "call":
                return self._event("response.function_call_arguments.delta", **place, delta=step.text)
            return self._event(f"{self._part_events[block.kind]}.delta", **part, delta=step.text, **own)
        item = self._item(block, "completed")
        if block.kind == "call":
            ended = self._event("response.function_call_arguments.done", **place, name=block.name, arguments=block.text)
        else:
            whole = {"logprobs": self._told_logprobs(block, block.text)} if block.kind == "content" else {}
            ended = self._event(f"{self._part_events[block.kind]}.done", **part, text=block.text, **whole)
            ended += self._event("response.content_part.done", **part, part=self._part(block, block.text))
        return ended + self._event("response.output_item.done", output_index=block.index, item=item)

    def _told_summary(self, step: Step, place: dict[str, Any]) -> bytes:
        """The events of one step of a thought that is shown as its summary."""
        block, name = step.block, "response.reasoning_summary"
        if step.kind == "open":
            item = self._item(block, "in_progress", empty=True)
            added = self._event("response.output_item.added", output_index=block.index, item=item)
            return added + self._event(f"{name}_part.added", **place, part=self._part(block, ""))
        if step.kind == "fill":
            return self._event(f"{name}_text.delta", **place, delta=step.text)
        ended = self._event(f"{name}_text.done", **place, text=block.text)
        ended += self._event(f"{name}_part.done", **place, part=self._part(block, block.text))
        item = self._item(block, "completed")
        return ended + self._event("response.output_item.done", output_index=block.index, item=item)


def _shown_tool(tool: dict[str, Any]) -> dict[str, Any]:
    """A tool as OpenAI gives it back, with all its fields."""
    if tool.get("type") != "function":
        return tool
    return {"description": None, "parameters": None, "strict": None, **tool}


def response_usage(replies: Replies) -> dict[str, Any]:
    """Tokens of a response, as its `usage` has them."""
    said = replies.handles[0].token_count
    return {
        "input_tokens": replies.prompt_tokens,
        "input_tokens_details": {"cached_tokens": replies.cached_tokens},
        "output_tokens": said,
        "output_tokens_details": {"reasoning_tokens": replies.reasoning_tokens},
        "total_tokens": replies.prompt_tokens + said,
    }
