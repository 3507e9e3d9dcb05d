"""How much a start imports: a bound on the number of modules, and libraries that it has no use for."""

from __future__ import annotations

import pytest
from benchmarks.modules import STARTS, imported_modules

# A little above what is imported today, for the standard library's modules differ by version. What only some runs need,
# such as tools, hubs, draft models, the disk tier and Jinja, is imported by those.
BOUNDS = {"import mlxqwen": 2, "load and generate": 300, "mlxqwen generate": 340}


@pytest.fixture(scope="module")
def modules() -> dict[str, list[str]]:
    """By kind of start, what it imports; each in a process of its own, with the demo."""
    return {name: imported_modules(start) for name, start in STARTS.items()}


def test_modules_imported_stay_few(modules: dict[str, list[str]]) -> None:
    assert modules.keys() == BOUNDS.keys()
    counts = {name: len(names) for name, names in modules.items()}
    assert {name: count for name, count in counts.items() if count > BOUNDS[name]} == {}


@pytest.mark.parametrize("start", ["load and generate", "mlxqwen generate"])
def test_a_start_has_no_use_for_these(start: str, modules: dict[str, list[str]]) -> None:
    names = modules[start]
    assert {"mlxqwen.engine.engine", "mlxqwen.engine.generation", "mlx.core", "tokenizers"} <= set(names)
    unused = {"httpx", "huggingface_hub", "jsonschema", "markdown_it", "mlxqwen_convert", "numpy", "prompt_toolkit"}
    assert not (unused | {"pydantic", "rich", "tomllib", "xxhash"}) & {name.partition(".")[0] for name in names}
    own = ("cache.disk_tier", "chat.tools", "engine.speculation.draft_model", "engine.tool_loop", "files.hub_download")
    assert not {f"mlxqwen.{name}" for name in own} & set(names)


def test_a_model_is_loaded_without_jinja() -> None:
    names = imported_modules("from mlxqwen import Engine; Engine.load()")
    assert "mlx.core" in names
    assert "jinja2" not in names
