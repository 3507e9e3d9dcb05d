"""Teach the demo model more: continue its training on conversations with a calculator and a clock.

    python scripts/tune_demo.py --model mlxqwen/demo --out /tmp/tuned --steps 400

Needs the `train` extra. Half of the conversations are those of `demo_data.py`, so that what was learnt is kept. The
tokenizer and all other files stay as they are.
"""

from __future__ import annotations

import argparse
import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from demo_source import Source
from demo_tool_tasks import conversation
from safetensors.torch import save_file
from tokenizers import Tokenizer
from train_demo import ADAM_RATE, CONTEXT, MUON_RATE, ROWS_BY_LENGTH, Muon, encode, published_weights, word_pieces
from transformers import Qwen3ForCausalLM

WARMUP = 20
SHARE_OF_RATE = 0.25  # of the rates of the first training, at most


def batches(tokenizer: Tokenizer, seed: int, steps: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Rows that each start with a conversation: ids and weights, both [rows, CONTEXT + 1]."""
    source = Source(random.Random(seed), pieces=word_pieces(tokenizer))
    for _ in range(steps):
        rows, row_weights = [], []
        for _ in range(ROWS_BY_LENGTH[CONTEXT]):
            ids: list[int] = []
            weights: list[float] = []
            while len(ids) <= CONTEXT:
                more_ids, more_weights = encode(conversation(source), tokenizer)
                ids += more_ids
                weights += more_weights
            rows.append(ids[: CONTEXT + 1])
            row_weights.append(weights[: CONTEXT + 1])
        yield torch.tensor(rows), torch.tensor(row_weights)


def rate(step: int, steps: int) -> float:
    """The learning rate's factor: a warm-up, then down to zero."""
    return SHARE_OF_RATE * min((step + 1) / WARMUP, (steps - step) / steps)


def main() -> None:
    """Train and save, from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("mlxqwen/demo"), help="the folder to start from")
    parser.add_argument("--out", type=Path, required=True, help="folder to write the checkpoint to")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=400, help="training steps of 8,192 tokens")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    torch.set_num_threads(options.threads)
    tokenizer = Tokenizer.from_file(str(options.model / "tokenizer.json"))
    model = Qwen3ForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    named = list(model.named_parameters())
    matrices = [weight for name, weight in named if weight.ndim > 1 and "embed" not in name]
    others = [weight for name, weight in named if weight.ndim == 1 or "embed" in name]
    optimizers = [
        Muon(matrices, MUON_RATE),
        torch.optim.AdamW(others, ADAM_RATE, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    started = time.monotonic()
    recent: list[float] = []
    for step, (ids, weights) in enumerate(batches(tokenizer, options.seed, options.steps)):
        for optimizer, base in zip(optimizers, rates, strict=True):
            optimizer.param_groups[0]["lr"] = base * rate(step, options.steps)
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        wanted = weights[:, 1:].flatten()
        loss = (losses * wanted).sum() / wanted.sum()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        recent = [*recent[-19:], loss.item()]
        if (step + 1) % 20 == 0 or step + 1 == options.steps:
            minutes = (time.monotonic() - started) / 60
            mean = sum(recent) / len(recent)
            print(f"step {step + 1}/{options.steps} loss {mean:.4f} {minutes:.1f} min", flush=True)
    if options.out.resolve() != options.model.resolve():
        shutil.copytree(options.model, options.out, dirs_exist_ok=True)
    save_file(published_weights(model), str(options.out / "model.safetensors"), metadata={"format": "pt"})


if __name__ == "__main__":
    main()
