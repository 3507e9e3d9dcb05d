"""Messages as callers write them → plain JSON values that are safe for any chat template.

The form is OpenAI's: dicts with `role`, `content`, `tool_calls`, `reasoning_content`. The results are `Message`s:
checked once, never changed. `dict(message)` is a copy made of exact `str`, `int`, `float`, `bool`, `None`, `list` and
`dict`, so that a template meets no object with methods of its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mlxqwen.errors import MessagesError, OptionError
from mlxqwen.files.json_file import find_lone_surrogate, json_kind

__all__ = [
    "ContentError",
    "Message",
    "check_unicode",
    "prepare_messages",
    "prepare_tools",
    "split_reasoning",
    "to_plain_json",
    "without_reasoning",
]

MAX_DEPTH = 64

_THINK_BLOCK = re.compile(r"\s*<think>(.*?)</think>\n*", re.DOTALL)
REASONING_NAMES = ("reasoning_content", "thinking", "reasoning")
_TEXT_PARTS = ("text", "input_text", "output_text")
_OTHER_MEDIA = ("image", "audio", "input_image", "input_audio", "video", "file", "input_file", "document")
_PARTS = 'Parts are texts such as {"type": "text", "text": "Hello"}.'
# What chat templates of Qwen3 and of its 2507 releases make of content that is no text.
_RAISE_OR_DROP = "the chat template would raise an error, or drop it in silence"
_PYTHON_OR_DROP = "the chat template would write it as Python does, or drop it in silence"
_RESULT = "Give a tool's result as text: json.dumps(result) writes an object, a number, a list or null as such."


class ContentError(MessagesError):
    """Content that is no text. What becomes of it, templates decide: without one, the problem says what may.

    Args:
        found: the content, what was found and what was expected.
        fate: what a chat template makes of it.
        hint: the way out.
        index: of the message.
    """

    def __init__(self, found: str, fate: str, *, hint: str, index: int = 0) -> None:
        super().__init__(f"{found}: {fate}", hint=hint)
        self.found, self.index = found, index


class Message(Mapping[str, Any]):
    """A checked message, which `prepare_messages` takes as it is. It cannot change: its lists and dicts come as copies.

    Args:
        plain: the content of a message made by `prepare_messages`, perhaps with other texts; copied.
    """

    __slots__ = ("_plain",)

    def __init__(self, plain: Mapping[str, Any]) -> None:
        self._plain = {key: _copied(value) for key, value in plain.items()}

    def __getitem__(self, key: str) -> Any:
        return _copied(self._plain[key])

    def __iter__(self) -> Iterator[str]:
        return iter(self._plain)

    def __len__(self) -> int:
        return len(self._plain)

    def __repr__(self) -> str:
        return f"Message({self._plain!r})"


def _copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    return [_copied(item) for item in value] if isinstance(value, list) else value


def check_unicode(text: str, where: str, *, error: type[OptionError] = OptionError) -> None:
    """Check that `text` holds no half of a surrogate pair. Raises `error`, which names `where`."""
    position = find_lone_surrogate(text)
    if position is not None:
        raise error(
            f"{where}: found half of a surrogate pair, {text[position]!a}, at character {position}",
            hint="Such text is not Unicode: leave the half out, or put U+FFFD in its place.",
        )


def to_plain_json(value: Any, where: str, depth: int = 0) -> Any:
    """A copy of `value` made of plain JSON types; tuples become lists.

    Raises:
        MessagesError: something else than JSON, nested deeper than 64 levels, or text that is not Unicode.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return _plain_string(value, where)
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if depth >= MAX_DEPTH:
        raise MessagesError(f"{where}: nested deeper than {MAX_DEPTH} levels")
    if isinstance(value, Mapping):
        return {_plain_key(key, where): to_plain_json(item, f"{where}.{key}", depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain_json(item, f"{where}[{i}]", depth + 1) for i, item in enumerate(value)]
    raise MessagesError(
        f"{where}: found {json_kind(value)}, expected text, a number, a bool, null, a list or a dict",
        hint="Convert it to plain JSON values first.",
    )


def prepare_messages(messages: Sequence[Mapping[str, Any]]) -> tuple[Message, ...]:
    """A checked conversation; messages that are checked already are taken as they are.

    Keys that are None are dropped, text parts of content are joined, content that an assistant lacks beside tool calls
    or reasoning becomes "", and reasoning is found as `reasoning_content` whichever of its usual names it came under.
    Content that lacks elsewhere, but for a tool's, is None: some templates show an empty turn then, others raise.

    Raises:
        MessagesError: names the message and what is wrong with it.
    """
    if not isinstance(messages, list | tuple):
        raise MessagesError(
            f"messages: found {json_kind(messages)}, expected a list of messages",
            hint='A message is a dict such as {"role": "user", "content": "Hello"}.',
        )
    if not messages:
        raise MessagesError("messages: found an empty list, expected at least one message")
    return tuple(
        message if isinstance(message, Message) else _prepare_message(message, i) for i, message in enumerate(messages)
    )


def prepare_tools(tools: Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]] | None:
    """A checked copy of a list of tools, each a JSON schema.

    Raises:
        MessagesError: not a list of dicts.
    """
    if tools is None:
        return None
    if not isinstance(tools, list | tuple):
        raise MessagesError(f"tools: found {json_kind(tools)}, expected a list of JSON schemas")
    for i, tool in enumerate(tools):
        if not isinstance(tool, Mapping):
            raise MessagesError(
                f"tools[{i}]: found {json_kind(tool)}, expected a dict",
                hint='Describe the function by its schema: {"type": "function", "function": {"name": …}}.',
            )
    return [to_plain_json(tool, f"tools[{i}]") for i, tool in enumerate(tools)]


def split_reasoning(message: Message) -> Message:
    """Split an assistant's raw reply into reasoning and content, as Qwen3's chat template does.

    Only closed think blocks that open the content count, and only where no reasoning is given beside it; tags further
    on are what the reply speaks of.
    """
    content = message["content"]
    if message["role"] != "assistant" or "reasoning_content" in message or content is None:
        return message
    thoughts = []
    end = 0
    while block := _THINK_BLOCK.match(content, end):
        thoughts.append(block[1].strip("\n"))
        end = block.end()
    if not thoughts:
        return message
    return Message(_with_reasoning({**message, "content": content[end:]}, "\n".join(filter(None, thoughts))))


def without_reasoning(message: Message) -> Message:
    """The message without its reasoning, in a field or in tags, as templates render it before the last question."""
    split = split_reasoning(message)
    if not any(name in split for name in REASONING_NAMES):
        return message
    kept = {name: value for name, value in split.items() if name not in REASONING_NAMES}
    # Beside reasoning a think block is content, which it must not cease to be.
    is_text = "reasoning_content" in message and "</think>" in (message["content"] or "")
    return Message(_with_reasoning(kept, "") if is_text else kept)


def _with_reasoning(message: Mapping[str, Any], reasoning: object) -> dict[str, Any]:
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _prepare_message(message: object, index: int) -> Message:
    where = f"messages[{index}]"
    if not isinstance(message, Mapping):
        raise MessagesError(
            f"{where}: found {json_kind(message)}, expected a dict",
            hint='A message is a dict such as {"role": "user", "content": "Hello"}.',
        )
    role = message.get("role")
    if not isinstance(role, str) or not role:
        found = f"{role!r}" if "role" in message else "none"
        raise MessagesError(
            f"{where}: role: found {found}, expected text such as user or assistant: {_RAISE_OR_DROP}",
            hint='A message is a dict such as {"role": "user", "content": "Hello"}.',
        )
    plain = {key: value for key, value in to_plain_json(message, where).items() if value is not None}
    reasoning = next((plain[name] for name in REASONING_NAMES if name in plain), None)
    if reasoning is not None:
        if not isinstance(reasoning, str):
            name = next(name for name in REASONING_NAMES if name in plain)
            raise MessagesError(
                f"{where}: {name}: found {json_kind(reasoning)}, expected text: {_RAISE_OR_DROP}",
                hint="Leave it out, or None.",
            )
        plain = _with_reasoning(plain, reasoning)
    is_beside_more = role == "assistant" and (bool(plain.get("tool_calls")) or reasoning is not None)
    plain["content"] = "" if is_beside_more and "content" not in plain else _content(plain.get("content"), index, role)
    return Message(plain)


def _content(content: object, index: int, role: str) -> str | None:
    if isinstance(content, str) or (content is None and role != "tool"):
        return content
    if not isinstance(content, list):
        found = "none" if content is None else json_kind(content)
        raise ContentError(
            f"messages[{index}]: content: found {found}, expected text or a list of parts",
            _PYTHON_OR_DROP if role == "tool" else _RAISE_OR_DROP,
            hint=_RESULT if role == "tool" else _PARTS,
            index=index,
        )
    return "".join(_part_text(part, i, index, role) for i, part in enumerate(content))


def _part_text(part: object, place: int, index: int, role: str) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, dict) and part.get("type") in _TEXT_PARTS and isinstance(part.get("text"), str):
        return str(part["text"])
    is_part = isinstance(part, dict) and isinstance(part.get("type"), str)
    found = repr(part["type"]) if isinstance(part, dict) and is_part else json_kind(part)
    if is_part and found.strip("'").startswith(_OTHER_MEDIA):
        hint = "Qwen3 reads text only: leave images, audio and files out."
    else:
        hint = _RESULT if role == "tool" else _PARTS
    raise ContentError(
        f'messages[{index}]: content[{place}]: found {found}, expected text or {{"type": "text", "text": …}}',
        _RAISE_OR_DROP,
        hint=hint,
        index=index,
    )


def _plain_string(text: str, where: str) -> str:
    text = str.__str__(text)
    check_unicode(text, where, error=MessagesError)
    return text


def _plain_key(key: object, where: str) -> str:
    if not isinstance(key, str):
        raise MessagesError(f"{where}: found a key that is {json_kind(key)}, expected text")
    return _plain_string(key, where)
