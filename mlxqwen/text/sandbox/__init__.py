"""Chat templates, rendered by Jinja's sandbox within limits that Jinja lacks.

`ImmutableSandboxedEnvironment` keeps a template away from Python's internals. It bounds neither time nor memory.
This folder adds that, and a short list of allowed syntax, attributes, filters and tests:

- `syntax.py` bounds the source before it is compiled, and inserts the counting into loops, macros and literals;
- `operations.py` bounds what one operator, method or filter may make, before it runs;
- `meter.py` counts steps, sizes of values and memory of one rendering;
- `environment.py` puts them together: `render`.

Limits are counts, so that they do not depend on the machine. They grow with the caller's own data.
"""

from mlxqwen.text.sandbox.environment import render

__all__ = ["render"]
