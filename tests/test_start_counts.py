"""How much a start imports: a bound on the number of modules, and libraries that it has no use for."""

from __future__ import annotations

import pytest
from start_counts import STARTS, count_imported_modules, imported_modules

# A little above what is imported today, for the standard library's modules differ by version. The scheduler, its store
# and the layers' packages are some thirty small files where there were ten large ones: about 0.3 ms each.
BOUNDS = {"import mlxqwen": 2, "load and generate": 275, "mlxqwen generate": 310}


def test_modules_imported_stay_few() -> None:
    counts = count_imported_modules()
    assert counts.keys() == BOUNDS.keys()
    assert {name: count for name, count in counts.items() if count > BOUNDS[name]} == {}


@pytest.mark.parametrize("start", ["load and generate", "mlxqwen generate"])
def test_a_start_has_no_use_for_these(start: str) -> None:
    names = imported_modules(STARTS[start])
    assert {"mlxqwen.engine.engine", "mlxqwen.engine.generation", "mlx.core", "tokenizers"} <= set(names)
    unused = {"httpx", "huggingface_hub", "markdown_it", "mlxqwen_convert", "numpy", "prompt_toolkit", "rich"}
    assert not unused & {name.partition(".")[0] for name in names}
