"""The loop of Qwen's model cards: three turns, one of them with /no_think, one with /think."""

from __future__ import annotations

from typing import Any

import pytest

from mlxqwen import Engine, parse_reply


class Chatbot:
    """As the cards have it for mlx_lm, with the import changed: text in, text out, all of it into the history."""

    def __init__(self, name: str | None = None) -> None:
        from mlxqwen import generate, load

        self.generate = generate
        self.model, self.tokenizer = load(name)
        self.history: list[dict[str, str]] = []

    def respond(self, said: str) -> str:
        messages = [*self.history, {"role": "user", "content": said}]
        prompt: Any = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        response = self.generate(self.model, self.tokenizer, prompt=prompt, verbose=True, max_tokens=32768)
        self.history.append({"role": "user", "content": said})
        self.history.append({"role": "assistant", "content": response})
        return response


def test_the_loop_of_the_cards(capsys: pytest.CaptureFixture[str]) -> None:
    bot = Chatbot()
    asked = (
        "How many 'r's are in strawberries?",
        "Then, how many 'r's are in blueberries? /no_think",
        "Really? /think",
    )
    responses = [bot.respond(said) for said in asked]
    assert [message["content"] for message in bot.history] == [
        text for pair in zip(asked, responses, strict=True) for text in pair
    ]
    out = capsys.readouterr().out
    thoughts = []
    for response in responses:
        assert response in out
        assert "<|im_" not in response
        reply = parse_reply(response)
        assert reply.content
        thoughts.append(bool(reply.reasoning))
    assert thoughts == [True, False, True]

    # What the model saw last has none of the thoughts, although they are in the history.
    engine = Engine(bot.model, bot.tokenizer)
    seen = engine.tokenizer.decode(engine.prompt([*bot.history, {"role": "user", "content": "Thanks."}]))
    assert "<think>" not in seen
    for response in responses:
        assert parse_reply(response).content in seen
