"""How much a start imports: a bound on the number of modules, and libraries that it has no use for."""

from __future__ import annotations

import pytest
from benchmarks.modules import STARTS, imported_modules

# A little above what is imported today, for the standard library's modules differ by version. The scheduler, its store
# and the layers' packages are some thirty small files where there were ten large ones: about 0.3 ms each. A load looks
# at names of tensors, adapters, a model's purpose and aliases, each a file of its own.
BOUNDS = {"import mlxqwen": 2, "load and generate": 300, "mlxqwen generate": 355}


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
    assert not (unused | {"pydantic", "rich"}) & {name.partition(".")[0] for name in names}
