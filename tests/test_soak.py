"""The soak of the server: what is not as it was is told, and so is what ended otherwise than it should."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import soak

BEFORE = soak.State(replies=0, array_bytes=10_000_000, megabytes=150.0, threads=12, files=7)


@pytest.mark.parametrize(
    ("after", "told"),
    [
        ({}, []),
        ({"threads": 14, "megabytes": 155.0}, []),
        ({"replies": 2}, ["2 replies are left"]),
        ({"array_bytes": 11_000_000}, ["arrays have grown"]),
        ({"megabytes": 220.0}, ["the process has grown"]),
        ({"threads": 40}, ["threads have grown"]),
        ({"files": 8}, ["open files have grown"]),
    ],
    ids=str,
)
def test_what_is_not_as_it_was_is_told(after: dict[str, Any], told: list[str]) -> None:
    assert soak.differences(BEFORE, replace(BEFORE, **after)) == told


@pytest.mark.parametrize(
    ("end", "as_it_should"),
    [
        ("whole: 200", True),
        ("whole: 500", False),
        ("stream: 200 with an error", False),
        ("stall: nothing", False),
        ("leave: left", True),
        ("die: ConnectionResetError", False),
        ("too much: 400", True),
        ("too much: 200", False),
        ("background: 200 200", True),
        ("background: 200 404", False),
        ("one after another: 200 429", False),
        ("messages: TimeoutError", False),
    ],
)
def test_ends_that_should_not_be(end: str, as_it_should: bool) -> None:
    assert soak.expected(end) is as_it_should


def test_every_kind_of_client_has_its_request() -> None:
    for kind in soak.KINDS:
        path, body = soak.Client(1, 0, Counter())._body(kind)
        assert path in ("/v1/chat/completions", "/v1/responses", "/v1/messages")
        assert body["model"] == "demo"
