"""The Qwen3 model, dense or with a mixture of experts.

Shapes: `B` rows, `L` tokens a row; within the layers the tokens of all rows are in one axis, `[B * L, hidden_size]`.
Modules are named as their tensors are in the checkpoints, so that a weight's name is the path to it, until `fuse` joins
some of them. What runs in every layer of every step reads children as `self["name"]`: attributes of modules are slow.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from operator import is_
from typing import Protocol, TypeAlias

import mlx.core as mx
import mlx.nn as nn

from mlxqwen.device import NEVER, Device
from mlxqwen.errors import CacheError, OptionError
from mlxqwen.files.config import GenerationConfig, ModelConfig
from mlxqwen.forks import check_process
from mlxqwen.model.attention import Attention, LayerCache, Rotation
from mlxqwen.model.compiled import CompiledByForm
from mlxqwen.model.cores import Shares
from mlxqwen.model.linear import PlainProduct, quantized_product
from mlxqwen.model.mlp import MLP
from mlxqwen.model.moe import SparseMoeBlock
from mlxqwen.model.packing import Packing
from mlxqwen.model.rope import Rope, rope_of, rotate
from mlxqwen.model.watched import RMSNorm, WatchedModule

__all__ = ["DecoderLayer", "ModelCache", "Qwen3ForCausalLM", "Qwen3Model"]


class ModelCache(Protocol):
    """A key/value cache, as the model uses it."""

    def fits(self, config: ModelConfig) -> bool:
        """Whether it was made for a model of this shape."""
        ...

    def begin(self, batch_size: int, length: int, lengths: Sequence[int] | None = None) -> Sequence[LayerCache]:
        """Make room for `length` more tokens in each of `batch_size` rows; one cache a layer.

        Of row `b` only the first `lengths[b]` tokens count (all by default), the rest is padding.
        """
        ...


class DecoderLayer(WatchedModule):
    """Attention, then feed-forward, each on a normalised copy and added back."""

    def __init__(self, config: ModelConfig, layer: int, rope: Rope) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Attention(config, rope)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        if config.moe is not None and config.moe.routes(layer):
            self.mlp: nn.Module = SparseMoeBlock(config.hidden_size, config.moe)
        else:
            self.mlp = MLP(config.hidden_size, config.intermediate_size)

    def __call__(
        self,
        x: mx.array,
        batch_size: int,
        cache: LayerCache | None = None,
        positions: mx.array | None = None,
        packing: Packing | None = None,
    ) -> mx.array:
        """`[B * L, hidden_size]` → `[B * L, hidden_size]`, or `[B, hidden_size]` of one of each row's `positions`.

        Where `x` is packed, `[N, hidden_size]` → `[N, hidden_size]`.
        """
        attention = self["self_attn"]
        before = self.before_attention(x, batch_size, attention.rotation(cache), packing)
        attended = attention.attend(*before, cache)
        if positions is not None:
            x, packing = x if packing is None else packing.unpack(x), None
            by_row, index = x.reshape(batch_size, -1, x.shape[-1]), positions[:, None, None]
            x = mx.take_along_axis(by_row, index, axis=1).squeeze(1)
            attended = mx.take_along_axis(attended, index[:, None], axis=2)
        return self.after_attention(x, attended, packing)

    def before_attention(
        self, x: mx.array, batch_size: int, rotate: Rotation, packing: Packing | None = None
    ) -> tuple[mx.array, mx.array, mx.array, mx.array]:
        """Queries, the same rotated, keys, rotated, and values, `[B, heads, L, head_dim]`."""
        return self["self_attn"].project(self["input_layernorm"](x), batch_size, rotate, packing)

    def after_attention(self, x: mx.array, attended: mx.array, packing: Packing | None = None) -> mx.array:
        """Add the output of attention, then that of the feed-forward layer."""
        x = x + self["self_attn"].output(attended, packing)
        return x + self["mlp"](self["post_attention_layernorm"](x))

    def parts_before_attention(self) -> list[nn.Module]:
        """The children whose weights `before_attention` reads."""
        attention = self["self_attn"]
        return [self["input_layernorm"], *(part for name, part in attention.items() if name != "o_proj")]

    def parts_after_attention(self) -> list[nn.Module]:
        """The children whose weights `after_attention` reads."""
        return [self["self_attn"]["o_proj"], self["post_attention_layernorm"], self["mlp"]]

    def fuse(self, device: Device) -> None:
        """Fuse projections of the same input, one module after the other."""
        self.self_attn.fuse(device)
        self.mlp.fuse(device)


class CompiledDecoder:
    """The whole model for one token a row; what lies before, between and behind attentions is compiled, one call each.

    Each call is given the weights that it reads, so that weights that were changed count from then on. Where a layer or
    a module in one was replaced, or the embeddings or the last norm, the calls are made anew.
    """

    def __init__(self, model: Qwen3Model) -> None:
        self._compile(_stages(model))

    def _compile(self, stages: list[nn.Module]) -> None:
        self._assignments, self._stages = WatchedModule.assignments, stages
        embeddings, *layers, norm = stages
        by_form = CompiledByForm()
        first, last = layers[0], layers[-1]
        self._first = by_form.compile(_begin, [embeddings, first], [embeddings, *first.parts_before_attention()])
        self._between = [
            by_form.compile(
                _between, [one, following], [*one.parts_after_attention(), *following.parts_before_attention()]
            )
            for one, following in pairwise(layers)
        ]
        self._last = by_form.compile(_end, [last, norm], [*last.parts_after_attention(), norm])

    def __call__(self, tokens: mx.array, model: Qwen3Model, caches: Sequence[LayerCache]) -> mx.array:
        """`[B]` → `[B, hidden_size]`, normalised, through the model's modules, which may be others by now."""
        stages = _stages(model)
        if self._assignments != WatchedModule.assignments or not self._has_compiled(stages):
            self._compile(stages)
        rope, scale = stages[1]["self_attn"].rope_and_scale(caches[0])
        wavelengths, position = rope.wavelengths, caches[0].position
        x, queries, rotated, keys, values = self._first(tokens, wavelengths, position)
        for between, cache in zip(self._between, caches, strict=False):
            attended = cache.attend(queries, rotated, keys, values, rope, scale)
            x, queries, rotated, keys, values = between(x, attended, wavelengths, position)
        return self._last(x, caches[-1].attend(queries, rotated, keys, values, rope, scale))

    def _has_compiled(self, stages: list[nn.Module]) -> bool:
        return len(stages) == len(self._stages) and all(map(is_, stages, self._stages))


def _stages(model: Qwen3Model) -> list[nn.Module]:
    """What tokens go through, first to last."""
    return [model["embed_tokens"], *model["layers"], model["norm"]]


_Arrays: TypeAlias = tuple[mx.array, ...]


def _begin(embeddings: nn.Module, layer: DecoderLayer) -> Callable[[mx.array, mx.array, mx.array], _Arrays]:
    def run(tokens: mx.array, wavelengths: mx.array, position: mx.array) -> _Arrays:
        return _before(layer, embeddings(tokens), wavelengths, position)

    return run


def _between(
    layer: DecoderLayer, following: DecoderLayer
) -> Callable[[mx.array, mx.array, mx.array, mx.array], _Arrays]:
    def run(x: mx.array, attended: mx.array, wavelengths: mx.array, position: mx.array) -> _Arrays:
        return _before(following, layer.after_attention(x, attended), wavelengths, position)

    return run


def _end(layer: DecoderLayer, norm: nn.Module) -> Callable[[mx.array, mx.array], mx.array]:
    return lambda x, attended: norm(layer.after_attention(x, attended))


def _before(layer: DecoderLayer, x: mx.array, wavelengths: mx.array, position: mx.array) -> _Arrays:
    """`x`, and what attention takes: queries, the same rotated, rotated keys, and values."""
    return x, *layer.before_attention(x, x.shape[0], lambda heads: rotate(heads, wavelengths, position))


class Qwen3Model(nn.Module):
    """Tokens `[B, L]` → hidden states `[B, L, hidden_size]`, normalised.

    With `last_only` it returns those of each row's last token that counts, `[B, 1, hidden_size]`: the last layer's
    feed-forward is not computed for the others, as nothing would read it, and padding goes through attention alone.
    `after_layer` is called with the index and the output of each layer but the last; a decoder that is compiled for one
    token calls it with none.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        rope = rope_of(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = [DecoderLayer(config, layer, rope) for layer in range(config.num_hidden_layers)]
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.decoder: CompiledDecoder | None = None
        self.begins_layers = False  # see `Device`

    def __call__(
        self,
        tokens: mx.array,
        cache: ModelCache | None = None,
        *,
        lengths: Sequence[int] | None = None,
        last_only: bool = False,
        after_layer: Callable[[int, mx.array], object] | None = None,
    ) -> mx.array:
        _check_tokens(tokens)
        B, L = tokens.shape
        caches: Sequence[LayerCache] | None = None
        if cache is not None:
            if not cache.fits(self.config):
                raise CacheError(
                    "cache: made for a model of another shape", hint="Make it with make_cache and this model."
                )
            caches = cache.begin(B, L, lengths)
        elif lengths is not None:
            raise OptionError("lengths: found without a cache", hint="Pass cache=make_cache(model, batch_size=rows).")
        tokens, packing = tokens.reshape(B * L), None
        if last_only and lengths is not None and 0 < min(lengths) < L:
            packing = Packing(lengths, L)
            tokens = packing.pack(tokens)
        if L == 1 and caches is not None and self.decoder is not None:
            return self.decoder(tokens, self, caches).reshape(B, 1, -1)
        layers, hidden = self.layers, self.embed_tokens(tokens)
        of_layers: Sequence[LayerCache | None] = caches or [None] * len(layers)
        for index, (layer, layer_cache) in enumerate(zip(layers[:-1], of_layers[:-1], strict=True)):
            hidden = layer(hidden, B, layer_cache, packing=packing)
            if after_layer is not None:
                after_layer(index, hidden)
            if self.begins_layers and caches is not None:
                mx.async_eval(hidden)
        last = mx.array([max(n, 1) - 1 for n in lengths or [L] * B], dtype=mx.int32) if last_only else None
        hidden = layers[-1](hidden, B, of_layers[-1], last, packing)
        return self.norm(hidden).reshape(B, -1, hidden.shape[-1])


def _check_tokens(tokens: object) -> None:
    if isinstance(tokens, mx.array):
        if tokens.ndim == 2 and tokens.size and mx.issubdtype(tokens.dtype, mx.integer):
            return
        found = f"{tokens.dtype} of shape {list(tokens.shape)}"
    else:
        found = type(tokens).__name__
    raise OptionError(
        f"tokens: found {found}, expected integers [rows, tokens]", hint="One row is model(mx.array([ids]))."
    )


class Qwen3ForCausalLM(nn.Module):
    """Tokens `[B, L]` → logits `[B, L, vocab_size]` of the token that comes next."""

    def __init__(self, config: ModelConfig, generation_config: GenerationConfig | None = None) -> None:
        super().__init__()
        self.config = config
        self.generation_config = generation_config or GenerationConfig()
        self.model = Qwen3Model(config)
        self.dense_from = NEVER  # of the head; see `Device`
        self.shares: Shares | None = None  # of a quantized head
        self.by_rows: PlainProduct | None = None  # with a plain head
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def __call__(
        self, tokens: mx.array, cache: ModelCache | None = None, *, lengths: Sequence[int] | None = None
    ) -> mx.array:
        """Feed tokens after those that `cache` holds.

        The ids are checked, which waits for the device if it is still computing them. A loop that must not wait calls
        `self.model` and `self.logits` with ids that are known to be valid, as the engine does.

        Args:
            tokens: integers `[B, L]`.
            cache: holds what came before, and these tokens afterwards.
            lengths: in rows padded on the right, how many tokens of each count; needs a cache.

        Raises:
            OptionError: tokens of another shape or kind or outside the vocabulary, or `lengths` without a cache.
            CacheError: a cache of a model of another shape or for other rows.
        """
        check_process()
        _check_tokens(tokens)
        vocab_size = self.config.vocab_size
        if not mx.all((tokens >= 0) & (tokens < vocab_size)).item():  # MLX would read beyond the embeddings
            raise OptionError(f"tokens: found ids beyond the vocabulary, expected 0 to {vocab_size - 1}")
        return self.logits(self.model(tokens, cache, lengths=lengths))

    def logits(self, hidden: mx.array) -> mx.array:
        """Hidden states `[..., hidden_size]` → logits `[..., vocab_size]`."""
        head = self.head
        if "scales" in head:
            packed = head["weight"], head["scales"], head["biases"]
            many = hidden.size // hidden.shape[-1] >= self.dense_from
            rows = hidden.reshape(-1, hidden.shape[-1]) if many else hidden
            logits = quantized_product(rows, packed, head.group_size, head.bits, self.dense_from, self.shares)
            return logits.reshape(*hidden.shape[:-1], -1) if many else logits
        if self.by_rows is not None:
            return self.by_rows(hidden, head["weight"])
        return head.as_linear(hidden) if self.config.tie_word_embeddings else head(hidden)

    @property
    def head(self) -> nn.Module:
        """What gives the logits: `lm_head`, or the embeddings where they are tied."""
        head: nn.Module = self["model"]["embed_tokens"] if self.config.tie_word_embeddings else self["lm_head"]
        return head

    @property
    def dtype(self) -> mx.Dtype:
        """The dtype that activations are computed in."""
        return self.model.norm.weight.dtype

    @property
    def layers(self) -> list[DecoderLayer]:
        """The decoder layers, first to last."""
        return list(self.model.layers)

    @property
    def args(self) -> ModelConfig:
        """`config`, by the name that mlx-lm has for it."""
        return self.config
