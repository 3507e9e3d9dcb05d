"""Train the demo model: tokenizer, weights and the files around them, from a seed.

    python scripts/demo train --out mlxqwen/demo --seed 0
    python scripts/demo train --out tests/data/moe_demo --seed 0 --moe --steps 500

Needs the `train` extra.  The same seed, steps and versions give the same model on the same kind of machine.
Matrices are trained with Muon (momentum, then the nearest orthogonal matrix by a Newton-Schulz iteration;
Keller Jordan, 2024), embeddings and norms with AdamW.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from demo.data import ADDED_TOKENS, Conversation, conversation, exercise, spans, tokenizer_text
from demo.source import Source
from demo.tasks import is_right

CONTEXT = 512
VOCABULARY = 768
ROWS_BY_LENGTH = {256: 32, CONTEXT: 16}
LONG_FROM = 0.7  # the last steps are trained at the full context
SPAN_WEIGHTS = {"context": 0.1, "history": 0.1, "given": 0.0, "reply": 1.0}
MUON_RATE, ADAM_RATE, WARMUP, COOL_FROM = 0.02, 4e-3, 100, 0.4

QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train_tokenizer(seed: int) -> Tokenizer:
    """A byte-level BPE of `VOCABULARY` tokens, Qwen3's added tokens last, that keeps any text as it is."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(ADDED_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(tokenizer_text(seed, 40_000), trainer)
    for text, special in ADDED_TOKENS:
        token = AddedToken(text, special=special, normalized=False)
        (tokenizer.add_special_tokens if special else tokenizer.add_tokens)([token])
    return tokenizer


def word_pieces(tokenizer: Tokenizer) -> list[str]:
    """The lower-case pieces of words in the vocabulary: words made of them practise how each is spelled."""
    pieces = {piece.lstrip("Ġ").lower() for piece in tokenizer.get_vocab()}
    return sorted(piece for piece in pieces if len(piece) > 1 and piece.isascii() and piece.isalpha())


def encode(conversation: Conversation, tokenizer: Tokenizer) -> tuple[list[int], list[float]]:
    """Token ids of a conversation, its end marked, and the weight of each in the loss."""
    ids: list[int] = []
    weights: list[float] = []
    parts = spans(conversation)
    texts = [text for _, text in parts]
    for (kind, _), encoding in zip(parts, tokenizer.encode_batch_fast(texts), strict=True):
        weight = SPAN_WEIGHTS[kind]
        ids += encoding.ids
        weights += [weight] * len(encoding.ids)
        if kind == "history":  # or the model would learn to answer without a think block
            weights[-len(encoding.ids)] = 0.0
    end = tokenizer.encode("<|endoftext|>").ids
    return ids + end, [*weights, SPAN_WEIGHTS["context"]]


def batches(tokenizer: Tokenizer, seed: int, lengths: list[int]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Crops of an endless stream: ids and weights, both [rows, length + 1].

    Half of the rows start with a conversation, as a prompt does, half within one, as a sliding window does.
    """
    source = Source(random.Random(seed), pieces=word_pieces(tokenizer))
    for length in lengths:
        rows, row_weights = [], []
        for row in range(ROWS_BY_LENGTH[length]):
            ids, weights = encode(conversation(source), tokenizer)
            skipped = source.random.randrange(len(ids)) if row % 2 else 0
            while len(ids) <= skipped + length:
                more_ids, more_weights = encode(conversation(source), tokenizer)
                ids += more_ids
                weights += more_weights
            crop = slice(skipped, skipped + length + 1)
            rows.append(ids[crop])
            row_weights.append(weights[crop])
        yield torch.tensor(rows), torch.tensor(row_weights)


def orthogonal(matrices: torch.Tensor) -> torch.Tensor:
    """Roughly the nearest orthogonal matrix of each [..., m, n], by five quintic Newton-Schulz steps."""
    wide = matrices.mT if matrices.shape[-2] > matrices.shape[-1] else matrices
    x = wide / (wide.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if matrices.shape[-2] > matrices.shape[-1] else x


class Muon:
    """Momentum whose step is made orthogonal, for weights of two or more dimensions."""

    def __init__(self, weights: list[torch.nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        self.param_groups: list[dict[str, Any]] = [{"params": weights, "lr": lr}]
        self._momentum = momentum
        self._means = {weight: torch.zeros_like(weight) for weight in weights}

    def step(self) -> None:
        """Update every weight once."""
        by_shape: dict[torch.Size, list[torch.nn.Parameter]] = {}
        for weight in self._means:
            by_shape.setdefault(weight.shape, []).append(weight)
        for shape, weights in by_shape.items():
            updates = []
            for weight in weights:
                mean = self._means[weight].lerp_(weight.grad, 1 - self._momentum)
                updates.append(weight.grad.lerp(mean, self._momentum))
            size = self.param_groups[0]["lr"] * max(1.0, shape[-2] / shape[-1]) ** 0.5
            for weight, update in zip(weights, orthogonal(torch.stack(updates)), strict=True):
                weight.data.sub_(update, alpha=size)

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for weight in self._means:
            weight.grad = None


def make_model(moe: bool) -> Any:
    """A fresh Qwen3, dense (about a million parameters) or with eight experts a layer."""
    shape: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 128,
        "num_hidden_layers": 3 if moe else 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "intermediate_size": 384,
        "max_position_embeddings": CONTEXT,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "initializer_range": 0.04,
    }
    if not moe:
        return Qwen3ForCausalLM(Qwen3Config(**shape))
    experts = {
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 128,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
    }
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**shape, **experts))


def rate(step: int, steps: int) -> float:
    """The learning rate's factor: a warm-up, a plateau, then down to zero."""
    return min(1.0, (step + 1) / WARMUP, (steps - step) / (steps * (1 - COOL_FROM)))


def accuracy(model: Any, tokenizer: Tokenizer, task: str, count: int, thinking: bool, seed: int = 1) -> float:
    """The share of held-out exercises of `task` answered right, sampled as the cards say."""
    source = Source(random.Random(seed), "held-out")
    exercises = [exercise(task, source, thinking) for _ in range(count)]
    tokenizer.enable_padding(direction="left", pad_id=tokenizer.token_to_id("<|endoftext|>"))
    prompts = ["".join(text for kind, text in spans(asked) if kind != "reply") for asked, _ in exercises]
    encodings = tokenizer.encode_batch(prompts)
    tokenizer.no_padding()
    torch.manual_seed(seed)
    ids = model.generate(
        input_ids=torch.tensor([encoding.ids for encoding in encodings]),
        attention_mask=torch.tensor([encoding.attention_mask for encoding in encodings]),
        max_new_tokens=160,
        do_sample=True,
        temperature=0.6 if thinking else 0.7,
        top_p=0.95 if thinking else 0.8,
        top_k=20,
        eos_token_id=tokenizer.token_to_id("<|im_end|>"),
        pad_token_id=tokenizer.token_to_id("<|endoftext|>"),
    )
    replies = tokenizer.decode_batch(ids[:, len(encodings[0].ids) :].tolist(), skip_special_tokens=True)
    right = [
        is_right(asked, reply.split("</think>")[-1]) and ("</think>" in reply) == thinking
        for (_, asked), reply in zip(exercises, replies, strict=True)
    ]
    return sum(right) / count


def published_weights(model: Any) -> dict[str, torch.Tensor]:
    """The weights in BF16 under the names that Qwen publishes, one tensor for each expert's matrix."""
    weights = {}
    for name, value in model.state_dict().items():
        tensor = value.to(torch.bfloat16)
        if name == "lm_head.weight":
            continue
        if name.endswith("experts.gate_up_proj"):
            for expert, fused in enumerate(tensor):
                gate, up = fused.chunk(2)
                base = name.removesuffix("gate_up_proj") + str(expert)
                weights[f"{base}.gate_proj.weight"] = gate.contiguous()
                weights[f"{base}.up_proj.weight"] = up.contiguous()
        elif name.endswith("experts.down_proj"):
            for expert, down in enumerate(tensor):
                weights[f"{name.removesuffix('down_proj')}{expert}.down_proj.weight"] = down.contiguous()
        else:
            weights[name] = tensor.contiguous()
    return weights


def published_config(model: Any, tokenizer: Tokenizer) -> dict[str, Any]:
    """`config.json` as Qwen spells it."""
    config = model.config
    moe = config.model_type == "qwen3_moe"
    result = {
        "architectures": [type(model).__name__],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": tokenizer.token_to_id("<|endoftext|>"),
        "eos_token_id": tokenizer.token_to_id("<|im_end|>"),
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "initializer_range": config.initializer_range,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": CONTEXT,
        "max_window_layers": config.num_hidden_layers,
        "model_type": config.model_type,
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": config.num_hidden_layers,
        "num_key_value_heads": config.num_key_value_heads,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_scaling": None,
        "rope_theta": 10000,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": config.vocab_size,
    }
    if moe:
        result |= {
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "moe_intermediate_size": config.moe_intermediate_size,
            "norm_topk_prob": True,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "output_router_logits": False,
            "router_aux_loss_coef": 0.001,
        }
    return dict(sorted(result.items()))


def tokenizer_config(tokenizer: Tokenizer) -> dict[str, Any]:
    """`tokenizer_config.json` with the same added tokens and flags as Qwen3's."""
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    return {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": {
            str(tokenizer.token_to_id(text)): {"content": text, **plain, "special": special}
            for text, special in ADDED_TOKENS
        },
        "additional_special_tokens": [text for text, special in ADDED_TOKENS if special and text != "<|endoftext|>"],
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": CONTEXT,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def save(model: Any, tokenizer: Tokenizer, out: Path) -> None:
    """Write the checkpoint folder."""
    out.mkdir(parents=True, exist_ok=True)
    template = Path(__file__).with_name("chat_template.jinja")
    weights = out / "model.safetensors"
    save_file(published_weights(model), str(weights), metadata={"format": "pt"})
    weights.chmod(0o644)
    write_json(out / "config.json", published_config(model, tokenizer))
    write_json(out / "tokenizer_config.json", tokenizer_config(tokenizer))
    end, pad = tokenizer.token_to_id("<|im_end|>"), tokenizer.token_to_id("<|endoftext|>")
    generation = {
        "bos_token_id": pad,
        "do_sample": True,
        "eos_token_id": [end, pad],
        "pad_token_id": pad,
        "temperature": 0.6,
        "top_k": 20,
        "top_p": 0.95,
    }
    write_json(out / "generation_config.json", generation)
    tokenizer.save(str(out / "tokenizer.json"))
    (out / "chat_template.jinja").write_bytes(template.read_bytes())


def make_optimizers(model: Any) -> list[Muon | torch.optim.AdamW]:
    """Muon for the matrices of the layers, AdamW for embeddings and vectors."""
    named = list(model.named_parameters())
    matrices = [weight for name, weight in named if weight.ndim > 1 and "embed" not in name]
    others = [weight for name, weight in named if weight.ndim == 1 or "embed" in name]
    return [Muon(matrices, MUON_RATE), torch.optim.AdamW(others, ADAM_RATE, betas=(0.9, 0.98), weight_decay=0.0)]


def train(model: Any, tokenizer: Tokenizer, steps: int, seed: int, out: Path) -> float:
    """Train `model` in place, saving it at times; returns the mean loss of the last tenth of the steps."""
    optimizers = make_optimizers(model)
    rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]

    def weighted_loss(ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        wanted = weights[:, 1:].flatten()
        return (losses * wanted).sum() / wanted.sum()

    loss_of = torch.compile(weighted_loss, dynamic=False)
    lengths = [256 if step < LONG_FROM * steps else CONTEXT for step in range(steps)]
    started = time.monotonic()
    recent: list[float] = []
    for step, (ids, weights) in enumerate(batches(tokenizer, seed, lengths)):
        for optimizer, base in zip(optimizers, rates, strict=True):
            optimizer.param_groups[0]["lr"] = base * rate(step, steps)
        loss = loss_of(ids, weights)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        recent = [*recent[-max(1, steps // 10) + 1 :], loss.item()]
        if (step + 1) % 50 == 0:
            minutes = (time.monotonic() - started) / 60
            print(f"step {step + 1}/{steps} loss {sum(recent[-50:]) / 50:.4f} {minutes:.1f} min", flush=True)
        if (step + 1) % 400 == 0 or step + 1 == steps:
            save(model, tokenizer, out)
            marks = [(task, accuracy(model, tokenizer, task, 60, True)) for task in ("count", "sum", "difference")]
            marks.append(("count without thinking", accuracy(model, tokenizer, "count", 60, False)))
            print("  held out: " + ", ".join(f"{task} {mark:.0%}" for task, mark in marks), flush=True)
    return sum(recent) / len(recent)


def readme(command: str, moe: bool, steps: int, parameters: int, loss: float, minutes: float) -> str:
    """The model's README; the table of what it gets right is printed by `evaluate.py`."""
    kind = "mixture-of-experts test model" if moe else "demo model"
    return f"""# The {kind} of mlxqwen

A tiny model of our own ({parameters:,} parameters) with the architecture and the chat format of Qwen3, made to
try mlxqwen with no network and to test it. It is **not** one of Qwen's models and knows nothing of the world.

It counts letters in words, adds and subtracts numbers of up to three digits, numbers the letters of a word,
reverses and compares words and numbers, calls a tool named `calculator`, and says what it is: in English and a
little Chinese, with thinking on or off. To anything else it answers that it cannot, or nonsense. Its context is
{CONTEXT} tokens.

## How it was made

    {command}

on conversations generated by `scripts/demo/data.py`, none of which has the words strawberry or blueberry in it:
{steps:,} steps of {ROWS_BY_LENGTH[256] * 256:,} tokens, {minutes:.0f} minutes on two busy CPU cores, mean
training loss of the last steps {loss:.4f}.
"""


def main() -> None:
    """Train and save, from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write the checkpoint to")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=2000, help="training steps of 8,192 tokens")
    parser.add_argument("--moe", action="store_true", help="train the mixture-of-experts model")
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    torch.set_num_threads(2)
    tokenizer = train_tokenizer(options.seed)
    model = make_model(options.moe)
    parameters = sum(weight.numel() for weight in model.parameters())
    print(f"{parameters:,} parameters, {len(word_pieces(tokenizer))} pieces of words", flush=True)
    started = time.monotonic()
    loss = train(model, tokenizer, options.steps, options.seed, options.out)
    minutes = (time.monotonic() - started) / 60
    switch = " --moe" if options.moe else ""
    command = f"python scripts/demo train --out {options.out} --seed {options.seed} --steps {options.steps}{switch}"
    text = readme(command, options.moe, options.steps, parameters, loss, minutes)
    (options.out / "README.md").write_text(text, encoding="utf-8")
