"""Many requests in a JSON Lines file: one JSON object a line."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from mlxqwen.chat.request_files.conversations import (
    MessagesWithTools,
    check_keys,
    conversation_of,
    located,
    parse_json_text,
)
from mlxqwen.chat.structured.response_format import read_response_format
from mlxqwen.checks import check_integer, is_integer
from mlxqwen.errors import OptionError, one_line
from mlxqwen.files.json_file import json_kind
from mlxqwen.sampling.params import SamplingParams, resolve_sampling

__all__ = ["BatchRequest", "parse_requests"]

_HINT = 'A line is {"prompt": "…"} or {"messages": […]}, with "id", "max_tokens", "seed" and so on if wanted.'
_OPTIONS = ("max_tokens", "thinking", "thinking_budget", "sampling", "seed", "response_format")
_KEYS = {"prompt", "messages", "tools", "id", *_OPTIONS}
_SAMPLING_NAMES = {one.name for one in fields(SamplingParams)} - _KEYS
_MOST = 1 << 40
_MOST_TOLD = 5


@dataclass(frozen=True, slots=True)
class BatchRequest:
    """One line of a batch.

    Attributes:
        index: the line's number, from 0; empty lines count.
        id: the line's own name, if it has one.
        conversation: what is asked.
        options: those of the line alone, by the names of `Engine.stream`: `max_tokens`, `thinking`, `thinking_budget`,
            `seed`, `sampling` (single options by name), `response_format`.
        digest: of the line's text.
    """

    index: int
    id: str | int | None
    conversation: MessagesWithTools
    options: Mapping[str, Any]
    digest: str

    def with_default_tools(self, tools: tuple[Mapping[str, Any], ...]) -> BatchRequest:
        """With `tools` unless the line has its own."""
        if self.conversation.tools is not None:
            return self
        return replace(self, conversation=self.conversation.with_tools(tools))


def parse_requests(
    text: str, source: str, *, system: str | None = None, thinking: bool | None = None
) -> list[BatchRequest]:
    """All requests of a JSON Lines text; empty lines are skipped.

    Args:
        source: where the text is from, for errors.
        system: the system message of every request.
        thinking: the switch of requests that have none of their own.

    Raises:
        OptionError: names the first lines that are not sound, from 1, and what is wrong with them.
    """
    requests, errors = [], []
    line_of_id: dict[str | int, int] = {}
    # Not splitlines(): JSON strings may hold the other characters that it takes for line breaks.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            with located(f"line {number}"):
                request = _parse_line(line.strip(), number - 1, system, thinking)
                if request.id is not None and line_of_id.setdefault(request.id, number) != number:
                    raise OptionError(f"id: {request.id!r} is already that of line {line_of_id[request.id]}")
            requests.append(request)
        except OptionError as error:
            errors.append(error)
    if errors:
        raise _told_together(errors, source)
    if not requests:
        raise OptionError(f"{source}: found no lines, expected requests", hint=_HINT)
    return requests


def _told_together(errors: list[OptionError], source: str) -> OptionError:
    """One error for all lines that are not sound; of many, the first are told, shortened."""
    if len(errors) == 1:
        return OptionError(f"{source}: {errors[0].problem}", hint=errors[0].hint)
    first, *others = [error.problem for error in errors[:_MOST_TOLD]]
    told = "; ".join([one_line(first, 200), *(one_line(problem, 70) for problem in others)])
    more = f"; and {len(errors) - _MOST_TOLD:,} more" if len(errors) > _MOST_TOLD else ""
    return OptionError(f"{source}: {told}{more}", hint=errors[0].hint)


def _parse_line(line: str, index: int, system: str | None, thinking: bool | None) -> BatchRequest:
    value = parse_json_text(line, hint=_HINT)
    if not isinstance(value, dict):
        raise OptionError(f"found {json_kind(value)}, expected an object", hint=_HINT)
    value = {key: item for key, item in value.items() if item is not None}
    alone = next((key for key in value if key in _SAMPLING_NAMES), None)
    hint = _HINT if alone is None else f'Options of sampling stand together: "sampling": {{"{alone}": …}}.'
    check_keys(value, _KEYS, hint=hint)
    if ("prompt" in value) == ("messages" in value):
        found = "both prompt and messages" if "prompt" in value else "neither prompt nor messages"
        raise OptionError(f"found {found}, expected one of them", hint=_HINT)
    if "prompt" in value:
        prompt = value["prompt"]
        if not isinstance(prompt, str) or not prompt.strip():
            raise OptionError(f"prompt: found {prompt!r:.80}, expected text", hint=_HINT)
        value["messages"] = [{"role": "user", "content": prompt}]
    name = value.get("id")
    if name is not None and (not isinstance(name, str) and not is_integer(name)):
        raise OptionError(f"id: found {name!r:.80}, expected a string or an integer")
    conversation = conversation_of(value).with_system(system)
    options = _checked_options(value)
    _check_thought(options, thinking)
    return BatchRequest(index, name, conversation, options, digest(line))


def digest(text: str) -> str:
    """16 hexadecimal digits of the SHA-256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _checked_options(value: Mapping[str, Any]) -> dict[str, Any]:
    options = {name: value[name] for name in _OPTIONS if name in value}
    sampling = options.get("sampling", {})
    if not isinstance(sampling, dict):
        raise OptionError(f"sampling: found {json_kind(sampling)}, expected options by name")
    if "seed" in options and "seed" in sampling:
        raise OptionError("seed: found beside sampling and in it, expected one of them")
    resolve_sampling({}, thinking=True, overrides=sampling)
    if "seed" in options:
        check_integer("seed", options["seed"], 0, 2**64 - 1)
    if "thinking_budget" in options:
        check_integer("thinking_budget", options["thinking_budget"], 0, _MOST)
    if "thinking" in options and not isinstance(options["thinking"], bool):
        raise OptionError(f"thinking: found {options['thinking']!r:.80}, expected true or false")
    if "max_tokens" in options:
        check_integer("max_tokens", options["max_tokens"], 1, _MOST)
    read_response_format(options.get("response_format"))
    return options


def _check_thought(options: Mapping[str, Any], thinking: bool | None) -> None:
    """Refuse a budget that contradicts the switch: the line's own, or `thinking`, which is that of all."""
    budget, switch = options.get("thinking_budget"), options.get("thinking", thinking)
    if budget is None or switch is None or (switch and budget):
        return
    beside = f'"thinking": {str(switch).lower()}' if "thinking" in options else f"--{'' if switch else 'no-'}thinking"
    raise OptionError(f"thinking_budget: found {budget} beside {beside}, expected one of them")
