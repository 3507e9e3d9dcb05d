"""llm-comply's tests of three formats: all of text have to pass without warnings, and images to be refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

COMMAND = str(Path(sys.executable).with_name("llm-comply"))


def main() -> None:
    url, model = sys.argv[1:]
    for form in ("openai-chat", "open-responses", "anthropic"):
        if ("claude" in model) != (form == "anthropic"):
            continue
        command = [COMMAND, "-u", url, "-k", "EMPTY", "-m", model, "--format", form, "--json", "--timeout", "120", "-v"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        report = json.loads(done.stdout)
        for result in report["results"]:
            is_image = "image" in result["id"]
            expected = "failed" if is_image else "passed"
            assert result["status"] == expected, result
            assert not result.get("warnings"), result
            if is_image:
                assert any("HTTP 400" in error for error in result["errors"]), result
        print(f"{form} {len(report['results']) - 1} and images refused", flush=True)


main()
