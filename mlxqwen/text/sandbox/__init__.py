"""Chat templates, rendered by Jinja's sandbox within limits that Jinja lacks.

`ImmutableSandboxedEnvironment` keeps a template away from Python's internals. It bounds neither time nor memory.
This folder adds that, and a short list of allowed syntax, attributes, filters and tests:

- `syntax.py` bounds the source before it is compiled, and inserts the counting into loops, macros and literals;
- `operations.py` bounds what one operator, method or filter may make, before it runs;
- `meter.py` counts steps, sizes of values and memory of one rendering;
- `environment.py` puts them together.

Limits are counts, so that they do not depend on the machine. They grow with the caller's own data.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlxqwen.errors import TemplateError

__all__ = ["RenderError", "render"]


class RenderError(TemplateError):
    """A template that failed on what it was given, in words of Jinja or Python."""


def render(source: str, variables: Mapping[str, Any], *, replacements: Mapping[str, str] | None = None) -> str:
    """Render a template. Jinja is imported with the first one, as loading and raw text need none.

    Args:
        source: the template; compiled once for the same `replacements`.
        variables: plain JSON values by name; the template cannot change them.
        replacements: texts in the template's own literals → what stands in their place; variables are left alone.

    Raises:
        RenderError: the template fails on the variables.
        TemplateError: it is broken, forbidden, too expensive, or raises an exception of its own.
    """
    from mlxqwen.text.sandbox.environment import render_template

    return render_template(source, variables, tuple((replacements or {}).items()))
