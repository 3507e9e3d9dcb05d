"""The cache of a whole model: one placement for all layers, and the keys and values of each layer.

Long by what it says of its methods, most of which hand on to all layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import mlx.core as mx

from mlxqwen.cache.layer import KVLayer
from mlxqwen.cache.placement import LinearPlacement, Placement, RingPlacement
from mlxqwen.cache.storage import PlainStorage, QuantizedStorage, Storage, join_rows
from mlxqwen.checks import as_integer, check_integer, is_integer
from mlxqwen.errors import CacheError, OptionError
from mlxqwen.files.checkpoint import load_safetensors, save_safetensors
from mlxqwen.files.config import ModelConfig
from mlxqwen.model.given import check_model
from mlxqwen.model.qwen3 import Qwen3ForCausalLM
from mlxqwen.model.rope import Rope, rope_of

__all__ = ["KVCache", "cache_identity", "load_cache", "make_cache"]

_FILE_FORMAT = "mlxqwen-cache-1"
_MAX_TOKENS = 1 << 30  # positions are 32-bit integers on the device
_MAX_ROWS = 1 << 16


class KVCache:
    """Keys and values of `batch_size` rows in every layer; iterating gives the layers.

    Args:
        config: of the model.
        placement: which slot a token goes to.
        kv_bits, kv_group_size: of quantized keys and values; `kv_bits` None stores them as computed.
        rope: what keys are rotated by, if that is not the RoPE of the model.
    """

    def __init__(
        self,
        config: ModelConfig,
        placement: Placement,
        kv_bits: int | None = None,
        kv_group_size: int = 64,
        rope: Rope | None = None,
    ) -> None:
        self.config = config
        self.rope = rope
        self._fitting: ModelConfig | None = None  # the last one that was found to fit
        self.placement = placement
        self.kv_bits = kv_bits
        self.kv_group_size = kv_group_size
        storage: Storage = PlainStorage() if kv_bits is None else QuantizedStorage(kv_bits, kv_group_size)
        self.layers = [KVLayer(storage, placement.keep, rope) for _ in range(config.num_hidden_layers)]

    def __len__(self) -> int:
        return len(self.layers)

    def __repr__(self) -> str:
        kind = "" if self.max_kv_size is None else f", max_kv_size={self.max_kv_size}, keep={self.keep}"
        bits = "" if self.kv_bits is None else f", kv_bits={self.kv_bits}"
        return f"KVCache({len(self)} layers, offsets={self.offsets}{kind}{bits}, {self.nbytes:,} bytes)"

    def __iter__(self) -> Iterator[KVLayer]:
        return iter(self.layers)

    def __getitem__(self, layer: int) -> KVLayer:
        return self.layers[layer]

    @property
    def offsets(self) -> tuple[int, ...]:
        """How many tokens each row has seen, held or dropped."""
        return tuple(self.placement.offsets)

    @property
    def offset(self) -> int:
        """How many tokens the longest row has seen."""
        return max(self.placement.offsets)

    @property
    def batch_size(self) -> int:
        """The number of rows."""
        return len(self.placement.offsets)

    @property
    def max_kv_size(self) -> int | None:
        """The ring's window in tokens; None for a cache that keeps everything."""
        return self.placement.window

    @property
    def keep(self) -> int:
        """The ring's sinks in tokens."""
        return self.placement.keep

    @property
    def capacity(self) -> int:
        """Slots of the buffers, filled or not."""
        keys = self.layers[0].keys
        return keys[0].shape[-2] if keys else 0

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers, filled or not."""
        return sum(layer.nbytes for layer in self.layers)

    def fits(self, config: ModelConfig) -> bool:
        """Whether this cache was made for a model of this shape, under a RoPE of its own; see `cache_identity`."""
        if config is not self.config and config is not self._fitting:
            own = cache_identity(self.config)
            if all(cache_identity(one) != own for one in (config, *config.by_yarn_factor.values())):
                return False
            self._fitting = config
        return True

    def begin(self, batch_size: int, length: int, lengths: Sequence[int] | None = None) -> Sequence[KVLayer]:
        """Make room for `length` more tokens in every row; of row `b` only the first `lengths[b]` count.

        The model calls this once a step. Raises `CacheError` if the rows are not those of this cache.
        """
        if batch_size != self.batch_size:
            raise CacheError(
                f"cache: made for {self.batch_size} rows, used with {batch_size}",
                hint=f"Make it with make_cache(model, batch_size={batch_size}).",
            )
        if lengths is not None and (
            len(lengths) != batch_size or not all(is_integer(count) and 0 <= count <= length for count in lengths)
        ):
            raise CacheError(
                f"cache: lengths are {list(lengths)}, expected {batch_size} numbers from 0 to {length}",
                hint="Give one length a row, none beyond the tokens that were passed.",
            )
        plan = self.placement.advance(length, lengths)
        if plan.gather is None:
            self.make_room(plan.capacity)
        for layer in self.layers:
            layer.plan = plan
        return self.layers

    def make_room(self, capacity: int) -> None:
        """Grow the buffers to `capacity` slots; one layer at a time, so that only one is held twice."""
        if self.layers[-1].has_room(capacity):
            return
        rows = range(self.batch_size)
        for layer in self.layers:
            if layer.keys and layer.keys[0].shape[-2] < capacity:
                layer.keys = join_rows([(layer.keys, rows)], capacity)
                layer.values = join_rows([(layer.values, rows)], capacity)
                _let_go(layer)

    def reserve(self, length: int) -> None:
        """Allocate for `length` tokens a row when the next ones arrive, instead of growing in steps.

        Raises `OptionError` if `length` is no number of tokens.
        """
        self.placement.reserved = check_integer("length", length, 0, _MAX_TOKENS)

    def can_trim(self, length: int) -> bool:
        """Whether every row holds all of its first `length` tokens, so that `trim` works."""
        return self.placement.can_trim_to(length)

    def trim(self, length: int) -> None:
        """Forget all except the first `length` tokens of every row; the buffers stay.

        Raises:
            CacheError: a row does not hold these tokens: a ring drops some once its window is full.
            OptionError: `length` is no number of tokens.
        """
        length = check_integer("length", length, 0, _MAX_TOKENS)
        if not self.can_trim(length):
            raise CacheError(
                f"cache of {min(self.offsets)} tokens: cannot be trimmed to {length}, not all of them are held",
                hint="Trim it to 0 and prefill it; a ring can be trimmed further only before its window is full.",
            )
        self.placement.offsets = [length] * self.batch_size

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Keep only these rows, in this order. Raises `CacheError` for rows that do not exist."""
        self.assemble([(self, rows)])

    def like(self, batch_size: int) -> KVCache:
        """An empty cache of the same kind with `batch_size` rows."""
        kind = self.max_kv_size, self.keep, self.kv_bits, self.kv_group_size
        return _make_cache(self.config, *kind, [0] * batch_size, self.rope)

    def assemble(self, parts: Sequence[tuple[KVCache, Sequence[int]]]) -> None:
        """Replace the rows by these rows of these caches, in this order; this cache may be among them.

        Buffers are as long as the longest row needs. Layers are replaced one at a time: if the given caches are not
        used any more, only one layer is held twice.

        Raises `CacheError` for no rows, rows that do not exist, or a cache of another kind.
        """
        for cache, rows in parts:
            if not all(is_integer(row) and 0 <= row < cache.batch_size for row in rows):
                raise CacheError(
                    f"cache of {cache.batch_size} rows: cannot go on with rows {list(rows)}",
                    hint=f"Give at least one row from 0 to {cache.batch_size - 1}.",
                )
            if cache._kind != self._kind:
                raise CacheError("cache: rows of another kind of cache", hint="Make it with like(batch_size).")
        offsets = [cache.placement.offsets[row] for cache, rows in parts for row in rows]
        if not offsets:
            raise CacheError("cache: cannot go on with no rows", hint="Give at least one.")
        self.placement.reserved = 0
        capacity = self.placement.capacity_for(max(offsets))
        for number, layer in enumerate(self.layers):
            others = [(cache.layers[number], rows) for cache, rows in parts]
            layer.keys, layer.values = (
                join_rows([(other.keys, rows) for other, rows in others], capacity),
                join_rows([(other.values, rows) for other, rows in others], capacity),
            )
            _let_go(layer)
        self.placement.offsets = offsets

    @property
    def _kind(self) -> tuple[str, int | None, int, int | None, int]:
        return cache_identity(self.config), self.max_kv_size, self.keep, self.kv_bits, self.kv_group_size

    @property
    def state(self) -> list[mx.array]:
        """All buffers, for `mx.eval`."""
        return [part for layer in self.layers for part in (*layer.keys, *layer.values)]

    def save(self, path: str | Path, metadata: Mapping[str, str] | None = None) -> None:
        """Write the tokens that are held to a `.safetensors` file, whole or not at all.

        `load_cache` returns `metadata` again.
        """
        slots = self.placement.slots_for(self.offset)
        arrays = {}
        for number, layer in enumerate(self.layers):
            for name, stored in (("keys", layer.keys), ("values", layer.values)):
                for part, array in enumerate(stored if slots else ()):
                    arrays[f"layers.{number}.{name}.{part}"] = mx.contiguous(array[..., :slots, :])
        own = {
            "format": _FILE_FORMAT,
            "offsets": ",".join(map(str, self.offsets)),
            "max_kv_size": str(self.max_kv_size or 0),
            "keep": str(self.keep),
            "kv_bits": str(self.kv_bits or 0),
            "kv_group_size": str(self.kv_group_size),
            "model": cache_identity(self.config),
        }
        save_safetensors(Path(path), arrays, {**{f"user.{k}": v for k, v in (metadata or {}).items()}, **own})


def make_cache(
    model: Qwen3ForCausalLM,
    *,
    max_kv_size: int | None = None,
    keep: int = 4,
    kv_bits: int | None = None,
    kv_group_size: int = 64,
    batch_size: int = 1,
    yarn_factor: float | None = None,
) -> KVCache:
    """An empty cache for `model`.

    Args:
        max_kv_size: hold at most this many tokens a row (a ring); None keeps everything.
        keep: how many first tokens a ring never drops (attention sinks).
        kv_bits: 8 or 4 to quantize keys and values; None stores them as computed.
        kv_group_size: 32, 64 or 128 values share a scale and bias; must divide the model's `head_dim`, but 64, the
            default, means 32 where heads are no multiple of 64.
        batch_size: rows.
        yarn_factor: of a model loaded with `yarn="auto"`, the factor for what the cache will hold: 1, the default, is
            unscaled.

    Raises:
        OptionError: a value out of range.
    """
    check_model(model, "make_cache(model)")
    batch_size = check_integer("batch_size", batch_size, 1, _MAX_ROWS)
    kind = max_kv_size, keep, kv_bits, kv_group_size
    if yarn_factor is None and not model.config.yarn_choices:
        return _make_cache(model.config, *kind, [0] * batch_size)
    config = model.config.at_yarn_factor(1.0 if yarn_factor is None else yarn_factor)
    return _make_cache(config, *kind, [0] * batch_size, rope_of(config))


def _make_cache(
    config: ModelConfig,
    max_kv_size: int | None,
    keep: int,
    kv_bits: int | None,
    kv_group_size: int,
    offsets: list[int],
    rope: Rope | None = None,
) -> KVCache:
    max_kv_size, keep = check_window(max_kv_size, keep)
    kv_bits, kv_group_size = check_quantization(kv_bits, kv_group_size)
    group_size, fitting = config.kv_group_size(kv_group_size), [n for n in (32, 64, 128) if config.head_dim % n == 0]
    if kv_bits is not None and group_size not in fitting:
        sizes = " or ".join(map(str, fitting))
        raise OptionError(
            f"kv_group_size: found {kv_group_size}, expected a divisor of head_dim, {config.head_dim}",
            hint=f"Use {sizes}." if sizes else "Leave kv_bits out: this model's heads cannot be quantized.",
        )
    if max_kv_size is None:
        placement: Placement = LinearPlacement(len(offsets))
    else:
        placement = RingPlacement(len(offsets), max_kv_size, keep)
    placement.offsets = offsets
    return KVCache(config, placement, kv_bits, group_size, rope)


def check_window(max_kv_size: int | None, keep: int) -> tuple[int | None, int]:
    """Both as `int`, as far as they can be checked without a model. Raises `OptionError`."""
    keep = check_integer("keep", keep, 0, _MAX_TOKENS)
    if max_kv_size is None:
        return None, keep
    max_kv_size = int(check_integer("max_kv_size", max_kv_size, 1, _MAX_TOKENS))
    if max_kv_size <= keep:
        raise OptionError(
            f"max_kv_size: found {max_kv_size}, expected more than the {keep} tokens that are always kept",
            hint="Choose a larger window, or keep fewer.",
        )
    return max_kv_size, keep


def check_quantization(kv_bits: int | None, kv_group_size: int) -> tuple[int | None, int]:
    """Both as `int`, as far as they can be checked without a model. Raises `OptionError`."""
    kv_group_size = check_integer("kv_group_size", kv_group_size, 32, 128)
    if kv_bits is None:
        return None, kv_group_size
    bits = as_integer(kv_bits)
    if not is_integer(bits) or bits not in (4, 8):
        raise OptionError(f"kv_bits: found {kv_bits!r}, expected 4, 8 or none")
    return bits, kv_group_size


def _let_go(layer: KVLayer) -> None:
    """Evaluate a layer's new buffers, and free the old ones before the next layer."""
    mx.eval(layer.keys, layer.values)
    mx.clear_cache()


def cache_identity(config: ModelConfig) -> str:
    """What a cache depends on besides the weights: the model's shape, its norms, and how keys are rotated.

    Models of one shape with other weights (another release, another quantization) have the same identity.
    """
    c = config
    heads = (c.num_attention_heads, c.num_key_value_heads, c.head_dim)
    shape = (c.model_type, c.hidden_size, c.num_hidden_layers, *heads, c.intermediate_size, c.vocab_size, c.moe)
    return " ".join(map(str, (*shape, c.rms_norm_eps, c.rope_theta, c.rope_scaling)))


def load_cache(path: str | Path, model: Qwen3ForCausalLM) -> tuple[KVCache, dict[str, str]]:
    """Read what `KVCache.save` wrote → the cache and the caller's metadata.

    The file tells the model's shape only: the caller has to load it with the weights that it was made with.

    Raises:
        CheckpointError: a damaged file.
        CacheError: not a cache, or one of a model of another shape or dtype.
        OptionError: `model` is none.
    """
    check_model(model, "load_cache(path, model)")
    path, config, rope = Path(path), model.config, None
    arrays, metadata = load_safetensors(path)
    if metadata.get("format") != _FILE_FORMAT:
        raise CacheError(f"{path}: not a cache", hint="Give a file that was written by KVCache.save.")
    for one in config.by_yarn_factor.values():
        if metadata.get("model") == cache_identity(one):
            config, rope = one, rope_of(one)
    if metadata.get("model") != cache_identity(config):
        raise CacheError(
            f"{path}: made with a model of another shape",
            hint="Load it with the model that it was saved with, or make a new one.",
        )
    try:
        offsets = [int(offset) for offset in metadata["offsets"].split(",")]
        numbers = {name: int(metadata[name]) for name in ("max_kv_size", "keep", "kv_bits", "kv_group_size")}
        cache = _make_cache(
            config,
            numbers["max_kv_size"] or None,
            numbers["keep"],
            numbers["kv_bits"] or None,
            numbers["kv_group_size"],
            offsets,
            rope,
        )
    except (KeyError, ValueError):  # OptionError is a ValueError
        raise _damaged(path) from None
    _restore(path, cache, arrays, model.dtype)
    return cache, {k.removeprefix("user."): v for k, v in metadata.items() if k.startswith("user.")}


def _damaged(path: Path) -> CacheError:
    return CacheError(f"{path}: its metadata and its tensors do not belong together", hint="Make a new cache.")


def _restore(path: Path, cache: KVCache, arrays: dict[str, mx.array], dtype: mx.Dtype) -> None:
    """Fill `cache` with `arrays` after checking every name, shape and dtype against an empty encoding."""
    config, slots = cache.config, cache.placement.slots_for(cache.offset)
    if min(cache.offsets) < 0 or cache.offset > _MAX_TOKENS:
        raise _damaged(path)
    shape = (cache.batch_size, config.num_key_value_heads, slots, config.head_dim)
    storage = cache.layers[0].storage
    expected = storage.encode(mx.zeros(shape, dtype=dtype)) if slots else ()
    names = {
        f"layers.{layer}.{kind}.{part}"
        for layer in range(len(cache))
        for kind in ("keys", "values")
        for part in range(len(expected))
    }
    if set(arrays) != names:
        raise _damaged(path)
    for name, array in arrays.items():
        like = expected[int(name.rpartition(".")[2])]
        if array.shape != like.shape:
            raise _damaged(path)
        if array.dtype != like.dtype:
            raise CacheError(
                f"{path}: {name} has dtype {array.dtype}, expected {like.dtype} as this model computes",
                hint="Load the model with the dtype that the cache was made with, or make a new one.",
            )
    for number, layer in enumerate(cache.layers):
        layer.keys = tuple(arrays[f"layers.{number}.keys.{part}"] for part in range(len(expected)))
        layer.values = tuple(arrays[f"layers.{number}.values.{part}"] for part in range(len(expected)))
