"""docs/server.md tells of every field of every request, and of none that is not there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mlxqwen.server.app import _GET, _POST
from mlxqwen.server.openapi import document

PAGE = (Path(__file__).parents[1] / "docs" / "server.md").read_text(encoding="utf-8")
SECTIONS = {
    "Fields of a chat completion": ("/v1/chat/completions", 6),
    "Completions": ("/v1/completions", 6),
    "Anthropic's messages": ("/v1/messages", 5),
    "Responses": ("/v1/responses", 5),
}


def section(heading: str) -> str:
    """The text below a heading."""
    return PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]


def properties(path: str) -> set[str]:
    """The fields of a request, by the OpenAPI document."""
    told = document()
    content = told["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]["$ref"]
    return set(told["components"]["schemas"][content.rsplit("/", 1)[1]]["properties"])


@pytest.mark.parametrize("heading", SECTIONS)
def test_every_field_has_its_row_and_every_row_its_field(heading: str) -> None:
    path, columns = SECTIONS[heading]
    rows = [line.strip("| ").split(" | ") for line in section(heading).splitlines() if line.startswith("| `")]
    fields = [name for row in rows for name in re.findall(r"`(\w+)", row[0])]
    assert sorted(fields) == sorted(properties(path))
    lines = [line for line in section(heading).splitlines() if line.startswith("|")]
    assert {line.count("|") for line in lines} == {columns + 1}


def test_every_path_is_told_of() -> None:
    told = section("Endpoints")
    for path in (*_GET, *_POST):
        assert f"`{path}`" in told or f"{path}`" in told or f", {path}" in told, path


def test_counting_and_compacting_have_fields_of_what_they_count_and_compact() -> None:
    assert properties("/v1/messages/count_tokens") < properties("/v1/messages")
    assert properties("/v1/responses/compact") < properties("/v1/responses")
