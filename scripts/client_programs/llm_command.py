"""The command `llm`, which is told of the server in extra-openai-models.yaml: plain, streamed, a tool, a schema."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

LLM = str(Path(sys.executable).with_name("llm"))
CALCULATOR = '''
def calculator(expression: str) -> str:
    """Evaluate an arithmetic expression."""
    assert expression == "1234 * 567", expression
    return "699678"
'''
SCHEMA = {
    "type": "object",
    "properties": {"letter": {"type": "string", "maxLength": 1}, "count": {"type": "integer", "maximum": 99}},
    "required": ["letter", "count"],
}


def main() -> None:
    url, model = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        fields = {"model_id": "local", "model_name": model, "api_base": url, "api_key_name": "local"}
        described = json.dumps([{**fields, "supports_tools": True, "supports_schema": True}])  # YAML, too
        Path(folder, "extra-openai-models.yaml").write_text(described, encoding="utf-8")
        Path(folder, "keys.json").write_text('{"local": "EMPTY"}', encoding="utf-8")

        def llm(*options: str) -> str:
            command = [LLM, *options]
            done = subprocess.run(
                command,
                env={**os.environ, "LLM_USER_PATH": folder},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 0, done.stderr
            return done.stdout

        assert "local" in llm("models")
        asked = ("-m", "local", "-o", "temperature", "0")
        question = "How many r's in strawberry?"
        assert "3 r's" in llm("prompt", *asked, "--no-stream", question)
        print("chat", flush=True)
        assert "3 r's" in llm("prompt", *asked, question)
        assert llm("prompt", "-c", "Hello").strip()
        print("stream", flush=True)
        assert "699678" in llm("prompt", *asked, "--functions", CALCULATOR, "What is 1234 * 567?")
        print("tools", flush=True)
        assert set(json.loads(llm("prompt", *asked, "--schema", json.dumps(SCHEMA), question))) == {"letter", "count"}
        print("structured", flush=True)


main()
