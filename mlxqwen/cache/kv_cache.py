"""The cache of a whole model: one placement, one buffer pair a layer; saved to and loaded from a file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import mlx.core as mx

from mlxqwen.cache.layer import KVLayer
from mlxqwen.cache.placement import LinearPlacement, Placement, RingPlacement
from mlxqwen.cache.storage import PlainStorage, QuantizedStorage, Storage
from mlxqwen.checkpoint import load_safetensors, save_safetensors
from mlxqwen.config import ModelConfig
from mlxqwen.errors import CacheError, OptionError
from mlxqwen.model import Qwen3ForCausalLM

__all__ = ["KVCache", "load_cache", "make_cache"]

_FILE_FORMAT = "mlxqwen-cache-1"
_MAX_TOKENS = 1 << 30  # positions are 32-bit integers on the device
_MAX_ROWS = 1 << 16


class KVCache:
    """Keys and values of `batch_size` rows in every layer; iterating gives the layers.

    Args:
        config: the model's shape.
        placement: where tokens go.
        kv_bits, kv_group_size: how they are stored; None for as they are.
    """

    def __init__(
        self, config: ModelConfig, placement: Placement, kv_bits: int | None = None, kv_group_size: int = 64
    ) -> None:
        self.config = config
        self.placement = placement
        self.kv_bits = kv_bits
        self.kv_group_size = kv_group_size
        storage: Storage = PlainStorage() if kv_bits is None else QuantizedStorage(kv_bits, kv_group_size)
        self.layers = [KVLayer(storage, placement.keep) for _ in range(config.num_hidden_layers)]

    def __len__(self) -> int:
        return len(self.layers)

    def __iter__(self) -> Iterator[KVLayer]:
        return iter(self.layers)

    def __getitem__(self, layer: int) -> KVLayer:
        return self.layers[layer]

    @property
    def offsets(self) -> tuple[int, ...]:
        """Tokens that each row has seen, held or not."""
        return tuple(self.placement.offsets)

    @property
    def offset(self) -> int:
        """Tokens that the longest row has seen."""
        return max(self.placement.offsets)

    @property
    def batch_size(self) -> int:
        """Rows."""
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
    def nbytes(self) -> int:
        """Bytes of all buffers, filled or not."""
        return sum(layer.nbytes for layer in self.layers)

    def begin(self, batch_size: int, length: int, lengths: Sequence[int] | None = None) -> Sequence[KVLayer]:
        """Make room for `length` more tokens in every row; of row `b` only the first `lengths[b]` count.

        The model calls this once a step. Raises `CacheError` if the rows are not those of this cache.
        """
        if batch_size != self.batch_size:
            raise CacheError(
                f"cache: made for {self.batch_size} rows, used with {batch_size}",
                hint=f"Make it with make_cache(model, batch_size={batch_size}).",
            )
        if lengths is not None and (len(lengths) != batch_size or not all(0 <= count <= length for count in lengths)):
            raise CacheError(
                f"cache: lengths are {list(lengths)}, expected {batch_size} numbers from 0 to {length}",
                hint="Give one length a row, none beyond the tokens that were passed.",
            )
        plan = self.placement.advance(length, lengths)
        for layer in self.layers:
            layer.plan = plan
        return self.layers

    def reserve(self, length: int) -> None:
        """Allocate for `length` tokens a row at once when the next ones arrive, rather than growing in steps."""
        self.placement.reserved = length

    def trim(self, length: int) -> None:
        """Forget all but the first `length` tokens of every row; the buffers stay.

        Raises `CacheError` where those tokens are not all held: a ring drops some once its window is full.
        """
        if length < 0 or not self.placement.can_trim_to(length):
            raise CacheError(
                f"cache of {min(self.offsets)} tokens: cannot be trimmed to {length}, not all of them are held",
                hint="Make a new cache and prefill it; a ring can be trimmed only before its window is full.",
            )
        self.placement.offsets = [length] * self.batch_size

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Go on with these rows only, in this order. Raises `CacheError` for rows that are not there."""
        if not rows or not all(0 <= row < self.batch_size for row in rows):
            raise CacheError(
                f"cache of {self.batch_size} rows: cannot go on with rows {list(rows)}",
                hint=f"Give at least one row from 0 to {self.batch_size - 1}.",
            )
        index = mx.array(list(rows), dtype=mx.int32)
        self.placement.offsets = [self.placement.offsets[row] for row in rows]
        for layer in self.layers:
            layer.keys = tuple(part[index] for part in layer.keys)
            layer.values = tuple(part[index] for part in layer.values)

    @property
    def state(self) -> list[mx.array]:
        """All buffers, to evaluate them."""
        return [part for layer in self.layers for part in (*layer.keys, *layer.values)]

    def save(self, path: str | Path, metadata: Mapping[str, str] | None = None) -> None:
        """Write the held tokens to a `.safetensors` file, whole or not at all.

        `metadata` comes back with `load_cache`.
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
            "model": _identity(self.config),
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
) -> KVCache:
    """An empty cache for `model`.

    Args:
        max_kv_size: hold at most this many tokens a row (a ring); None keeps everything.
        keep: how many first tokens a ring never drops (attention sinks).
        kv_bits: 8 or 4 to quantize keys and values; None stores them as computed.
        kv_group_size: 32, 64 or 128 values share a scale and bias; must divide the model's `head_dim`.
        batch_size: rows.

    Raises:
        OptionError: a value out of range.
    """
    _check_integer("batch_size", batch_size, 1, _MAX_ROWS)
    return _make_cache(model.config, max_kv_size, keep, kv_bits, kv_group_size, [0] * batch_size)


def _make_cache(
    config: ModelConfig,
    max_kv_size: int | None,
    keep: int,
    kv_bits: int | None,
    kv_group_size: int,
    offsets: list[int],
) -> KVCache:
    _check_integer("keep", keep, 0, _MAX_TOKENS)
    if kv_bits is not None and (not isinstance(kv_bits, int) or kv_bits not in (4, 8)):
        raise OptionError(f"kv_bits: found {kv_bits!r}, expected 4, 8 or none")
    groups = [size for size in (32, 64, 128) if config.head_dim % size == 0]
    if kv_bits is not None and (not isinstance(kv_group_size, int) or kv_group_size not in groups):
        fits = [str(size) for size in groups]
        raise OptionError(
            f"kv_group_size: found {kv_group_size!r}, expected a divisor of head_dim, {config.head_dim}",
            hint=f"Use {' or '.join(fits)}." if fits else "Leave kv_bits out: this model's heads cannot be grouped.",
        )
    if max_kv_size is None:
        placement: Placement = LinearPlacement(len(offsets))
    else:
        _check_integer("max_kv_size", max_kv_size, 1, _MAX_TOKENS)
        if max_kv_size <= keep:
            raise OptionError(
                f"max_kv_size: found {max_kv_size}, expected more than the {keep} tokens that are always kept",
                hint="Choose a larger window, or keep fewer.",
            )
        placement = RingPlacement(len(offsets), max_kv_size, keep)
    placement.offsets = offsets
    return KVCache(config, placement, kv_bits, kv_group_size)


def _check_integer(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise OptionError(f"{name}: found {value!r}, expected an integer from {low} to {high:,}")


def _identity(config: ModelConfig) -> str:
    """What a cache depends on: the model's shape, and how keys are rotated."""
    shape = (config.hidden_size, config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads)
    facts = (config.model_type, *shape, config.head_dim, config.vocab_size, config.rope_theta, config.rope_scaling)
    return " ".join(map(str, facts))


def load_cache(path: str | Path, model: Qwen3ForCausalLM) -> tuple[KVCache, dict[str, str]]:
    """Read what `KVCache.save` wrote → the cache and the caller's metadata.

    Raises:
        CheckpointError: a damaged file.
        CacheError: not a cache, or one of another model.
    """
    path, config = Path(path), model.config
    arrays, metadata = load_safetensors(path)
    wrong = CacheError(
        f"{path}: not a cache of this model",
        hint="Load it with the model that it was saved with, or make a new one.",
    )
    try:
        if metadata["format"] != _FILE_FORMAT or metadata["model"] != _identity(config):
            raise wrong
        offsets = [int(offset) for offset in metadata["offsets"].split(",")]
        numbers = {name: int(metadata[name]) for name in ("max_kv_size", "keep", "kv_bits", "kv_group_size")}
        cache = _make_cache(
            config,
            numbers["max_kv_size"] or None,
            numbers["keep"],
            numbers["kv_bits"] or None,
            numbers["kv_group_size"],
            offsets,
        )
    except (KeyError, ValueError):  # OptionError is a ValueError
        raise wrong from None
    _restore(cache, arrays, model.dtype, wrong)
    return cache, {k.removeprefix("user."): v for k, v in metadata.items() if k.startswith("user.")}


def _restore(cache: KVCache, arrays: dict[str, mx.array], dtype: mx.Dtype, wrong: CacheError) -> None:
    """Fill `cache` with `arrays` after checking every name, shape and dtype against an empty encoding."""
    config, slots = cache.config, cache.placement.slots_for(cache.offset)
    if min(cache.offsets) < 0 or cache.offset > _MAX_TOKENS:
        raise wrong
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
        raise wrong
    for name, array in arrays.items():
        like = expected[int(name.rpartition(".")[2])]
        if array.shape != like.shape or array.dtype != like.dtype:
            raise wrong
    for number, layer in enumerate(cache.layers):
        layer.keys = tuple(arrays[f"layers.{number}.keys.{part}"] for part in range(len(expected)))
        layer.values = tuple(arrays[f"layers.{number}.values.{part}"] for part in range(len(expected)))
