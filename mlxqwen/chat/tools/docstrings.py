"""Docstrings of tools: the description of a function and of its parameters, in Google's or Sphinx's style."""

from __future__ import annotations

import inspect
import re

__all__ = ["own_docstring", "parse_docstring"]

_PARAMETER_SECTIONS = {"args", "arguments", "parameters", "keyword args", "keyword arguments"}
_OTHER_SECTIONS = {"attributes", "example", "examples", "note", "notes", "raises", "references", "return", "returns"}
_OTHER_SECTIONS |= {"see also", "todo", "warning", "warnings", "warns", "yield", "yields"}
_GOOGLE_ENTRY = re.compile(r"\*{0,2}(\w+) ?(?:\([^)]*\))?:(?: +(.*))?")
_SPHINX_FIELD = re.compile(r":(\w+)((?: [^:]*)?):(?: +(.*))?")
_SPHINX_PARAMETERS = {"param", "parameter", "arg", "argument", "key", "keyword"}


def own_docstring(described: type) -> str:
    """What a class was given as its docstring, not what `dataclass` writes in place of one."""
    text = described.__doc__ or ""
    return "" if text.startswith(f"{described.__name__}(") else text


def parse_docstring(docstring: str | None) -> tuple[str, dict[str, str]]:
    """The text before the first section or field, and the descriptions of parameters by name."""
    lines = inspect.cleandoc(docstring or "").splitlines()
    ends = (i for i, line in enumerate(lines) if _section(line) or _SPHINX_FIELD.fullmatch(line))
    end = next(ends, len(lines))
    return "\n".join(lines[:end]).strip(), _google(lines[end:]) | _sphinx(lines[end:])


def _section(line: str) -> str | None:
    """The name of the section that an unindented line opens."""
    name = line.removesuffix(":").lower()
    return name if line.endswith(":") and name in _PARAMETER_SECTIONS | _OTHER_SECTIONS else None


def _google(lines: list[str]) -> dict[str, str]:
    entries: dict[str, list[str]] = {}
    current: list[str] = []
    in_section, margin = False, None
    for line in lines:
        text, indent = line.strip(), len(line) - len(line.lstrip())
        if not text:
            continue
        if indent == 0:
            in_section, margin = _section(line) in _PARAMETER_SECTIONS, None
        elif in_section:
            margin = indent if margin is None else margin
            entry = _GOOGLE_ENTRY.fullmatch(text) if indent <= margin else None
            if entry:
                current = entries.setdefault(entry[1], [])
                text = entry[2] or ""
            current.append(text)
    return {name: " ".join(filter(None, texts)) for name, texts in entries.items()}


def _sphinx(lines: list[str]) -> dict[str, str]:
    entries: dict[str, list[str]] = {}
    current: list[str] = []
    for line in lines:
        if field := _SPHINX_FIELD.fullmatch(line):
            words = field[2].split()
            current = []
            if field[1] in _SPHINX_PARAMETERS and words:
                current = entries.setdefault(words[-1].lstrip("*\\"), [])
            current.append(field[3] or "")
        elif not line.startswith(" "):
            current = []
        else:
            current.append(line.strip())
    return {name: " ".join(filter(None, texts)) for name, texts in entries.items()}
