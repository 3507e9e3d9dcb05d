"""One rule for files of what was said: a new one is its owner's alone, one that was there keeps its mode."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mlxqwen.chat.request_files.answers import AnswerFile
from mlxqwen.chat.request_files.batch import parse_requests
from mlxqwen.engine.conversation_file import write_conversation


def answers(path: Path) -> None:
    requests = parse_requests('{"messages": [{"role": "user", "content": "Hi"}]}\n', "batch.jsonl")
    with AnswerFile(path, requests, "options") as file:
        if not file.answered:
            file.append(requests[0], {"content": "Hello"})


def conversation(path: Path) -> None:
    write_conversation(path, [{"role": "user", "content": "Hi"}], {})


@pytest.fixture(params=[0, 0o022, 0o077])
def umask(request: pytest.FixtureRequest) -> Iterator[None]:
    before = os.umask(request.param)
    yield
    os.umask(before)


@pytest.mark.usefixtures("umask")
@pytest.mark.parametrize("write", [answers, conversation])
@pytest.mark.parametrize("mode", [None, 0o600, 0o640, 0o644])
def test_the_mode_of_what_was_said(write: Callable[[Path], None], mode: int | None, tmp_path: Path) -> None:
    path = tmp_path / "file"
    if mode is not None:
        path.touch()
        path.chmod(mode)
    for _ in range(2):
        write(path)
        assert path.stat().st_size > 0
        assert stat.S_IMODE(path.stat().st_mode) == (0o600 if mode is None else mode)
