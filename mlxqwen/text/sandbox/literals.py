"""Text that a template itself spells out, replaced before the template runs."""

from __future__ import annotations

import re
from collections.abc import Mapping

from jinja2 import nodes
from jinja2.visitor import NodeVisitor


class LiteralReplacer(NodeVisitor):
    """Replaces texts in a template's string literals and in what it writes between its tags.

    Args:
        replacements: text → what stands in its place; where several fit, the first and then the longest is taken.
    """

    def __init__(self, replacements: Mapping[str, str]) -> None:
        self._replacements = replacements
        longest_first = sorted(replacements, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)))

    def visit_Const(self, node: nodes.Const) -> None:  # noqa: N802 - named by Jinja
        if isinstance(node.value, str):
            node.value = self._replace(node.value)

    def visit_TemplateData(self, node: nodes.TemplateData) -> None:  # noqa: N802
        node.data = self._replace(node.data)

    def _replace(self, text: str) -> str:
        return self._pattern.sub(lambda found: self._replacements[found[0]], text)
