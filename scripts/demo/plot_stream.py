"""Plot the demo model's loss over a stream far longer than its context, in a ring with and without sinks.

    python scripts/demo plot_stream [--out docs/stream_loss.png]

Needs the `plot` extra. The test of the same property uses `stream_losses` from here.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import mlx.core as mx

from demo.data import stream
from mlxqwen import load, make_cache
from mlxqwen.cache import KVCache
from mlxqwen.model.qwen3 import Qwen3ForCausalLM
from mlxqwen.text.tokenizer import Tokenizer

CONTEXTS = 20
SEED = 97


def stream_tokens(tokenizer: Tokenizer, count: int, seed: int = SEED) -> list[int]:
    """The first `count` tokens of an endless stream of conversations about words and numbers kept from training."""
    tokens: list[int] = []
    for text in stream(seed, split="held-out"):
        tokens += tokenizer.encode(text)
        if len(tokens) >= count:
            return tokens[:count]
    raise AssertionError("the stream has no end")


def losses(model: Qwen3ForCausalLM, tokens: list[int], cache: KVCache, chunk: int = 256) -> mx.array:
    """Negative log-likelihood, in nats, of each token but the first given those before it that `cache` holds."""
    parts = []
    for start in range(0, len(tokens) - 1, chunk):
        piece = mx.array(tokens[start : start + chunk + 1])
        logits = model(piece[None, :-1], cache)[0]
        chosen = mx.take_along_axis(logits, piece[1:, None], axis=-1)[:, 0]
        parts.append(mx.logsumexp(logits, axis=-1) - chosen)
        mx.eval(parts[-1], cache.state)
    return mx.concatenate(parts)


def stream_losses(model: Qwen3ForCausalLM, tokens: list[int], keep: int) -> mx.array:
    """Losses of the whole stream through a ring as large as the model's context."""
    return losses(model, tokens, make_cache(model, max_kv_size=model.config.context_length, keep=keep))


def context_losses(model: Qwen3ForCausalLM, tokens: list[int]) -> mx.array:
    """Losses of the same tokens cut into contexts that each start afresh and see all of what they hold."""
    size = model.config.context_length
    pieces = [tokens[start : start + size] for start in range(0, len(tokens) - 1, size)]
    return mx.concatenate([losses(model, piece, make_cache(model)) for piece in pieces if len(piece) > 1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/stream_loss.png"))
    arguments = parser.parse_args()
    import matplotlib.pyplot as plt

    model, tokenizer = load()
    size = model.config.context_length
    tokens = stream_tokens(tokenizer, CONTEXTS * size + 1)
    fresh = context_losses(model, tokens)
    curves = {
        "fresh contexts": fresh,
        "ring, 4 sinks": stream_losses(model, tokens, keep=4),
        "ring, no sinks": stream_losses(model, tokens, keep=0),
        "no window": losses(model, tokens, make_cache(model)),
    }
    figure, axes = plt.subplots(figsize=(8, 4))
    for (name, curve), style in zip(curves.items(), ("o-", "s-", "x--", "-"), strict=True):
        mean, reference = curve.mean().item(), fresh.mean().item()
        print(f"{name}: mean loss {mean:.4f}, {mean / reference:.3f} of fresh contexts")
        width = curve.size // CONTEXTS
        means = curve[: width * CONTEXTS].reshape(CONTEXTS, width).mean(axis=1).tolist()
        axes.plot(range(1, CONTEXTS + 1), means, style, markersize=4, label=name)
    axes.set(
        xlabel=f"position in the stream, in contexts of {size} tokens",
        ylabel="mean loss, nats a token",
        yscale="log",
        xticks=range(1, CONTEXTS + 1),
    )
    axes.legend()
    figure.tight_layout()
    figure.savefig(arguments.out, dpi=120)
