"""The loop of Qwen's model cards, as their readers type it for mlx_lm: it runs with nothing but the import changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mlxqwen import Engine, parse_reply
from mlxqwen.files.hub import DEMO_FOLDER

NAME = "Qwen/Qwen3-1.7B-MLX-8bit"
ASKED = ("How many r's are in strawberry?", "And how many in blueberry? /no_think", "Are you sure? /think")
PROGRAM = f'''
from mlx_lm import load, generate


class QwenChatbot:
    def __init__(self, model_name="{NAME}"):
        self.model, self.tokenizer = load(model_name)
        self.history = []

    def generate_response(self, user_input):
        messages = self.history + [{{"role": "user", "content": user_input}}]

        text = self.tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=True
        )

        response = generate(
            self.model,
            self.tokenizer,
            prompt=text,
            verbose=True,
            max_tokens=32768
        )
        self.history.append({{"role": "user", "content": user_input}})
        self.history.append({{"role": "assistant", "content": response}})

        return response


if __name__ == "__main__":
    chatbot = QwenChatbot()

    user_input_1 = "{ASKED[0]}"
    print(f"User: {{user_input_1}}")
    response_1 = chatbot.generate_response(user_input_1)
    print(f"Bot: {{response_1}}")

    user_input_2 = "{ASKED[1]}"
    print(f"User: {{user_input_2}}")
    response_2 = chatbot.generate_response(user_input_2)
    print(f"Bot: {{response_2}}")

    user_input_3 = "{ASKED[2]}"
    print(f"User: {{user_input_3}}")
    response_3 = chatbot.generate_response(user_input_3)
    print(f"Bot: {{response_3}}")
'''


def test_the_loop_of_the_cards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert PROGRAM.count("mlx_lm") == 1
    (tmp_path / NAME).parent.mkdir()
    (tmp_path / NAME).symlink_to(DEMO_FOLDER)  # a folder goes before the hub's model of that name
    monkeypatch.chdir(tmp_path)
    program: dict[str, Any] = {"__name__": "__main__"}
    exec(PROGRAM.replace("from mlx_lm import", "from mlxqwen import"), program)

    bot = program["chatbot"]
    responses = [program[f"response_{turn}"] for turn in (1, 2, 3)]
    said = [text for pair in zip(ASKED, responses, strict=True) for text in pair]
    assert [message["content"] for message in bot.history] == said
    out = capsys.readouterr().out
    for response in responses:
        assert out.count(response) >= 2  # as it came, and printed by the program
        assert f"Bot: {response}" in out
        assert "<|im_" not in response
    replies = list(map(parse_reply, responses))
    assert all(reply.content for reply in replies)
    assert [bool(reply.reasoning) for reply in replies] == [True, False, True]

    # What the model saw last has none of the thoughts, although they are in the history.
    engine = Engine(bot.model, bot.tokenizer)
    seen = engine.tokenizer.decode(engine.prompt([*bot.history, {"role": "user", "content": "Thanks."}]))
    assert "<think>" not in seen
    assert all(reply.content in seen for reply in replies)
