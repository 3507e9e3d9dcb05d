"""`mlxqwen serve`'s options: each arrives, under the names that model cards have for other servers, too."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlxqwen.files.hub import DEMO_FOLDER
from mlxqwen.server import run as server_run
from mlxqwen.server.service import Service
from tests.command_line import Result, run

DEMO = str(DEMO_FOLDER)
YARN = json.dumps({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512})


def serve(
    monkeypatch: pytest.MonkeyPatch, look: Callable[[Any], Any], *arguments: str, status: int = 0
) -> tuple[Any, Result]:
    """What `look` sees of the service that the command would run, and what was written."""
    seen: list[Any] = []

    def instead(service: Service, listener: socket.socket, on_ready: Callable[[int], None], *_: object) -> None:
        on_ready(listener.getsockname()[1])
        seen.append(look(service))

    monkeypatch.setattr(server_run, "serve", instead)
    result = run("serve", "--port", "0", *arguments)
    assert result.status == status, result.err
    return (seen[0] if seen else None), result


def engine(service: Any) -> Any:
    (model,) = service.models.loaded
    return model.engine


def context(service: Any) -> Any:
    (model,) = service.models.loaded
    return model.context


OPTIONS: dict[str, tuple[list[str], Callable[[Any], Any], Any]] = {
    "host": (["--host", "localhost"], lambda one: one.settings.host, "localhost"),
    "api-key": (["--api-key", "a", "--api-key", "b"], lambda one: one.settings.api_keys, ("a", "b")),
    "max-running": (["--max-running", "3"], lambda one: engine(one).scheduler.max_running, 3),
    "max-num-seqs": (["--max-num-seqs", "3"], lambda one: engine(one).scheduler.max_running, 3),
    "dtype auto": ([DEMO, "--dtype", "auto"], lambda one: str(engine(one).model.dtype), "mlx.core.float32"),
    "max-queue": (["--max-queue", "5", "--max-running", "3"], lambda one: one.load.most, 8),
    "max-kv-size": (["--max-kv-size", "64"], lambda one: one.settings.max_kv_size, 64),
    "kv-bits": (["--kv-bits", "8"], lambda one: one.settings.kv_bits, 8),
    "prefix-cache": (["--prefix-cache", "1MB"], lambda one: engine(one).scheduler.store.capacity, 10**6),
    "timeout": (["--timeout", "5"], lambda one: one.settings.timeout, 5.0),
    "drain": (["--drain", "7"], lambda one: one.settings.drain, 7.0),
    "cors-origin": (["--cors-origin", "https://a.b"], lambda one: one.settings.cors_origins, ("https://a.b",)),
    "yarn-factor": ([DEMO, "--yarn-factor", "2"], context, 1024),
    "rope-scaling": ([DEMO, "--rope-scaling", YARN], context, 2048),
    "json-model-override-args": (
        ["--model-path", DEMO, "--json-model-override-args", f'{{"rope_scaling": {YARN}}}'],
        context,
        2048,
    ),
    "max-model-len": ([DEMO, "--rope-scaling", YARN, "--max-model-len", "1000"], context, 1000),
    "context-length": ([DEMO, "--context-length", "100"], context, 100),
    "draft": ([DEMO, "--draft", DEMO], lambda one: type(engine(one).speculative).__name__, "DraftModel"),
    "single": (["--single"], lambda one: one.models.find("gpt-4").name, "demo"),
    "served-model-name": ([DEMO, "--served-model-name", "mine"], lambda one: one.models.entries[0].name, "mine"),
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_arrives(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments, look, expected = OPTIONS[name]
    assert serve(monkeypatch, look, *arguments)[0] == expected


def test_the_prompt_cache_is_a_folder_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "cache"
    found, _ = serve(monkeypatch, lambda one: engine(one).scheduler.store.disk.folder, "--prompt-cache", str(folder))
    assert found == folder


def test_what_needs_no_asking_for_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    of_cards = ["--gpu-memory-utilization", "0.9", "--enable-prefix-caching", "--trust-remote-code"]
    of_cards += ["--reasoning-parser", "qwen3", "--enable-reasoning", "--tp", "8", "--tool-call-parser", "hermes"]
    _, result = serve(monkeypatch, context, *of_cards)
    assert "note: --reasoning-parser is not needed here: thought and calls are told apart\n" in result.err
    assert "note: --tensor-parallel-size is not needed here: one machine computes it all\n" in result.err
    assert "note: --gpu-memory-utilization is not needed here: memory is taken as replies need it\n" in result.err
    assert "note: --trust-remote-code is not needed here: no code of a model's is run\n" in result.err
    assert result.err.count("note: ") == 7
    assert "is served at http://127.0.0.1:" in result.out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--json-model-override-args", "{"], "--json-model-override-args: found {, expected"),
        (["--json-model-override-args", '{"num_hidden_layers": 1}'], "--json-model-override-args: found"),
        (["--json-model-override-args", '{"rope_scaling": 1}'], "--rope-scaling: found 1, expected a JSON object"),
        (["--rope-scaling", "yarn"], "--rope-scaling: not JSON"),
        (["--prefix-cache", "much"], "--prefix-cache: found 'much', expected a size"),
        (["--speculative", "lookup", "--draft-tokens", "0"], "--draft-tokens: found 0, expected an integer from 1"),
        (["--prompt-cache", __file__], "a file, expected a folder"),
        (["--cors-origin", "example.org"], "--cors-origin: found 'example.org', expected scheme and host alone"),
        (["--cors-origin", "https://example.org/"], "--cors-origin: found 'https://example.org/', expected scheme"),
        (["--allowed-host", "http://box"], "--allowed-host: found 'http://box', expected a name"),
        (["--allowed-host", "box:8000"], "--allowed-host: found 'box:8000', expected a name"),
    ],
    ids=str,
)
def test_what_cannot_be(arguments: list[str], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert words in serve(monkeypatch, context, *arguments, status=1)[1].err


def test_options_that_exclude_one_another(monkeypatch: pytest.MonkeyPatch) -> None:
    both = ["--json-model-override-args", '{"rope_scaling": {}}', "--rope-scaling", YARN]
    assert "expected one of them" in serve(monkeypatch, context, *both, status=2)[1].err
