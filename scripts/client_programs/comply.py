"""llm-comply's tests of three formats: all of text have to pass without warnings, and images to be refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

COMMAND = str(Path(sys.executable).with_name("llm-comply"))


def run(url: str, model: str, form: str, *options: str) -> list[dict[str, Any]]:
    """The results of the tests of one format."""
    command = [COMMAND, "-u", url, "-k", "EMPTY", "-m", model, "--format", form, "--json", "--timeout", "120", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    results: list[dict[str, Any]] = json.loads(done.stdout)["results"]
    return results


def main() -> None:
    url, model = sys.argv[1:]
    for form in ("openai-chat", "open-responses", "anthropic"):
        if ("claude" in model) != (form == "anthropic"):
            continue
        results = run(url, model, form)
        for result in results:
            is_image = "image" in result["id"]
            for _ in range(5):  # the demo may write on in a call that it is made to make: it is asked for again
                if is_image or result["status"] == "passed":
                    break
                (result,) = run(url, model, form, "-f", result["id"])
            assert result["status"] == ("failed" if is_image else "passed"), result
            assert not result.get("warnings"), result
            if is_image:
                assert any("HTTP 400" in error for error in result["errors"]), result
        print(f"{form} {len(results) - 1}, and images refused", flush=True)


main()
