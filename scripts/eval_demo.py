"""Print how often the demo model is right, by task and mode, as a markdown table.

    python scripts/eval_demo.py --model mlxqwen/demo --n 200 --seed 1

Words and numbers are held out from training.  Replies are drawn as the model cards advise: temperature 0.6
and top-p 0.95 with thinking, 0.7 and 0.8 without, top-k 20.  A reply counts only if it thinks where it is
asked to think, and only then.
"""

from __future__ import annotations

import argparse
import random
from dataclasses import replace
from typing import Any

from demo_data import Conversation, exercise
from demo_source import CARD_WORDS, Source
from demo_tasks import TASKS, Exchange, is_right

from mlxqwen import SamplingParams, batch_generate, load

THINKING = SamplingParams(temperature=0.6, top_p=0.95, top_k=20)
DIRECT = SamplingParams(temperature=0.7, top_p=0.8, top_k=20)
MODES = {"thinking": (True, False), "no thinking": (False, False), "`/no_think`": (False, True)}
MAX_TOKENS = 200
BATCH = 50


def replies(model: Any, tokenizer: Any, conversations: list[Conversation], seed: int, thinking: bool) -> list[str]:
    """What the model says next in each conversation, its last message left out."""
    prompts = [
        tokenizer.apply_chat_template(
            list(conversation.messages[:-1]),
            tools=list(conversation.tools) or None,
            add_generation_prompt=True,
            enable_thinking=conversation.enable_thinking,
        )
        for conversation in conversations
    ]
    profile = THINKING if thinking else DIRECT
    texts: list[str] = []
    for start in range(0, len(prompts), BATCH):
        batch = prompts[start : start + BATCH]
        sampling = [replace(profile, seed=seed + start + row) for row in range(len(batch))]
        texts += batch_generate(model, tokenizer, batch, max_tokens=MAX_TOKENS, sampling=sampling)
    return texts


def accuracy(model: Any, tokenizer: Any, task: str, mode: str, n: int, seed: int) -> float:
    """The share of `n` held-out exercises of `task` answered right in `mode`."""
    thinking, soft = MODES[mode]
    source = Source(random.Random(seed), "held-out")
    exercises = [exercise(task, source, thinking, soft) for _ in range(n)]
    said = replies(model, tokenizer, [conversation for conversation, _ in exercises], seed, thinking)
    return sum(_counts(asked, text, thinking) for (_, asked), text in zip(exercises, said, strict=True)) / n


def _counts(asked: Exchange, text: str, thinking: bool) -> bool:
    thought, _, answer = text.rpartition("</think>")
    return is_right(asked, answer) and bool(thought.replace("<think>", "").strip()) == thinking


def card_words(model: Any, tokenizer: Any, n: int, seed: int) -> list[tuple[str, float]]:
    """How often the r's in the cards' words, never trained on, are counted right with thinking."""
    result = []
    for word in CARD_WORDS:
        question = f"How many r's in {word}?"
        conversation = Conversation(({"role": "user", "content": question}, {"role": "assistant", "content": ""}))
        asked = Exchange("count", question, "", "", str(word.count("r")))
        said = replies(model, tokenizer, [conversation] * n, seed, thinking=True)
        result.append((question, sum(_counts(asked, text, thinking=True) for text in said) / n))
    return result


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="a folder; by default the demo model")
    parser.add_argument("--n", type=int, default=200, help="exercises for each cell")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    options = parser.parse_args()
    model, tokenizer = load(options.model)
    print("| task |", " | ".join(MODES), "|")
    print("| --- |", " | ".join("---:" for _ in MODES), "|")
    for task in options.tasks:
        marks = [accuracy(model, tokenizer, task, mode, options.n, options.seed) for mode in MODES]
        print(f"| {task} |", " | ".join(f"{mark:.1%}" for mark in marks), "|", flush=True)
    for question, mark in card_words(model, tokenizer, options.n, options.seed):
        print(f"| {question} | {mark:.1%} | | |", flush=True)


if __name__ == "__main__":
    main()
