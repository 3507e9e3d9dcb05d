"""The order of the rooms, and what importing them costs."""

from __future__ import annotations

import ast
import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import mlxqwen

PACKAGE = Path(mlxqwen.__file__).parent
# From the ground floor up: a room imports only rooms above it in this list.
ROOMS = [
    "errors",
    "console",
    "json_file",
    "config",
    "checkpoint",
    "hub",
    "device",
    "layers",
    "model",
    "loading",
    "footprint",
    "cache",
    "sampling",
    "generation",
    "messages",
    "sandbox",
    "chat_template",
    "tokenizer",
    "stop",
    "reply",
    "completion",
    "engine",
    "cli",
    "__main__",
]
# The only rooms that may know these libraries.
HOMES = {
    "tokenizers": {"tokenizer"},
    "jinja2": {"sandbox"},
    "huggingface_hub": {"hub"},
    "click": {"cli"},
    "mlx": {"checkpoint", "device", "layers", "model", "loading", "footprint", "cache", "sampling", "generation"}
    | {"completion", "engine", "cli"},
}
MODULES = sorted(path for path in PACKAGE.rglob("*.py"))


def room_of(module: Path) -> str:
    return module.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_names(module: Path) -> Iterator[str]:
    """Every `a.b.c` that a file imports, at its top or inside functions."""
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_every_module_has_its_room() -> None:
    assert {room_of(module) for module in MODULES} == {*ROOMS, "__init__"}


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_import_points_up(module: Path) -> None:
    room = room_of(module)
    if room == "__init__":
        return
    for name in imported_names(module):
        parts = name.split(".")
        if parts[0] == "mlxqwen" and parts[1] in ROOMS and parts[1] != room:
            assert ROOMS.index(parts[1]) < ROOMS.index(room), f"{room} imports {name}"


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_libraries_stay_in_their_rooms(module: Path) -> None:
    for name in imported_names(module):
        library = name.partition(".")[0]
        known = library in sys.stdlib_module_names or library == "mlxqwen"
        assert known or room_of(module) in HOMES[library], f"{module} imports {library}"


def test_only_the_checkpoint_room_touches_weight_files() -> None:
    for module in MODULES:
        if room_of(module) == "checkpoint":
            continue
        for node in ast.walk(ast.parse(module.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "mx":
                assert node.attr not in {"load", "save", "savez", "save_safetensors", "save_gguf"}, str(module)


def test_no_room_bears_the_name_of_a_public_function() -> None:
    assert not {*ROOMS} & {*mlxqwen.__all__}


def test_public_names_exist() -> None:
    for module in MODULES:
        name = ".".join(("mlxqwen", *module.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")
        if name == "mlxqwen.__main__":
            continue
        imported = importlib.import_module(name)
        for public in getattr(imported, "__all__", []):
            assert hasattr(imported, public), f"{name}.{public}"
    assert {*mlxqwen.__all__} <= {*dir(mlxqwen)}
    with pytest.raises(AttributeError, match="nonsense"):
        mlxqwen.nonsense  # noqa: B018 - the access is what is tested


def modules_after(program: str) -> set[str]:
    """The top-level modules of a fresh interpreter that has run `program`."""
    result = subprocess.run(
        [sys.executable, "-c", f"{program}\nimport sys; print(*(name.partition('.')[0] for name in sys.modules))"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(PACKAGE.parent)},
    )
    return set(result.stdout.split())


def test_importing_the_package_costs_nothing() -> None:
    heavy = {"numpy", "mlx", "jinja2", "tokenizers", "huggingface_hub", "click", "rich", "httpx", "inspect", "asyncio"}
    assert not heavy & modules_after("import mlxqwen; mlxqwen.__version__")


def test_loading_a_model_needs_neither_text_nor_the_hub() -> None:
    heavy = {"numpy", "jinja2", "tokenizers", "huggingface_hub", "click", "httpx"}
    assert not heavy & modules_after("import mlxqwen.loading, mlxqwen.generation, mlxqwen.cache")
