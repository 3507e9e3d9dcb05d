"""`mlxqwen serve` as a process of its own."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Process:
    """A server on a free port."""

    def __init__(self, *options: str, **environment: str) -> None:
        command = [sys.executable, "-m", "mlxqwen", "serve", "--port", "0", *options]
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment},
        )
        assert self.process.stdout is not None
        first, self.curl = self.process.stdout.readline(), self.process.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:(\d+)/v1", first)
        assert found is not None, self.process.communicate()
        self.port = int(found[1])
        self.url = f"http://127.0.0.1:{self.port}/v1"

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=60)

    def get(self, path: str, method: str = "GET", body: object = None) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request(method, path, None if body is None else json.dumps(body))
        response = connection.getresponse()
        status, text = response.status, response.read()
        connection.close()
        return status, text

    def end(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        """Exit status and log."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        _, log = self.process.communicate(timeout=60)
        return self.process.returncode, log


@contextmanager
def process(*options: str, **environment: str) -> Iterator[Process]:
    made = Process(*options, **environment)
    try:
        yield made
    finally:
        made.process.kill()
        made.process.communicate()
