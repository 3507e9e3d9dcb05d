"""What Qwen3's launch article shows of its servers: curl lines and OpenAI's client, in both modes."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from openai import OpenAI

MESSAGES = [{"role": "user", "content": "Give me a short introduction to large language models."}]
THINKING: dict[str, Any] = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "max_tokens": 32768}
NOT_THINKING: dict[str, Any] = {
    "temperature": 0.7,
    "top_p": 0.8,
    "top_k": 20,
    "max_tokens": 8192,
    "presence_penalty": 1.5,
    "chat_template_kwargs": {"enable_thinking": False},
}


def curl(url: str, body: dict[str, Any]) -> Any:
    """The first choice's message, asked for as the article's lines do."""
    command = ["curl", "-sS", f"{url}/chat/completions", "-H", "Content-Type: application/json", "-d", json.dumps(body)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    return json.loads(done.stdout)["choices"][0]["message"]


def main() -> None:
    url, model = sys.argv[1:]
    body = {"model": model, "messages": MESSAGES}
    thinking, plain = curl(url, {**body, **THINKING}), curl(url, {**body, **NOT_THINKING})
    assert thinking["reasoning_content"], thinking
    assert plain["content"], plain
    assert not plain.get("reasoning_content"), plain
    print("curl", flush=True)
    client = OpenAI(api_key="EMPTY", base_url=url)
    for switch in (True, False):
        reply = client.chat.completions.create(
            model=model,
            messages=MESSAGES,
            temperature=0.7,
            top_p=0.8,
            presence_penalty=1.5,
            extra_body={"top_k": 20, "chat_template_kwargs": {"enable_thinking": switch}},
        )
        assert bool(reply.choices[0].message.reasoning_content) is switch, reply
    reply = client.chat.completions.create(
        model=model, messages=MESSAGES, temperature=0.6, top_p=0.95, max_tokens=32768, extra_body={"top_k": 20}
    )
    assert reply.choices[0].message.reasoning_content, reply
    print("openai", flush=True)
    try:  # the article hands it over so; the client itself has no such argument
        client.chat.completions.create(model=model, messages=MESSAGES, top_k=20)
    except TypeError:
        print("top_k has to stand in extra_body", flush=True)


main()
