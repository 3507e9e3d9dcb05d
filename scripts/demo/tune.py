"""Teach the demo model more, a course at a time: tools and cut thoughts, greetings, no calls of tools that are missing.

    python scripts/demo train --out FIRST --seed 0 --steps 2000
    python scripts/demo tune --model FIRST --out SECOND --course tools --seed 1 --steps 500
    python scripts/demo tune --model SECOND --out THIRD --course greetings --seed 2 --steps 600
    python scripts/demo tune --model THIRD --out FOURTH --course "missing tools" --seed 3 --steps 140
    python scripts/demo tune --model FOURTH --out FIFTH --course "short questions" --seed 4 --steps 160

Needs the `train` extra. A third or more of the conversations are those of `data.py`, so that what was learnt is kept.
The tokenizer and all other files stay as they are. The same seed, steps and versions give the same model on the same
kind of machine; with `--minutes` there are as many steps as fit, and their number is printed.
"""

from __future__ import annotations

import argparse
import random
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers import Qwen3ForCausalLM

from demo import data
from demo.budget_tasks import cut_thought, ends_in_thought, thought_length
from demo.greetings import greeting_kind, short_conversation, small_talk_conversation
from demo.source import Source
from demo.tool_tasks import tool_conversation
from demo.train import CONTEXT, encode, make_optimizers, published_weights, word_pieces
from mlxqwen.text.tokenizer import Tokenizer as BudgetTokenizer


@dataclass(frozen=True)
class Course:
    """What is taught: the shares of the kinds of conversations, at what part of the first training's rates, and in how
    many rows of 512 tokens at a step."""

    shares: dict[str, float]
    share_of_rate: float
    rows: int


COURSES = {
    "tools": Course({"first training": 0.45, "tools": 0.30, "thoughts cut short": 0.25}, 0.25, 16),
    "greetings": Course(
        {"first training": 0.40, "tools": 0.13, "thoughts cut short": 0.12, "greetings": 0.35}, 0.20, 8
    ),
    "missing tools": Course(
        {"first training": 0.30, "tools": 0.15, "thoughts cut short": 0.05, "greetings": 0.25, "missing tools": 0.25},
        0.12,
        8,
    ),
    "short questions": Course(
        {
            "first training": 0.30,
            "tools": 0.12,
            "thoughts cut short": 0.05,
            "greetings": 0.05,
            "missing tools": 0.10,
            "short greetings": 0.20,
            "calculator": 0.18,
        },
        0.12,
        8,
    ),
}
TOOLS_IN_CUT = 0.15  # of the thoughts cut short
WARMUP = 20
SAVED_EVERY = 100


def sample(
    source: Source, tokenizer: Tokenizer, budget_tokenizer: BudgetTokenizer, shares: dict[str, float]
) -> tuple[list[int], list[float]]:
    """Token ids and weights in the loss of one random conversation."""
    kind = source.random.choices(tuple(shares), tuple(shares.values()))[0]
    if kind == "first training":
        return encode(data.conversation(source), tokenizer)
    if kind == "tools":
        return encode(tool_conversation(source), tokenizer)
    if kind == "greetings":
        return encode(small_talk_conversation(source), tokenizer)
    if kind == "missing tools":
        return encode(short_conversation(source, "a missing tool"), tokenizer)
    if kind == "short greetings":
        return encode(short_conversation(source, greeting_kind(source)), tokenizer)
    if kind == "calculator":
        thinking, soft = source.random.random() < 0.5, source.random.random() < 0.5
        return encode(data.exercise("calculator", source, thinking, soft)[0], tokenizer)
    while True:
        with_tools = source.random.random() < TOOLS_IN_CUT
        conversation = tool_conversation(source) if with_tools else data.conversation(source)
        if ends_in_thought(conversation):
            break
    ids, weights = encode(conversation, tokenizer)
    budget = source.random.randrange(thought_length(ids, budget_tokenizer))
    return cut_thought(ids, weights, budget_tokenizer, budget)


def batches(
    tokenizer: Tokenizer, budget_tokenizer: BudgetTokenizer, course: Course, seed: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless rows that each start with a conversation: ids and weights, both [rows, CONTEXT + 1]."""
    source = Source(random.Random(seed), pieces=word_pieces(tokenizer))
    while True:
        rows, row_weights = [], []
        for _ in range(course.rows):
            ids: list[int] = []
            weights: list[float] = []
            while len(ids) <= CONTEXT:
                more_ids, more_weights = sample(source, tokenizer, budget_tokenizer, course.shares)
                ids += more_ids
                weights += more_weights
            rows.append(ids[: CONTEXT + 1])
            row_weights.append(weights[: CONTEXT + 1])
        yield torch.tensor(rows), torch.tensor(row_weights)


def rate(step: int, steps: int) -> float:
    """The part of a course's rate at `step`: a warm-up, whatever `steps`, then down to zero."""
    if step < WARMUP:
        return (step + 1) / WARMUP
    return (steps - step) / (steps - WARMUP)


def steps_that_fit(steps: int, seconds: float, limit_minutes: float | None) -> int:
    """At most `steps`, fewer if the warm-up's `seconds` tell that they would take longer than the limit."""
    if limit_minutes is None:
        return steps
    return max(WARMUP + 1, min(steps, int(limit_minutes * 60 / (seconds / WARMUP))))


def main() -> None:
    """Train and save, from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("mlxqwen/demo"), help="the folder to start from")
    parser.add_argument("--out", type=Path, required=True, help="folder to write the checkpoint to")
    parser.add_argument("--course", choices=tuple(COURSES), default="greetings", help="what to teach")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=500, help="training steps")
    parser.add_argument("--minutes", type=float, help="take fewer steps if all would last longer than this")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    course = COURSES[options.course]
    torch.manual_seed(options.seed)
    torch.set_num_threads(options.threads)
    tokenizer = Tokenizer.from_file(str(options.model / "tokenizer.json"))
    budget_tokenizer = BudgetTokenizer.from_folder(options.model)
    model = Qwen3ForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    optimizers = make_optimizers(model)
    rates = [course.share_of_rate * optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    if options.out.resolve() != options.model.resolve():
        shutil.copytree(options.model, options.out, dirs_exist_ok=True)
    started = time.monotonic()
    recent: list[float] = []
    steps = options.steps
    rows = batches(tokenizer, budget_tokenizer, course, options.seed)
    step = 0
    while step < steps:
        if step == WARMUP:
            steps = steps_that_fit(steps, time.monotonic() - started, options.minutes)
        ids, weights = next(rows)
        for optimizer, base in zip(optimizers, rates, strict=True):
            optimizer.param_groups[0]["lr"] = base * rate(step, steps)
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        wanted = weights[:, 1:].flatten()
        loss = (losses * wanted).sum() / wanted.sum()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        recent = [*recent[-19:], loss.item()]
        step += 1
        if step % 20 == 0 or step == steps:
            minutes = (time.monotonic() - started) / 60
            mean = sum(recent) / len(recent)
            print(f"step {step}/{steps} loss {mean:.4f} {minutes:.1f} min", flush=True)
        if step % SAVED_EVERY == 0 or step == steps:
            save_weights(model, options.out)


def save_weights(model: Qwen3ForCausalLM, out: Path) -> None:
    """Write the weights into the folder `out`, readable by all."""
    weights = out / "model.safetensors"
    save_file(published_weights(model), str(weights), metadata={"format": "pt"})
    weights.chmod(0o644)
