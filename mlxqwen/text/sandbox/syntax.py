"""The syntax that a template may use, with the meter built in."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jinja2.ext
import jinja2.parser
from jinja2 import nodes
from jinja2.visitor import NodeTransformer

from mlxqwen.text.sandbox.filters import ADMIT, CONCAT, SLICE, STEP, WEIGH
from mlxqwen.text.sandbox.meter import forbidden, too_expensive

MAX_SYNTAX_NODES = 20_000
SYNTAX = """
Add And Assign AssignBlock Break Call CallBlock Compare Concat CondExpr Const Continue Dict Div Filter
FilterBlock FloorDiv For Getattr Getitem If Keyword List Macro Mod Mul NSRef Name Neg Not Operand Or Output
Pair Pos Pow Scope Slice Sub Template TemplateData Test Tuple With
"""
ALLOWED_SYNTAX = frozenset(SYNTAX.split())


class GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}` marks what a model wrote; here it is just its content."""

    tags = {"generation"}  # noqa: RUF012 - a set in the base class too

    def parse(self, parser: jinja2.parser.Parser) -> nodes.Node:
        """The content as a scope of its own."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def filtered(node: nodes.Expr, name: str, *args: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(node, name, list(args), [], None, None, lineno=node.lineno)


class MeterInserter(NodeTransformer):
    """Refuses syntax that is not listed and builds the meter into the rest."""

    def __init__(self) -> None:
        self._seen = 0

    def visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> Any:
        self._seen += 1
        if self._seen > MAX_SYNTAX_NODES:
            raise too_expensive("too much syntax")
        if type(node).__name__ not in ALLOWED_SYNTAX:
            raise forbidden(f"line {node.lineno}: {type(node).__name__.lower()}")
        return super().visit(node, *args, **kwargs)

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802 - named by Jinja
        self.generic_visit(node)
        step = filtered(nodes.Const(0, lineno=node.lineno), STEP)
        if node.test is not None:
            node.test = nodes.And(step, node.test, lineno=node.lineno)
        return self._count_runs(node)

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return self._count_runs(node)

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return self._count_runs(node)

    def _count_runs(self, node: Any) -> nodes.Node:
        written = sum(len(data.data) for part in node.body for data in template_data(part))
        step = filtered(nodes.Const(written, lineno=node.lineno), STEP)
        node.body.insert(0, nodes.ExprStmt(step, lineno=node.lineno))
        result: nodes.Node = node
        return result

    def visit_List(self, node: nodes.List) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return filtered(node, ADMIT)

    visit_Dict = visit_List  # noqa: N815

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return node if node.ctx == "store" else filtered(node, ADMIT)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return filtered(node.nodes[0], CONCAT, *node.nodes[1:])

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        node.expr = weighed(node.expr)
        for operand in node.ops:
            operand.expr = weighed(operand.expr)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        if not isinstance(node.arg, nodes.Slice):
            node.arg = weighed(node.arg)
            return node
        none = nodes.Const(None, lineno=node.lineno)
        bounds = (node.arg.start, node.arg.stop, node.arg.step)
        return filtered(node.node, SLICE, *(none if bound is None else bound for bound in bounds))


def template_data(node: nodes.Node) -> Iterator[nodes.TemplateData]:
    if isinstance(node, nodes.TemplateData):
        yield node
    yield from node.find_all(nodes.TemplateData)


def weighed(node: nodes.Expr) -> nodes.Expr:
    return node if isinstance(node, nodes.Const) else filtered(node, WEIGH)
