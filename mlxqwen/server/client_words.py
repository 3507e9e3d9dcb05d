"""Errors of the engine in the words of a request: what only the server's owner can do is no way out for a client."""

from __future__ import annotations

import re

from mlxqwen.errors import (
    ContextLengthError,
    GenerationError,
    InsufficientMemoryError,
    MlxqwenError,
    TemplateError,
)

__all__ = ["in_client_words"]

_PYTHON = re.compile(r"\b[a-z_]+\((?!s\))|\b[a-z_]+=(?:…|True|False|None)|\bin Python\b")
# Options of commands, and Python: calls, arguments, and names of the package.
_OF_OWNERS = re.compile(
    r"(?<![\w-])--[a-z]"
    r"|\b(?:mlxqwen|Engine|Conversation|DraftModel|SamplingParams|KVCache|make_cache|add_generation_prompt)\b"
    rf"|{_PYTHON.pattern}"
)
_PYTHON_BESIDE = re.compile(r"(\(--[^;()]*);(?:[^()]|\([^()]*\))*\)")
_PYTHONS_VALUES = re.compile(r"\bfound (NoneType|None|True|False)(?=[,;.]|$)")
_IN_JSON = {"NoneType": "null", "None": "null", "True": "true", "False": "false"}
_WAYS_OUT: dict[type[MlxqwenError], str] = {
    ContextLengthError: "Shorten it, leave out older messages, or ask a model with a longer context.",
    InsufficientMemoryError: "Shorten it, ask for fewer tokens (max_tokens), or try again later.",
    TemplateError: "Ask another model, or /v1/completions, which takes plain text.",
    GenerationError: "Ask another model.",
}


def in_client_words(error: MlxqwenError, way_out: str | None = None) -> tuple[str, str]:
    """What a client is told of an error, and the way out that is the owner's, for the log; empty if there is none.

    Args:
        error: the error.
        way_out: in place of one that is the owner's; by default what a request of this kind can do.
    """
    if not _OF_OWNERS.search(error.hint):
        return _message(error.problem, error.hint), ""
    if way_out is None:
        way_out = next((text for kind, text in _WAYS_OUT.items() if isinstance(error, kind)), "")
    return _message(error.problem, way_out), _on_command_line(error.hint)


def _on_command_line(hint: str) -> str:
    """A way out as who runs the command can take it: without what is for programs in Python, where that leaves any."""
    sentences = _PYTHON_BESIDE.sub(r"\1)", hint).split(". ")
    return ". ".join(one for one in sentences if not _PYTHON.search(one)) or hint


def _message(problem: str, way_out: str) -> str:
    problem = _PYTHONS_VALUES.sub(lambda found: f"found {_IN_JSON[found[1]]}", problem)
    return problem if not way_out else f"{problem.rstrip('.')}. {way_out}"
