"""One layer's keys and values, and attention over them."""

from __future__ import annotations

import mlx.core as mx

from mlxqwen.cache.by_head import attend_by_head, attend_token
from mlxqwen.cache.placement import Step
from mlxqwen.cache.storage import PlainStorage, Storage, Stored
from mlxqwen.device import current_device
from mlxqwen.model.rope import Rope, turned

__all__ = ["KVLayer"]

# Numbers: of a chunk's queries on a long context there would be hundreds of megabytes. A GPU takes the next block up
# while the last one is still computed, and needs more work at a time.
_MOST_SCORES = 1 << 21
_MOST_SCORES_ON_GPU = 1 << 23
_SMALLEST_BLOCK = 16  # queries
_MUCH = 1 << 22
"""Multiplications of attention from which on it is computed by heads."""
_NOTHING: tuple[Stored, Stored] = (), ()


class KVLayer:
    """The cache of one attention layer. `plan` is the step, which all layers share."""

    def __init__(self, storage: Storage, keep: int, rope: Rope | None = None) -> None:
        self.storage = storage
        self.keep = keep
        self.rope = rope
        self._device = current_device()
        self._is_plain = isinstance(storage, PlainStorage)
        self._by_head = self._is_plain and self._device.attends_by_head
        self._by_powers = self._by_head and self._device.multiplies_by_openblas
        self.keys: Stored = ()
        self.values: Stored = ()
        self.unstored = _NOTHING  # of the last step, if its plan stores later
        self.plan = Step(offset=0, length=0, visible=0, capacity=0)

    @property
    def position(self) -> mx.array:
        """See `mlxqwen.model.attention.LayerCache`."""
        return self.plan.position

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers, filled or not."""
        return sum(part.nbytes for part in (*self.keys, *self.values))

    def has_room(self, capacity: int) -> bool:
        """Whether there are buffers of so many slots."""
        return bool(self.values) and self.values[0].shape[2] >= capacity

    def rotate(self, x: mx.array, rope: Rope) -> mx.array:
        """See `mlxqwen.model.attention.LayerCache`."""
        plan = self.plan
        return rope(x, plan.offset) if self._device.has_fast_kernels else turned(x, plan.turns(rope))

    def attend(
        self, queries: mx.array, rotated: mx.array, keys: mx.array, values: mx.array, rope: Rope, scale: float
    ) -> mx.array:
        """See `mlxqwen.model.attention.LayerCache`."""
        plan = self.plan
        if plan.is_plain_token and self._is_plain and self.values and self.values[0].shape[2] >= plan.capacity:
            # What most steps are, and all of it in one place: each call more would count once a layer.
            (all_keys,), (all_values,) = self.keys, self.values
            new, visible = plan.new_slots, plan.visible_slots
            all_keys[new], all_values[new] = keys, values
            self.unstored = _NOTHING
            all_keys, all_values = all_keys[visible], all_values[visible]
            if self._by_head and rotated.dtype == mx.float32:
                if 2 * rotated.size * plan.visible >= _MUCH:
                    return attend_by_head(rotated, all_keys, all_values, plan, scale, self._device)
                if self._by_powers:
                    return attend_token(rotated, all_keys, all_values, plan.mask_array, scale)
            return mx.fast.scaled_dot_product_attention(rotated, all_keys, all_values, scale=scale, mask=plan.mask)
        new_keys, new_values = self.storage.encode(keys), self.storage.encode(values)
        self.keys, seen_keys = _store(self.keys, new_keys, plan)
        self.values, seen_values = _store(self.values, new_values, plan)
        self.unstored = (new_keys, new_values) if plan.stores_later else _NOTHING
        length = plan.length
        if self._by_head and plan.sink_positions is None and self._is_much(rotated, plan):
            return attend_by_head(rotated, seen_keys[0], seen_values[0], plan, scale, self._device)
        size = 1 if length == 1 else self._block(queries, seen_keys)
        if length <= size:
            return self._look(queries, rotated, seen_keys, seen_values, plan, rope, scale)
        outputs = []
        for start in range(0, length, size):
            part = plan.part(start, min(start + size, length))
            some = slice(start, start + size)
            seen = slice(None) if part.visible == plan.visible else slice(part.visible)
            keys_seen, values_seen = _slots(seen_keys, seen), _slots(seen_values, seen)
            outputs.append(
                self._look(queries[:, :, some], rotated[:, :, some], keys_seen, values_seen, part, rope, scale)
            )
            mx.async_eval(outputs[-1])
            # MLX allocates what it has been asked for: all blocks at once, if it is let
            mx.eval(outputs[:-1] if self._device.overlaps_steps else outputs)
        return mx.concatenate(outputs, axis=2)

    def _is_much(self, queries: mx.array, plan: Step) -> bool:
        """Whether attention of queries in float32 is worth more steps of MLX's; with OpenBLAS that of any prompt is."""
        if queries.dtype != mx.float32:
            return False
        prompt = plan.length > 1 and self._by_powers
        return prompt or 2 * queries.size * plan.visible >= _MUCH

    def _block(self, queries: mx.array, seen: Stored) -> int:
        """How many queries to look from at a time, so that their scores take little memory."""
        B, heads, L, _ = queries.shape
        kernel = self.plan.sink_positions is None and self._is_plain
        if kernel and self._device.fuses_attention:
            return L
        most = _MOST_SCORES_ON_GPU if self._device.is_gpu else _MOST_SCORES
        return max(_SMALLEST_BLOCK, most // (B * heads * seen[0].shape[-2]))

    def _look(
        self, queries: mx.array, rotated: mx.array, keys: Stored, values: Stored, plan: Step, rope: Rope, scale: float
    ) -> mx.array:
        """Attention of queries, which are also given rotated to where they stand, on stored keys and values."""
        if plan.sink_positions is None and self._is_plain:
            if self._by_powers and plan.length == 1 and rotated.dtype == mx.float32:
                return attend_token(rotated, keys[0], values[0], plan.mask_array, scale)
            return mx.fast.scaled_dot_product_attention(rotated, keys[0], values[0], scale=scale, mask=plan.mask)
        B, heads, L, head_dim = rotated.shape
        kv_heads = keys[0].shape[1]

        def scores(queries: mx.array, keys: Stored) -> mx.array:
            grouped = (queries * scale).reshape(B, kv_heads, heads // kv_heads * L, head_dim)
            return self.storage.scores(grouped, keys)

        if plan.sink_positions is None:
            logits = scores(rotated, keys)
        else:
            at_sinks = rope.at(queries, plan.sink_positions)
            if plan.sinks is None:
                sinks, window = _slots(keys, slice(self.keep)), _slots(keys, slice(self.keep, None))
                logits = mx.concatenate([scores(at_sinks, sinks), scores(rotated, window)], axis=-1)
            else:
                logits = mx.where(plan.sinks, scores(at_sinks, keys), scores(rotated, keys))
        if plan.mask_array is not None:
            by_head = logits.reshape(B, kv_heads, heads // kv_heads, L, -1)
            by_head = mx.where(plan.mask_array[:, :, None], by_head, -mx.inf)
            logits = by_head.reshape(logits.shape)
        weights = mx.softmax(logits, axis=-1, precise=True)
        return self.storage.mix(weights, values).reshape(B, heads, L, head_dim)

    def store(self, start: int, stop: int, slot: int) -> None:
        """Put tokens `start` to `stop` of a step that stores later into the slots from `slot` on."""
        keys, values = (_slots(new, slice(start, stop)) for new in self.unstored)
        plan = Step(offset=0, length=stop - start, visible=0, capacity=self.plan.capacity, write_at=slot)
        self.keys, self.values = _store(self.keys, keys, plan)[0], _store(self.values, values, plan)[0]


def _slots(stored: Stored, slots: slice) -> Stored:
    return tuple(part[..., slots, :] for part in stored)


def _store(stored: Stored, new: Stored, plan: Step) -> tuple[Stored, Stored]:
    """Put `new` where the plan says → (the buffers, what the queries look at)."""
    if plan.stores_later:
        return stored, _beside(stored, new, plan.visible)
    if plan.gather is not None:
        whole, slots = _beside(stored, new, plan.visible), plan.gather[:, None, :, None]
        return tuple(mx.take_along_axis(part, slots, axis=2) for part in whole), whole
    buffers = stored if stored and stored[0].shape[2] >= plan.capacity else _with_room(stored, new, plan.capacity)
    if isinstance(plan.write_at, mx.array):
        pairs = zip(buffers, new, strict=True)
        buffers = tuple([mx.put_along_axis(buffer, plan.slots_like(part), part, axis=2) for buffer, part in pairs])
    else:
        for buffer, part in zip(buffers, new, strict=True):
            buffer[plan.new_slots] = part
    if plan.visible == buffers[0].shape[2]:
        return buffers, buffers
    return buffers, tuple([buffer[plan.visible_slots] for buffer in buffers])


def _beside(stored: Stored, new: Stored, visible: int) -> Stored:
    """The stored slots that queries look at, and `new` behind them."""
    if not stored:
        return new
    return tuple(mx.concatenate([old[:, :, :visible], part], axis=2) for old, part in zip(stored, new, strict=True))


def _with_room(stored: Stored, like: Stored, capacity: int) -> Stored:
    """Buffers of `capacity` slots that begin with what is stored."""
    filled = stored[0].shape[2] if stored else 0
    rooms = [mx.zeros((*part.shape[:2], capacity - filled, part.shape[3]), dtype=part.dtype) for part in like]
    return _beside(stored, tuple(rooms), filled)
