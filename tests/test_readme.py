"""The README: complete, and its snippets run."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DEMO_README = (ROOT / "mlxqwen" / "demo" / "README.md").read_text(encoding="utf-8")


def test_nothing_is_left_to_fill_in() -> None:
    assert "<!--" not in README


@pytest.mark.parametrize("name", ["README.md", "CHANGELOG.md"])
def test_lines_are_read_without_scrolling(name: str) -> None:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if len(line) > 140 and not line.startswith("|")] == []


def test_links_lead_somewhere() -> None:
    for link in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / link).exists(), link


def test_the_demos_table_is_the_one_of_the_demo() -> None:
    rows = [line for line in DEMO_README.splitlines() if line.startswith("|")]
    assert len(rows) > 10
    assert all(row in README for row in rows)


def test_the_table_of_conversions_is_the_one_of_their_page() -> None:
    page = (ROOT / "docs" / "conversion.md").read_text(encoding="utf-8")
    table = re.search(r"\| from \| to \|.*?\n\n", page, flags=re.DOTALL)
    assert table is not None
    assert table[0] in README


def test_ci_runs_the_first_two_blocks_as_written() -> None:
    blocks = re.findall(r"```sh\n(.*?)```", README, flags=re.DOTALL)
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    function = next(line for line in script.splitlines() if line.startswith("readme_command()"))
    for number, block in enumerate(blocks[:2], start=1):
        found = subprocess.run(
            ["bash", "-c", f"{function}; readme_command {number}"], cwd=ROOT, capture_output=True, text=True, check=True
        )
        assert found.stdout == block
        assert block.count("\n") == 1


@pytest.mark.parametrize("snippet", re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL))
def test_python_snippets_run_on_the_demo(
    snippet: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "response_format" in snippet:
        pytest.importorskip("llguidance")
    monkeypatch.chdir(tmp_path)
    local = re.sub(r'load\("Qwen/[^"]*"\)', "load()", snippet).replace("max_tokens=1024", "max_tokens=8")
    names: dict[str, Any] = {}
    exec(compile(local, "README.md", "exec", dont_inherit=True), names)
    assert capsys.readouterr().out
