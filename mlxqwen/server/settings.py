"""The settings of a server: what it listens to, whom it answers, and how much at once."""

from __future__ import annotations

import re
from dataclasses import dataclass
from ipaddress import ip_address
from typing import TYPE_CHECKING, Literal

from mlxqwen.checks import check_integer, check_number
from mlxqwen.errors import OptionError
from mlxqwen.files.config import ModelConfig

if TYPE_CHECKING:
    from mlxqwen.text.tokenizer import Tokenizer

__all__ = ["MOST_CHOICES", "ReasoningField", "ServerSettings", "is_loopback"]

MOST_CHOICES = 128
"""The most replies that one request may ask for (`n`)."""

# As browsers write them: with anything else no request could agree.
_HOST_NAME = re.compile(r"[A-Za-z0-9_.-]+|[0-9A-Fa-f:.]+")
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://(\[[0-9a-f:.]+\]|[a-z0-9_.-]+)(:[0-9]{1,5})?")

ReasoningField = Literal["reasoning_content", "reasoning", "both"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """How a server behaves.

    Args:
        host, port: where it listens; port 0 takes a free one.
        api_keys: keys of which a request has to bring one; none lets everyone in.
        allow_open: whether a host other than loopback is served without a key.
        allowed_hosts: further names that the `Host` header may have.
        cors_origins: origins whose pages may call it; "*" is every one.
        max_running: the most replies that decode at once.
        max_queue: the most replies that wait for that.
        max_kv_size, keep, kv_bits: of every reply's cache; see `mlxqwen.make_cache`.
        prefill_chunk: prompt tokens a step; None for what fits the model and the machine.
        max_model_len: the most tokens of a prompt and its reply; None for what the model has room for.
        timeout: the longest that a request may take, in seconds; None for no limit.
        drain: how long running replies may go on once the server is told to end, in seconds.
        single: whether a name that no model has means the first one.
        keep_alive: seconds after which a model that nobody uses is unloaded; None for never.
        reasoning_field: the name that a reply's thought has in chat completions.
        log_content: whether what is asked and said is logged.
        max_body: bytes of a request's body.
        body_seconds: how long a client may take to send one.
        stall_seconds: how long a client may read nothing of a stream that waits for it.
        keepalive_seconds: how long a stream is silent before a comment is sent.
        stuck_seconds: how long a step of the engine may take before it counts as stuck.

    Raises:
        OptionError: a value out of range, a host or origin that no request has, or an open host without a key.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = ()
    allow_open: bool = False
    allowed_hosts: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    max_running: int = 256
    max_queue: int = 1024
    max_kv_size: int | None = None
    keep: int = 4
    kv_bits: int | None = None
    prefill_chunk: int | None = None
    max_model_len: int | None = None
    timeout: float | None = None
    drain: float = 30.0
    single: bool = False
    keep_alive: float | None = None
    reasoning_field: ReasoningField = "reasoning_content"
    log_content: bool = False
    max_body: int = 32 * 2**20
    body_seconds: float = 60.0
    stall_seconds: float = 120.0
    keepalive_seconds: float = 5.0
    stuck_seconds: float = 60.0

    def __post_init__(self) -> None:
        check_integer("port", self.port, 0, 65_535)
        check_integer("max_running", self.max_running, 1)
        check_integer("max_queue", self.max_queue, 0)
        check_number("drain", self.drain, 0.0, 86_400.0)
        if self.timeout is not None:
            check_number("timeout", self.timeout, 0.0, 1e9, low_is_open=True)
        if self.keep_alive is not None:
            check_number("keep_alive", self.keep_alive, 0.0, 1e9)
        if self.max_model_len is not None:
            check_integer("max_model_len", self.max_model_len, 1)
        for key in self.api_keys:
            if not key:
                raise OptionError("api_key: found an empty one, expected a plain word")
            if not key.isascii() or not key.isprintable() or key != key.strip():
                raise OptionError("api_key: found one with other than visible ASCII characters, expected a plain word")
        for name in self.allowed_hosts:
            if not _HOST_NAME.fullmatch(name):
                raise OptionError(f"allowed_host: found {name!r}, expected a name such as box.local, without a port")
        for origin in self.cors_origins:
            if origin not in ("*", "null") and not _ORIGIN.fullmatch(origin):
                raise OptionError(
                    f"cors_origin: found {origin!r}, expected scheme and host alone, such as https://example.org, or *"
                )
        if not (self.api_keys or self.allow_open or is_loopback(self.host)):
            raise OptionError(
                f"host: found {self.host} without a key, expected 127.0.0.1, localhost or ::1",
                hint="Others could use the model: give --api-key KEY, or --allow-open if that is meant.",
            )

    def context(self, config: ModelConfig) -> int | None:
        """The most tokens of a prompt and its reply of a model; None if a window slides.

        Raises `OptionError` for a `max_model_len` that it has no room for.
        """
        room = config.context_length
        slides = self.max_kv_size is not None and self.max_kv_size <= room
        if slides:
            return self.max_model_len
        if self.max_model_len is not None and self.max_model_len > room:
            from mlxqwen.chat.prompts import extending  # which imports much that settings alone do without

            extend = extending(config, self.max_model_len - 1)
            raise OptionError(
                f"max_model_len: found {self.max_model_len:,}, but the model's context is {room:,} tokens",
                hint=f"Slide over it with --max-kv-size, {extend}or ask for less.",
            )
        return min(room, self.max_model_len or room)

    def check_holds_prompts(self, tokenizer: Tokenizer) -> None:
        """Raise `OptionError` for a `max_model_len` that no chat prompt of a model would leave an answer's token."""
        if self.max_model_len is None:
            return
        from mlxqwen.chat.prompts import shortest_prompt

        shortest = shortest_prompt(tokenizer)
        if shortest is not None and self.max_model_len <= shortest:
            raise OptionError(
                f"max_model_len: found {self.max_model_len:,}, but the shortest chat prompt of the model takes "
                f"{shortest:,} tokens",
                hint=f"Give more than {shortest:,}, by as many as questions and answers need, or leave it out.",
            )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches `host`, a name or an address."""
    if host == "localhost":
        return True
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
