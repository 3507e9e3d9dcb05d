"""One tree of errors: everything that mlxqwen raises on purpose.

MlxqwenError
├── OptionError          an argument or option that cannot be honoured (also a ValueError)
│   ├── ContextLengthError   a prompt that does not fit the model's context
│   └── MessagesError        a conversation that no chat template could render
├── ConfigError          config.json: keys missing, mistyped, out of bounds, unsupported
├── CheckpointError      weight files: damaged, foreign, incomplete, of the wrong names, dtypes or shapes
├── UnsupportedFormatError   a sound checkpoint in a format that this version does not read
├── TokenizerError       tokenizer files: missing or damaged
├── TemplateError        a chat template that is broken, forbidden or too expensive
├── CacheError           a key/value cache used or restored where it does not fit
├── HubError             a model that could not be found or downloaded
├── InsufficientMemoryError  a model that does not fit this machine
├── ServerError          an address that no server can listen at
└── GenerationError      logits that no token can be drawn from

Every error names the thing, what was found and what was expected in its first line, and the way out in its second.
"""

from __future__ import annotations

__all__ = [
    "CacheError",
    "CheckpointError",
    "ConfigError",
    "ContextLengthError",
    "GenerationError",
    "HubError",
    "InsufficientMemoryError",
    "MessagesError",
    "MlxqwenError",
    "OptionError",
    "ServerError",
    "TemplateError",
    "TokenizerError",
    "UnsupportedFormatError",
]


def one_line(text: str, limit: int = 600) -> str:
    """`text` as one printable line of at most `limit` characters.

    Messages quote names from files that nobody vouches for: line breaks, terminal escapes and
    bidirectional controls come out as `\\x..` escapes, so that a tensor's name cannot forge output.
    """
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return line if len(line) <= limit else f"{line[: limit - 1]}…"


class MlxqwenError(Exception):
    """The root of the tree.

    Args:
        problem: the thing, what was found and what was expected.
        hint: the way out, if there is one.
    """

    def __init__(self, problem: str, *, hint: str = "") -> None:
        self.problem = one_line(problem)
        self.hint = one_line(hint)
        super().__init__(self.problem if not hint else f"{self.problem}\n{self.hint}")


class OptionError(MlxqwenError, ValueError):
    """An argument or option that cannot be honoured."""


class ContextLengthError(OptionError):
    """A prompt that does not fit the model's context."""


class MessagesError(OptionError):
    """A conversation that no chat template could render."""


class ConfigError(MlxqwenError):
    """`config.json` is missing, damaged, out of bounds, or describes something else than Qwen3."""


class CheckpointError(MlxqwenError):
    """Weight files that are damaged, foreign or incomplete, or tensors that do not fit the model."""


class UnsupportedFormatError(MlxqwenError):
    """A sound checkpoint in a format that this version does not read."""


class TokenizerError(MlxqwenError):
    """Tokenizer files that are missing or damaged."""


class TemplateError(MlxqwenError):
    """A chat template that is broken, forbidden or too expensive."""


class CacheError(MlxqwenError):
    """A key/value cache used or restored where it does not fit."""


class HubError(MlxqwenError):
    """A model that could not be found or downloaded."""


class InsufficientMemoryError(MlxqwenError):
    """A model whose weights and cache do not fit this machine's memory."""


class ServerError(MlxqwenError):
    """An address that no server can listen at."""


class GenerationError(MlxqwenError):
    """Logits that no token can be drawn from."""
