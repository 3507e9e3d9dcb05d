"""The layers of the package, and which of them may know which libraries."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import mlxqwen

PACKAGE = Path(mlxqwen.__file__).parent
# From the ground up: a folder imports only what stands before it in this list, and itself.
LAYERS = [
    "errors",
    "installation",
    "checks",
    "console",
    "status_line",
    "forks",
    "shutdown",
    "daemons",
    "symbol_alias",
    "blas",
    "device",
    "files",
    "model",
    "cache",
    "sampling",
    "text",
    "chat",
    "engine",
    "server",
    "cli",
]
DOORS = ["__main__", "__init__"]
# The only layers that may know these libraries.
HOMES = {
    "tokenizers": {"text"},
    "jinja2": {"text"},
    "pydantic": {"chat", "server"},
    "pydantic_core": {"chat", "server"},
    "jsonschema": {"chat"},
    "referencing": {"chat"},
    "llguidance": {"chat"},
    "attrs": {"chat"},
    "huggingface_hub": {"files"},
    "modelscope_hub": {"files"},
    "click": {"cli"},
    "markdown_it": {"cli"},
    "prompt_toolkit": {"cli"},
    "wcwidth": {"cli"},
    "rich": {"cli"},
    "matplotlib": {"cli"},
    "xxhash": {"cache"},
    "starlette": {"server"},
    "uvicorn": {"server"},
    "httptools": {"server"},
    "prometheus_client": {"server"},
    "mlxqwen_convert": {"cli", "engine"},
    "mlx": {"files", "device", "model", "cache", "sampling", "engine", "cli"},
}
MODULES = sorted(path for path in PACKAGE.rglob("*.py"))


def layer_of(module: Path) -> str:
    return module.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_names(module: Path) -> Iterator[str]:
    """Every `a.b.c` that a file imports, at its top or inside functions."""
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_every_module_has_its_layer() -> None:
    assert {layer_of(module) for module in MODULES} == {*LAYERS, *DOORS}


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_import_points_up(module: Path) -> None:
    layer = layer_of(module)
    if layer in DOORS:
        return
    for name in imported_names(module):
        parts = name.split(".")
        if parts[0] == "mlxqwen" and parts[1] in LAYERS:
            assert LAYERS.index(parts[1]) <= LAYERS.index(layer), f"{layer} imports {name}"


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_libraries_stay_in_their_layers(module: Path) -> None:
    for name in imported_names(module):
        library = name.partition(".")[0]
        known = library in sys.stdlib_module_names or library == "mlxqwen"
        assert known or layer_of(module) in HOMES[library], f"{module} imports {library}"


def test_only_commands_and_the_engine_reach_the_converter() -> None:
    reaching = {path for path in MODULES for name in imported_names(path) if name.startswith("mlxqwen_convert")}
    assert reaching == {
        PACKAGE / f"{name}.py"
        for name in ("engine/loading", "cli/cache", "cli/convert", "cli/fit", "cli/list_models", "cli/pull", "cli/rm")
    }


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_the_converter_is_imported_inside_functions(module: Path) -> None:
    for node in ast.parse(module.read_text()).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            assert "mlxqwen_convert" not in ast.unparse(node)


def test_only_the_files_touch_weight_files() -> None:
    for module in MODULES:
        if layer_of(module) == "files":
            continue
        for node in ast.walk(ast.parse(module.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "mx":
                assert node.attr not in {"load", "save", "savez", "save_safetensors", "save_gguf"}, str(module)


def test_no_thread_sets_the_default_device_of_all_others() -> None:
    """`mx.stream` does, for as long as it lasts; cores are shared where MLX has the processor alone."""
    sources = [*MODULES, *(PACKAGE.parent / "convert" / "mlxqwen_convert").rglob("*.py")]
    setters = {path.name for path in sources if re.search(r"\bmx\.stream\(", path.read_text())}
    assert setters == {"cores.py"}


def test_every_module_has_the_names_it_lists() -> None:
    for module in MODULES:
        name = ".".join(("mlxqwen", *module.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")
        if name == "mlxqwen.__main__":
            continue
        if layer_of(module) == "server" and importlib.util.find_spec("starlette") is None:
            continue  # its libraries are an extra
        imported = importlib.import_module(name)
        for public in getattr(imported, "__all__", []):
            assert hasattr(imported, public), f"{name}.{public}"


@pytest.mark.parametrize("folder", [PACKAGE, PACKAGE.parent / "convert" / "mlxqwen_convert"], ids=lambda one: one.name)
def test_long_files_say_why_they_are_one(folder: Path) -> None:
    """Beyond 350 lines, in their first docstring."""
    if not folder.is_dir():
        pytest.skip("an installed package has the converter elsewhere")
    for module in folder.rglob("*.py"):
        text = module.read_text()
        if text.count("\n") > 350:
            said = " ".join((ast.get_docstring(ast.parse(text)) or "").split())
            assert re.search(r"\b[Oo]ne file\b|\bLong by ", said), f"{module}: why is it one file?"
