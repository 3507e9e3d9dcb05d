"""`mlxqwen serve` as a process of its own: official clients, sockets that misbehave, and signals."""

from __future__ import annotations

import http.client
import json
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from mlxqwen.engine.engine import Engine
from mlxqwen.files.hub import DEMO_FOLDER
from mlxqwen.model.qwen3 import Qwen3ForCausalLM
from mlxqwen.server.settings import ServerSettings
from mlxqwen.text.tokenizer import Tokenizer
from tests.asgi_calls import events_of
from tests.command_line import run
from tests.server_process import Process, process

ROOT = Path(__file__).parents[1]
QUESTION = [{"role": "user", "content": "How many r's in strawberry?"}]


# In a window a reply without a limit is not over before a test is.
WINDOW = ("--max-kv-size", "512")
ENDLESS = {"model": "demo", "messages": QUESTION, "stream": True, "ignore_eos": True}


@pytest.fixture(scope="module")
def server() -> Iterator[Process]:
    with process(*WINDOW) as made:
        yield made
        status, log = made.end()
        assert status == 0, log
        assert "Traceback" not in log


@pytest.fixture(scope="module")
def several() -> Iterator[tuple[Process, socket.socket]]:
    """A server of the demo model and of one whose hub never answers, and that hub."""
    with socket.create_server(("127.0.0.1", 0)) as hub:
        environment = {"HF_ENDPOINT": f"http://127.0.0.1:{hub.getsockname()[1]}", "HF_HUB_ETAG_TIMEOUT": "600"}
        demo = ROOT / "mlxqwen" / "demo"
        with process("--drain", "0", "-m", f"demo={demo}", "-m", "org/model", **environment) as made:
            yield made, hub


def test_the_line_that_it_prints_works(server: Process) -> None:
    done = subprocess.run(shlex.split(server.curl), capture_output=True, text=True, timeout=60, check=True)
    assert json.loads(done.stdout)["choices"][0]["finish_reason"] == "stop"


def test_the_openai_client(server: Process) -> None:
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=server.url, api_key="EMPTY") as client:
        assert [model.id for model in client.models.list()] == ["demo"]
        reply = client.chat.completions.create(model="demo", messages=QUESTION, seed=5, max_tokens=200)
        assert reply.choices[0].finish_reason == "stop"
        pieces = {"content": "", "reasoning_content": ""}
        stream = client.chat.completions.create(
            model="demo", messages=QUESTION, seed=5, max_tokens=200, stream=True, stream_options={"include_usage": True}
        )
        for chunk in stream:
            for choice in chunk.choices:
                for name in pieces:
                    pieces[name] += getattr(choice.delta, name, None) or ""
        assert pieces["content"] == reply.choices[0].message.content
        assert pieces["reasoning_content"] == reply.choices[0].message.reasoning_content
        assert chunk.usage == reply.usage.model_copy(
            update={"prompt_tokens_details": chunk.usage.prompt_tokens_details}
        )
        with pytest.raises(openai.NotFoundError, match="gpt-4"):
            client.chat.completions.create(model="gpt-4", messages=QUESTION)
        with pytest.raises(openai.BadRequestError, match="temperature"):
            client.chat.completions.create(model="demo", messages=QUESTION, temperature=1000)


def test_the_demo_holds_4096_tokens_and_answers_short_ones_as_ever(
    several: tuple[Process, socket.socket], demo: tuple[Qwen3ForCausalLM, Tokenizer]
) -> None:
    server, _ = several

    def asked(*messages: dict[str, str]) -> tuple[int, Any]:
        body = {"model": "demo", "messages": messages, "seed": 5, "max_tokens": 4000}
        status, text = server.get("/v1/chat/completions", "POST", body)
        return status, json.loads(text)

    assert json.loads(server.get("/v1/models")[1])["data"][0]["max_model_len"] == 4096
    reply = asked(*QUESTION)[1]["choices"][0]["message"]
    expected = Engine(*demo).chat(QUESTION, seed=5)
    assert (reply["content"], reply["reasoning_content"]) == (expected.content, expected.reasoning)
    rules = {"role": "system", "content": "Answer briefly and be correct. The files are in the folder. " * 17}
    whole = asked(rules, *QUESTION)[1]
    assert 512 < whole["usage"]["prompt_tokens"] < 1024
    assert "3" in whole["choices"][0]["message"]["content"]
    status, refused = asked({"role": "user", "content": "r " * 5000})
    assert (status, refused["error"]["code"]) == (400, "context_length_exceeded")
    assert "4,096" in refused["error"]["message"]


def test_the_openai_client_asks_for_a_response_in_the_background(server: Process) -> None:
    openai = pytest.importorskip("openai")
    asked: dict[str, Any] = {"model": "demo", "input": QUESTION[0]["content"], "temperature": 0.0}
    with openai.OpenAI(base_url=server.url, api_key="EMPTY") as client:
        expected = client.responses.create(**asked).output_text
        response = client.responses.create(**asked, background=True)
        while response.status in ("queued", "in_progress"):
            time.sleep(0.01)
            response = client.responses.retrieve(response.id)
        assert (response.status, response.output_text) == ("completed", expected)
        with client.responses.create(**asked, background=True, stream=True) as events:
            first = next(iter(events))
        rest = list(client.responses.retrieve(first.response.id, stream=True, starting_after=first.sequence_number))
        assert [event.sequence_number for event in rest] == list(range(1, len(rest) + 1))
        assert rest[-1].response.output_text == expected
        client.responses.delete(first.response.id)


def test_connections_that_say_nothing_or_half_keep_nobody_out(server: Process) -> None:
    silent = [server.connect() for _ in range(200)]
    for half in silent[:20]:
        half.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Le")
    for slow in silent[20:40]:
        slow.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 50\r\n\r\n{")
    assert server.get("/health")[0] == 200
    silent[50].sendall(b"\x16\x03\x01 no HTTP\r\n\r\n")
    assert silent[50].recv(100).startswith(b"HTTP/1.1 400")
    for connection in silent:
        connection.close()
    assert (
        server.get("/v1/chat/completions", "POST", {"model": "demo", "messages": QUESTION, "max_tokens": 1})[0] == 200
    )


def test_a_body_in_chunks_is_read(server: Process) -> None:
    body = json.dumps({"model": "demo", "messages": QUESTION, "max_tokens": 1}).encode()
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.request("POST", "/v1/chat/completions", iter([body[:10], body[10:]]), encode_chunked=True)
    assert connection.getresponse().status == 200
    connection.close()


def test_a_client_that_hangs_up_frees_its_row(server: Process) -> None:
    def metric(name: str) -> float:
        lines = server.get("/metrics")[1].decode().splitlines()
        return float(next(line for line in lines if line.startswith(f"{name} ")).split()[1])

    before = metric("mlxqwen_aborted_replies_total")
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.request("POST", "/v1/chat/completions", json.dumps({**ENDLESS, "n": 8}))
    response = connection.getresponse()
    response.read(20)
    response.close()
    connection.close()
    until = time.monotonic() + 30
    while metric("mlxqwen_running_replies") and time.monotonic() < until:
        time.sleep(0.01)
    assert metric("mlxqwen_running_replies") == 0
    assert metric("mlxqwen_aborted_replies_total") == before + 8


def test_a_second_server_on_the_port_is_refused(server: Process) -> None:
    result = run("serve", "--port", str(server.port))
    assert result.status == 1
    assert result.err.startswith(f"error: 127.0.0.1:{server.port}: cannot listen there: Address already in use")


def test_ctrl_c_lets_replies_end_and_keys_are_not_logged() -> None:
    with process("--drain", "60", *WINDOW, MLXQWEN_API_KEY="sesame") as server:
        assert server.get("/v1/models")[0] == 401
        body = json.dumps({**ENDLESS, "max_tokens": 600})
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        connection.request("POST", "/v1/chat/completions", body, {"authorization": "Bearer sesame"})
        response = connection.getresponse()
        first = response.read(10)
        ended: list[tuple[int, str]] = []
        thread = threading.Thread(target=lambda: ended.append(server.end(signal.SIGINT)))
        thread.start()
        events = events_of(first + response.read())
        thread.join()
        connection.close()
        assert events[-1]["choices"][0]["finish_reason"] == "length"
        status, log = ended[0]
        assert status == 130
        assert "sesame" not in log + server.curl
        assert '"Authorization: Bearer $MLXQWEN_API_KEY"' in server.curl
        assert "ending: 1 reply may go on for 60 s; Ctrl-C again ends them now" in log
        assert "strawberry" not in log
        assert "POST '/v1/chat/completions' 200" in log


def test_a_key_given_as_an_option_has_a_place_in_the_example() -> None:
    with process("--api-key", "sesame") as server:
        assert '"Authorization: Bearer YOUR_API_KEY"' in server.curl
        command = server.curl.replace("YOUR_API_KEY", "sesame")
        done = subprocess.run(shlex.split(command), capture_output=True, text=True, timeout=60, check=True)
        assert json.loads(done.stdout)["object"] == "chat.completion"
        log = server.end()[1]
        assert "ending:" not in log


def request(body: object, *, streams: bool = True) -> bytes:
    """A chat completion as it goes over the wire."""
    data = json.dumps(body if streams else {**ENDLESS, "stream": False}).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: %d\r\nConnection: close\r\n\r\n"
    return head % len(data) + data


def read_all(connection: socket.socket) -> bytes:
    """All that comes until the connection ends."""
    pieces = []
    with connection, suppress(ConnectionResetError):
        while piece := connection.recv(65_536):
            pieces.append(piece)
    return b"".join(pieces)


@pytest.mark.slow
def test_it_ends_under_load() -> None:
    """Streams that run and wait, whole replies, halves of requests, idle connections: all are told, or hung up on."""
    with process("--drain", "0.2", "--max-running", "4", "--log-content", *WINDOW) as server:
        opened = {kind: [server.connect() for _ in range(8)] for kind in ("stream", "whole", "body", "head", "idle")}
        for connection in opened["stream"]:
            connection.sendall(request(ENDLESS))
        for connection in opened["whole"]:
            connection.sendall(request(ENDLESS, streams=False))
        for connection in opened["body"]:
            connection.sendall(request(ENDLESS)[:-5])
        for connection in opened["head"]:
            connection.sendall(request(ENDLESS)[:40])
        begun = [connection.recv(1) for connection in opened["stream"]]  # of those that wait, too
        while f"mlxqwen_waiting_replies {16 - 4}.0".encode() not in server.get("/metrics")[1]:
            time.sleep(0.01)
        server.process.send_signal(signal.SIGTERM)
        ends = {kind: [read_all(one) for one in connections] for kind, connections in opened.items()}
        for first, rest in zip(begun, ends["stream"], strict=True):
            assert (first + rest).startswith(b"HTTP/1.1 200")
            assert b'"code":"server_shutdown"' in rest
            assert b"data: [DONE]" in rest
        for told in (*ends["whole"], *ends["body"]):
            assert told.startswith(b"HTTP/1.1 503")
            assert b"server_shutdown" in told
        assert not any((*ends["head"], *ends["idle"]))
        status, log = server.end()
        assert status == 0
        assert "Traceback" not in log
        assert "strawberry" in log


def test_it_ends_while_a_model_is_loaded(several: tuple[Process, socket.socket]) -> None:
    server, hub = several
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.request("POST", "/v1/chat/completions", json.dumps({"model": "org/model", "messages": QUESTION}))
    asked, _ = hub.accept()
    states = {one["id"]: one["state"] for one in json.loads(server.get("/v1/models")[1])["data"]}
    assert states["org/model"] == "loading"
    server.process.send_signal(signal.SIGTERM)
    response = connection.getresponse()
    assert (response.status, json.loads(response.read())["error"]["code"]) == (503, "server_shutdown")
    connection.close()
    while (
        server.process.poll() is None
    ):  # whenever a second signal comes, until nothing is left that could be waited for
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.02)
    status, log = server.end()
    asked.close()
    assert status == 0
    assert "Traceback" not in log


def test_options_that_cannot_be() -> None:
    assert "--host: found 0.0.0.0 without a key" in run("serve", "--host", "0.0.0.0").err
    assert "--max-queue: found -1" in run("serve", "--max-queue", "-1").err
    too_long = run("serve", "--max-model-len", "100000", "--port", "0")
    assert "--max-model-len: found 100,000, but the model's context is" in too_long.err
    assert too_long.status == 1


def test_a_limit_that_no_chat_prompt_fits_is_refused() -> None:
    tokenizer = Tokenizer.from_folder(DEMO_FOLDER)
    shortest = len(tokenizer.apply_chat_template([{"role": "user", "content": "a"}], add_generation_prompt=True))
    told = f"--max-model-len: found {shortest}, but the shortest chat prompt of the model takes {shortest} tokens"
    for names in ([], ["-m", f"a={DEMO_FOLDER}", "-m", f"b={DEMO_FOLDER}"]):
        result = run("serve", "--port", "0", *names, "--max-model-len", str(shortest))
        assert result.status == 1
        assert told in result.err
    ServerSettings(max_model_len=shortest + 1).check_holds_prompts(tokenizer)
    tokenizer.chat_templates.clear()  # texts may be shorter
    ServerSettings(max_model_len=1).check_holds_prompts(tokenizer)


def test_a_model_that_cannot_be_loaded_is_told_in_two_lines(tmp_path: Path) -> None:
    """Though the libraries of HTTP are still being imported then."""
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(DEMO_FOLDER / name)
    command = [sys.executable, "-m", "mlxqwen", "serve", str(tmp_path), "--port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {tmp_path}/tokenizer.json: no such file")
    assert len(done.stderr.splitlines()) == 2


@pytest.mark.slow
def test_one_that_was_killed_knows_its_prompts_again(tmp_path: Path) -> None:
    body = {"model": "demo", "messages": QUESTION, "seed": 5}
    said = []
    for round_ in range(2):
        with process("--prompt-cache", str(tmp_path / "cache")) as server:
            reply = json.loads(server.get("/v1/chat/completions", "POST", body)[1])
            said.append(reply["choices"][0]["message"]["content"])
            cached = reply["usage"]["prompt_tokens_details"]["cached_tokens"]
            assert cached >= 16 if round_ else cached == 0
            until = time.monotonic() + 30
            while not any((tmp_path / "cache").glob("*.kv*")) and time.monotonic() < until:
                time.sleep(0.01)
            server.process.kill()
    assert said[0] == said[1]
