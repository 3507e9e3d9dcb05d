"""The syntax that a template may use: bounded before it is compiled, with the counting inserted."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import jinja2.ext
import jinja2.parser
from jinja2 import nodes
from jinja2.visitor import NodeTransformer

from mlxqwen.files.json_file import find_lone_surrogate
from mlxqwen.text.sandbox.meter import check_integer, forbidden, too_expensive
from mlxqwen.text.sandbox.operations import ADMIT, CONCAT, READ, SLICE, STEP

MAX_SOURCE_CHARACTERS = 128 * 1024
# Jinja copies its table of names at each branch, and walks once more through the body of each loop and macro. So the
# work of compiling is 10 × nodes + branches × names + nodes in bodies. Qwen3's template has 4,200: a second is 200,000.
MAX_COMPILE_WORK = 200_000
NODE_WORK = 10
NODE_UNITS = 10  # of a node that runs once; see `meter.STEP_UNITS`

SYNTAX = """
Add And Assign AssignBlock Break Call CallBlock Compare Concat CondExpr Const Continue Dict Div Filter
FilterBlock FloorDiv For Getattr Getitem If Keyword List Macro Mod Mul NSRef Name Neg Not Operand Or Output
Pair Pos Pow Scope Slice Sub Template TemplateData Test Tuple With
"""
ALLOWED_SYNTAX = frozenset(SYNTAX.split())
BRANCHES: tuple[type[nodes.Node], ...] = (
    nodes.AssignBlock,
    nodes.CallBlock,
    nodes.CondExpr,
    nodes.FilterBlock,
    nodes.For,
    nodes.If,
    nodes.Macro,
    nodes.Scope,
    nodes.With,
)


class GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}` marks what a model wrote; here it is just its content."""

    tags = {"generation"}  # noqa: RUF012 - a set in the base class too

    def parse(self, parser: jinja2.parser.Parser) -> nodes.Node:
        """The content as a scope of its own."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class SyntaxChecker(NodeTransformer):
    """Refuses syntax that is not listed or too much to compile, and inserts the counting.

    Args:
        replacements: texts in string literals and between tags → what stands in their place; where several
            begin at one character, the longest is taken.
    """

    def __init__(self, replacements: Mapping[str, str]) -> None:
        self._replacements = replacements
        self._spelled = re.compile("|".join(map(re.escape, sorted(replacements, key=len, reverse=True))) or r"(?!)")
        self._nodes = 0
        self._branches = 0
        self._walks = 0
        self._written = 0
        self._names: set[str] = set()

    def visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> Any:
        """Count and check a node, then what it holds."""
        if type(node).__name__ not in ALLOWED_SYNTAX:
            raise forbidden(f"line {node.lineno}: {type(node).__name__.lower()}")
        self._nodes += 1
        self._branches += isinstance(node, BRANCHES)
        if isinstance(node, nodes.Name):
            self._names.add(node.name)
        self._check_work()
        return super().visit(node, *args, **kwargs)

    def _check_work(self) -> None:
        if NODE_WORK * self._nodes + self._branches * len(self._names) + self._walks > MAX_COMPILE_WORK:
            raise too_expensive("too much syntax")

    def visit_Const(self, node: nodes.Const) -> nodes.Node:  # noqa: N802 - named by Jinja
        """Bound integers, and make the replacements in text."""
        if isinstance(node.value, str):
            node.value = self._replace(node.value, node.lineno)
        elif isinstance(node.value, int):
            check_integer(node.value)
        return node

    def visit_TemplateData(self, node: nodes.TemplateData) -> nodes.Node:  # noqa: N802
        """Make the replacements in the text between tags, and count it."""
        node.data = self._replace(node.data, node.lineno)
        self._written += len(node.data)
        return node

    def _replace(self, text: str, line: int) -> str:
        if find_lone_surrogate(text) is not None:
            raise forbidden(f"line {line}: half of a surrogate pair")
        return self._spelled.sub(lambda found: self._replacements[found[0]], text)

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802
        """Charge each pass through a loop for the syntax and the text of its body."""
        seen, written = self._nodes, self._written
        self.generic_visit(node)
        self._walks += self._nodes - seen
        self._check_work()
        costs = (NODE_UNITS * (self._nodes - seen), self._written - written)
        step = filtered(*(nodes.Const(cost, lineno=node.lineno) for cost in costs), name=STEP)
        node.body.insert(0, nodes.ExprStmt(step, lineno=node.lineno))
        if isinstance(node, nodes.For) and node.test is not None:
            node.test = nodes.And(step, node.test, lineno=node.lineno)
        return node

    visit_Macro = visit_For  # noqa: N815
    visit_CallBlock = visit_For  # noqa: N815

    def visit_List(self, node: nodes.List) -> nodes.Node:  # noqa: N802
        """Charge for a list that the template makes."""
        self.generic_visit(node)
        return filtered(node, name=ADMIT)

    visit_Dict = visit_List  # noqa: N815

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:  # noqa: N802
        """Charge for a tuple that the template makes."""
        self.generic_visit(node)
        return node if node.ctx == "store" else filtered(node, name=ADMIT)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        """Let `concat` compute the operator `~`."""
        self.generic_visit(node)
        return filtered(*node.nodes, name=CONCAT)

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:  # noqa: N802
        """Charge a comparison for what it reads."""
        self.generic_visit(node)
        # Equal to a literal: no more is read than the literal has.
        if len(node.ops) > 1 or node.ops[0].op not in ("eq", "ne") or not isinstance(node.ops[0].expr, nodes.Const):
            node.expr = read(node.expr)
            for operand in node.ops:
                operand.expr = read(operand.expr)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:  # noqa: N802
        """Charge a key for being read, and let `take_slice` compute slices."""
        self.generic_visit(node)
        if not isinstance(node.arg, nodes.Slice):
            node.arg = read(node.arg)
            return node
        none = nodes.Const(None, lineno=node.lineno)
        bounds = (node.arg.start, node.arg.stop, node.arg.step)
        return filtered(node.node, *(none if bound is None else bound for bound in bounds), name=SLICE)


def filtered(node: nodes.Expr, *args: nodes.Expr, name: str) -> nodes.Filter:
    """The syntax of `node | name(args)`."""
    return nodes.Filter(node, name, list(args), [], None, None, lineno=node.lineno)


def read(node: nodes.Expr) -> nodes.Expr:
    """The syntax of a value that is charged for being read; constants are not."""
    return node if isinstance(node, nodes.Const) else filtered(node, name=READ)
