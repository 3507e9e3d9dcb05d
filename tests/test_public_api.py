"""What `import mlxqwen` promises."""

from __future__ import annotations

import subprocess
import sys

import pytest

import mlxqwen


def run(program: str) -> str:
    """The output of a fresh interpreter in which warnings are errors."""
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_importing_costs_nothing() -> None:
    program = "import sys; before = {*sys.modules}; import mlxqwen; dir(mlxqwen); print(*({*sys.modules} - before))"
    assert set(run(program).split()) == {"__future__", "mlxqwen"}


@pytest.mark.parametrize(
    ("modules", "unneeded"),
    [
        ("model.loading, mlxqwen.cache", "numpy jinja2 tokenizers huggingface_hub click httpx"),
        ("console", "click mlx rich"),
    ],
)
def test_rooms_load_what_they_need(modules: str, unneeded: str) -> None:
    loaded = run(f"import mlxqwen.{modules}, sys; print(*(name.partition('.')[0] for name in sys.modules))").split()
    assert not {*unneeded.split()} & {*loaded}


def test_the_names_of_the_examples() -> None:
    names = "load, generate, stream_generate, batch_generate, SamplingParams, Engine, make_cache"
    output = run(f"from mlxqwen import {names}; print(*(name.__name__ for name in ({names})))")
    assert output.split() == names.split(", ")


def test_everything_listed_is_there() -> None:
    names = run("import mlxqwen\nfrom mlxqwen import *\nprint(*(n for n in mlxqwen.__all__ if n in globals()))").split()
    assert names == mlxqwen.__all__ == sorted(set(mlxqwen.__all__))
    assert set(mlxqwen.__all__) <= set(dir(mlxqwen))
    assert set(mlxqwen._HOME) == set(mlxqwen.__all__) - {"__version__"}
    for name, home in mlxqwen._HOME.items():
        assert getattr(mlxqwen, name) is vars(sys.modules[f"mlxqwen.{home}"])[name]
        assert name in sys.modules[f"mlxqwen.{home}"].__all__


def test_unknown_names() -> None:
    with pytest.raises(AttributeError, match="no attribute 'generated'"):
        _ = mlxqwen.generated
    with pytest.raises(ImportError, match="nothing_such"):
        exec("from mlxqwen import nothing_such")


def test_modules_do_not_shadow_functions() -> None:
    program = """
import pkgutil
import mlxqwen, mlxqwen.engine.text_generation, mlxqwen.engine.engine, mlxqwen.model.loading, mlxqwen.chat.reply
modules = {module.name for module in pkgutil.iter_modules(mlxqwen.__path__)}
print(sorted(modules & set(mlxqwen.__all__)))
print(mlxqwen.generate is mlxqwen.engine.text_generation.generate, mlxqwen.load is mlxqwen.engine.engine.load)
"""
    assert run(program) == "[]\nTrue True\n"


def test_the_version() -> None:
    assert [part.isdigit() for part in mlxqwen.__version__.split(".")] == [True] * 3
