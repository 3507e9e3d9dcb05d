"""Jinja templates that nobody vouches for, rendered in this process within limits on time and memory.

Jinja's own sandbox keeps a template away from Python's internals, but not from using all memory or time. Here
a template is parsed, every syntax node is checked against a list of what chat templates need, and a meter is
built into each operation that can cost something: loops, macros, operators, comparisons, literals, slices,
filters, calls, output. Three rules bound everything:

- each operation costs steps, and the processor time of a rendering is limited;
- each value that a template makes is measured: text by its characters, containers by all that is in them, an
  element counted as often as it is referred to, so that no value can grow exponentially unseen;
- all text and containers made in one rendering are counted together, so memory is bounded too.

The limits grow with the caller's own data, which is trusted to be as large as it is.
"""

from mlxqwen.text.sandbox.rendering import render

__all__ = ["render"]
