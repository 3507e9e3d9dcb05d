"""Every public module, class, function and method says in its docstring what it is for."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted([*(ROOT / "mlxqwen").rglob("*.py"), *(ROOT / "convert" / "mlxqwen_convert").rglob("*.py")])


def undocumented(source: str) -> Iterator[str]:
    """The public definitions of a module that have no docstring.

    Public is what has no leading underscore, at the top of the module or in a public class. A method that a base class
    or a protocol of the same module has needs no docstring of its own.
    """
    module = ast.parse(source)
    if ast.get_docstring(module) is None:
        yield "module"
    classes = {node.name: node for node in module.body if isinstance(node, ast.ClassDef)}
    protocols = [node for node in classes.values() if "Protocol" in map(ast.unparse, node.bases)]
    for node in module.body:
        if not isinstance(node, ast.ClassDef | ast.FunctionDef) or node.name.startswith("_"):
            continue
        if ast.get_docstring(node) is None:
            yield node.name
        if isinstance(node, ast.ClassDef):
            inherited = {
                name for one in (*bases(node, classes), *protocols) if one is not node for name in methods(one)
            }
            for name, method in methods(node).items():
                if ast.get_docstring(method) is None and name not in inherited:
                    yield f"{node.name}.{name}"


def methods(node: ast.ClassDef) -> dict[str, ast.FunctionDef]:
    """The public methods of a class by name: of a property the getter, of an overloaded one the last."""
    by_name: dict[str, ast.FunctionDef] = {}
    for method in node.body:
        if not isinstance(method, ast.FunctionDef) or method.name.startswith("_"):
            continue
        if "overload" not in map(ast.unparse, method.decorator_list):
            by_name.setdefault(method.name, method)
    return by_name


def bases(node: ast.ClassDef, classes: dict[str, ast.ClassDef]) -> Iterator[ast.ClassDef]:
    """All classes of the module that a class inherits from."""
    for base in node.bases:
        if isinstance(base, ast.Name) and base.id in classes:
            yield classes[base.id]
            yield from bases(classes[base.id], classes)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_every_public_definition_has_a_docstring(file: Path) -> None:
    assert list(undocumented(file.read_text())) == []


def test_what_has_no_docstring_is_told() -> None:
    source = """
def documented(): "What it does."
def bare(): pass
def _private(): pass
class Form(Protocol):
    "A protocol."
    def kept(self): "What it does."
    def lost(self): ...
class Base:
    "A base."
    def stated(self): "What it does."
    @property
    def bare(self): return 1
    def _private(self): pass
class Derived(Base):
    "Another."
    def stated(self): return 2
    def added(self): return 3
    def kept(self): return 4
"""
    assert list(undocumented(source)) == ["module", "bare", "Form.lost", "Base.bare", "Derived.added"]
