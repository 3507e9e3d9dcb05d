"""Which slot a token goes to in a key/value cache, and which slots a query may see.

A slot knows the absolute position of its token, so masks follow from positions alone, never from how a prompt was cut
into chunks. A plan is made once a step and shared by all layers. Shapes: `B` rows, `L` new tokens a row, `S` slots.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import cast

import mlx.core as mx

from mlxqwen.model.rope import Rope, Turns, turns

__all__ = ["LinearPlacement", "Placement", "RingPlacement", "Step", "slots_to_allocate"]

_GROWTH = 256  # slots; buffers grow by multiples of this


def slots_to_allocate(length: int, window: int | None) -> int:
    """Slots of buffers for `length` tokens a row: whole growth steps, never more than the window."""
    rounded = -(-length // _GROWTH) * _GROWTH
    return rounded if window is None else min(rounded, window)


@dataclass
class Step:
    """What every layer does with the next `L` tokens.

    Args:
        offset: the position of the first new token, one for all rows or int32 `[B]`.
        length: `L`.
        visible: how many stored slots the queries look at.
        capacity: how many slots the buffers must have.
        write_at: the slot of the first new token (the others follow), or the slots of all, int32 `[B, L]`; unused
            with `gather`.
        gather: int32 `[B, slots]`; the queries look at the stored slots *and* the new tokens behind them, and
            afterwards slot `s` keeps entry `gather[:, s]` of that whole. Used where new tokens push out old ones that
            earlier queries of the same chunk still see.
        mask: `[B, 1, L, S]` booleans, or "causal" (the last query sees all), or None (every query sees all).
        sink_positions: int32 `[B, L]`: where queries stand when they look at the sinks, if that is not where they stand
            for everything else.
        sinks: `[B, 1, 1, S]` booleans: which slots hold sinks, if those are not the first ones of every row.
        stores_later: the queries look at the stored slots and the new tokens behind them, as with `gather`, but nothing
            is stored: which of the new tokens stay is not known yet.
    """

    offset: int | mx.array
    length: int
    visible: int
    capacity: int
    write_at: int | mx.array = 0
    gather: mx.array | None = None
    mask: mx.array | str | None = None
    sink_positions: mx.array | None = None
    sinks: mx.array | None = None
    stores_later: bool = False
    _turns: tuple[Rope, Turns] | None = field(default=None, init=False, repr=False, compare=False)
    _slots: mx.array | None = field(default=None, init=False, repr=False, compare=False)

    @cached_property
    def position(self) -> mx.array:
        """`offset` as int32."""
        return self.offset if isinstance(self.offset, mx.array) else mx.array(self.offset, dtype=mx.int32)

    @cached_property
    def is_plain_token(self) -> bool:
        """Whether each row's one token is written into the same slot and seen with some of the slots before it."""
        moves = self.gather is not None or self.stores_later or isinstance(self.write_at, mx.array)
        return self.length == 1 and not moves and self.sink_positions is None

    @cached_property
    def new_slots(self) -> tuple[slice, ...]:
        """Where the new tokens go in a buffer `[B, heads, S, …]`, if `write_at` is one slot."""
        return slice(None), slice(None), slice(self.write_at, self.write_at + self.length)

    @cached_property
    def visible_slots(self) -> tuple[slice, ...]:
        """What queries look at of a buffer `[B, heads, S, …]`."""
        return slice(None), slice(None), slice(self.visible)

    def turns(self, rope: Rope) -> Turns:
        """What the new tokens are rotated by, made once for all layers."""
        if self._turns is None or self._turns[0] is not rope:
            self._turns = rope, turns(rope.wavelengths, self.offset, self.length)
        return self._turns[1]

    def slots_like(self, new: mx.array) -> mx.array:
        """The slots `write_at` in the shape of new tokens `[B, heads, L, …]`, made once for all layers."""
        if self._slots is None or self._slots.shape != new.shape:
            self._slots = mx.broadcast_to(cast(mx.array, self.write_at)[:, None, :, None], new.shape)
        return self._slots

    @cached_property
    def mask_array(self) -> mx.array | None:
        """`mask` with "causal" spelled out."""
        if not isinstance(self.mask, str):
            return self.mask
        slots = mx.arange(self.visible)
        queries = mx.arange(self.visible - self.length, self.visible)
        return (slots[None, :] <= queries[:, None])[None, None]

    def part(self, start: int, stop: int) -> Step:
        """The plan for the queries `start` to `stop` alone; in a line without the slots after them."""
        if isinstance(self.mask, str):
            return replace(self, length=stop - start, visible=self.visible - self.length + stop)
        mask = None if self.mask is None else self.mask[:, :, start:stop]
        sink_positions = None if self.sink_positions is None else self.sink_positions[:, start:stop]
        return replace(self, length=stop - start, mask=mask, sink_positions=sink_positions)


class Placement(ABC):
    """The positions that rows have reached, and the plan for the next tokens."""

    window: int | None = None
    keep: int = 0

    def __init__(self, batch_size: int) -> None:
        self.offsets = [0] * batch_size
        self.reserved = 0

    def slots_for(self, length: int) -> int:
        """Slots that a row of `length` tokens fills."""
        return length if self.window is None else min(length, self.window)

    def advance(self, length: int, lengths: Sequence[int] | None) -> Step:
        """Plan for `length` more tokens a row, of which the first `lengths[b]` of row `b` count, and move there."""
        lengths = [length] * len(self.offsets) if lengths is None else list(lengths)
        step = self._plan(length, lengths)
        self.offsets = [offset + count for offset, count in zip(self.offsets, lengths, strict=True)]
        return step

    def plan_tentative(self, length: int) -> Step:
        """Plan for `length` more tokens a row of which any number may stay: no filled slot is written to.

        The positions do not change. All rows must be at one position.
        """
        return self._plan(length, [length] * len(self.offsets))

    def runs(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """The positions from `start` to `stop` as runs of consecutive slots: first position, end, first slot."""
        yield start, stop, start

    def can_trim_to(self, length: int) -> bool:
        """Whether all of the first `length` tokens of every row are held."""
        return length <= min(self.offsets)

    @abstractmethod
    def _plan(self, length: int, lengths: list[int]) -> Step:
        """The step for `length` more tokens a row, of which `lengths[b]` count. The positions do not change."""

    def _plan_line(self, length: int, lengths: list[int]) -> Step:
        """Token `p` in slot `p`. Padding goes to slots that later tokens overwrite before anyone sees them."""
        end = max(self.offsets) + length
        capacity = self.capacity_for(end)
        if len(set(self.offsets)) == 1 and min(lengths) == length:
            causal = "causal" if length > 1 else None
            return Step(self.offsets[0], length, end, capacity, write_at=self.offsets[0], mask=causal)
        offset = mx.array(self.offsets, dtype=mx.int32)
        positions = offset[:, None] + mx.arange(length)
        mask = mx.arange(end)[None, None, :] <= positions[:, :, None]
        return Step(offset, length, end, capacity, write_at=positions, mask=mask[:, None])

    def capacity_for(self, slots: int) -> int:
        """Slots to allocate so that `slots` fit: whole growth steps, what was reserved, never more than the window."""
        return slots_to_allocate(max(slots, self.reserved), self.window)


class LinearPlacement(Placement):
    """Every token stays; the buffers grow in steps."""

    def _plan(self, length: int, lengths: list[int]) -> Step:
        return self._plan_line(length, lengths)


class RingPlacement(Placement):
    """The first `keep` tokens (sinks) and the last `window - keep`: the query at `i` sees `j <= i` where
    `i - j < window - keep or j < keep`.

    Up to `window` tokens this is a line. Beyond, the slots after the sinks are a ring, and queries look at the sinks as
    if they stood at position `window - 1`, so that the distance stays within what the model was trained on (Xiao et
    al., "Efficient Streaming Language Models with Attention Sinks", 2023).

    A stream may be of any length, but RoPE's angles are float32: beyond some ten million tokens they are off by so much
    that neighbouring positions blur.
    """

    def __init__(self, batch_size: int, window: int, keep: int) -> None:
        super().__init__(batch_size)
        self.window: int = window
        self.keep = keep

    def can_trim_to(self, length: int) -> bool:
        dropped = max(self.offsets) > self.window
        return super().can_trim_to(length) and (length == 0 or not dropped or set(self.offsets) == {length})

    def _plan(self, length: int, lengths: list[int]) -> Step:
        if max(self.offsets) + length <= self.window:
            return self._plan_line(length, lengths)
        uniform = len(set(self.offsets)) == 1 and min(lengths) == length
        offset = mx.array(self.offsets, dtype=mx.int32)
        step = self._beyond_window(offset, length, uniform)
        if length == 1 and min(lengths) == 1:
            self._plan_decode(step, offset, uniform)
        else:
            self._plan_view(step, offset)
            self._plan_gather(step, offset, lengths)
        return step

    def plan_tentative(self, length: int) -> Step:
        if max(self.offsets) + length <= self.window:
            return super().plan_tentative(length)
        offset = mx.array(self.offsets, dtype=mx.int32)
        step = self._beyond_window(offset, length, uniform=True)
        self._plan_view(step, offset)
        step.stores_later = True
        return step

    def runs(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        while start < stop:
            slot = self._slot(start)
            end = min(stop, start + self.window - slot)  # the ring's last slot, or the line's
            yield start, end, slot
            start = end

    def _beyond_window(self, offset: mx.array, length: int, uniform: bool) -> Step:
        """The fields that all steps beyond the window have."""
        step = Step(
            offset=self.offsets[0] if uniform else offset,
            length=length,
            visible=self.slots_for(max(self.offsets)),
            capacity=self.window,
        )
        if self.keep:
            step.sink_positions = mx.minimum(offset[:, None] + mx.arange(length), self.window - 1)
        return step

    def _plan_decode(self, step: Step, offset: mx.array, uniform: bool) -> None:
        """One token a row: it takes the slot of the one token that it no longer sees."""
        step.visible = self.window
        if uniform:
            step.write_at = self._slot(self.offsets[0])
            return
        step.write_at = mx.array([[self._slot(o)] for o in self.offsets], dtype=mx.int32)
        step.mask = (self._slot_positions(offset + 1, self.window) >= 0)[:, None, None]

    def _plan_view(self, step: Step, offset: mx.array) -> None:
        """Several tokens: some query still sees each old slot, so attention comes before storing."""
        positions = offset[:, None] + mx.arange(step.length)
        stored = self._slot_positions(offset, step.visible)
        seen = mx.concatenate([stored, positions], axis=1)[:, None, :]
        queries = positions[:, :, None]
        in_window = (queries - seen < self.window - self.keep) | (seen < self.keep)
        step.mask = ((seen >= 0) & (seen <= queries) & in_window)[:, None]
        if min(self.offsets) < min(self.keep, max(self.offsets)):  # a shorter row's sinks are among the new tokens
            step.sinks = (seen < self.keep)[:, None]

    def _plan_gather(self, step: Step, offset: mx.array, lengths: list[int]) -> None:
        """Which of the old slots and new tokens each slot holds afterwards."""
        stored = step.visible
        slots = self.slots_for(max(o + n for o, n in zip(self.offsets, lengths, strict=True)))
        end = offset + mx.array(lengths, dtype=mx.int32)
        will_hold = self._slot_positions(end, slots)
        from_chunk = stored + will_hold - offset[:, None]
        from_store = mx.minimum(mx.arange(slots), max(stored - 1, 0))
        step.gather = mx.where(will_hold >= offset[:, None], from_chunk, from_store).astype(mx.int32)

    def _slot(self, position: int) -> int:
        if position < self.keep:
            return position
        return self.keep + (position - self.keep) % (self.window - self.keep)

    def _slot_positions(self, end: mx.array, slots: int) -> mx.array:
        """The positions in the first `slots` slots of rows with `end` `[B]` tokens; −1 in empty slots."""
        slot, last = mx.arange(slots)[None, :], end[:, None] - 1
        newest = last - mx.remainder(last - slot, self.window - self.keep)
        positions = mx.where(slot < self.keep, slot, newest)
        return mx.where((positions >= slot) & (slot <= last), positions, -1)
