"""What a path that leads nowhere was meant to be: a prefix too much or too few, another server's name, a slip."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import SequenceMatcher

__all__ = ["follows_another", "meant_path"]

_VERSION = "v1"
# What other servers (Ollama, text-generation-inference, llama.cpp) call it, by the last part of their paths.
_OTHER_NAMES = {"chat": "/v1/chat/completions", "generate": "/v1/completions", "tags": "/v1/models"}
_LIKENESS = 0.72  # of difflib's ratio: a slip or another form of a word, and no other word
_LONGEST = 100  # characters; what is longer is nobody's slip


def meant_path(path: str, known: Iterable[str]) -> str | None:
    """The known path that one was meant to be; None if it is like no other.

    In this order: a known path behind other parts, whatever its `v1`; what other servers call it; the known path that
    is spelled most alike.

    Args:
        path: that leads nowhere; never part of the result.
        known: paths; a part such as `{id}` stands for any one.
    """
    if len(path) > _LONGEST:
        return None
    parts = _parts(path)
    if not parts:
        return None
    by_parts = {_parts(one): one for one in known}
    behind = [own for own in by_parts if _ends_with(parts, own)]
    if behind:
        return by_parts[max(behind, key=lambda own: (len(own), sum("{" not in part for part in own)))]
    if parts[-1] in _OTHER_NAMES:
        return _OTHER_NAMES[parts[-1]]
    likeness = {own: _likeness(parts, own) for own in by_parts}
    best = max(likeness, key=likeness.__getitem__, default=())
    return by_parts[best] if best and likeness[best] >= _LIKENESS else None


def follows_another(path: str, meant: str, known: Iterable[str]) -> bool:
    """Whether a path is the one that was meant behind another known one, as of a client whose base is an endpoint.

    Args:
        path: that leads nowhere.
        meant: by it; see `meant_path`.
        known: paths.
    """
    parts, own = _parts(path), _parts(meant)
    before = parts[: -len(own)]
    return _ends_with(parts, own) and any(_ends_with(before, _parts(one)) for one in known if "{" not in one)


def _parts(path: str) -> tuple[str, ...]:
    return tuple(part for part in path.lower().split("/") if part not in ("", _VERSION))


def _ends_with(parts: tuple[str, ...], own: tuple[str, ...]) -> bool:
    end = parts[-len(own) :]
    return len(end) == len(own) and all("{" in name or name == part for name, part in zip(own, end, strict=True))


def _likeness(parts: tuple[str, ...], own: tuple[str, ...]) -> float:
    """How alike two paths are, 0 to 1; only those of as many parts may be."""
    if len(parts) != len(own) or any("{" in name for name in own):
        return 0.0
    return SequenceMatcher(None, "/".join(parts), "/".join(own)).ratio()
