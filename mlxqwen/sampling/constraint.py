"""Constraints: which tokens may come next in a reply, and which token replaces the one drawn."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Protocol, TypeAlias, runtime_checkable

import mlx.core as mx

from mlxqwen.errors import GenerationError

__all__ = [
    "Constraint",
    "Finishing",
    "Mask",
    "Unconstrained",
    "apply_masks",
    "check_mask",
    "check_mask_shape",
    "mask_of_bytes",
    "pack_mask",
]

_BITS = 32

Mask: TypeAlias = mx.array
"""Packed bits of tokens; see `Constraint.mask`."""


class Constraint(Protocol):
    """The constraint of one reply, with its state. For each token: `mask`, draw, `settle`, then `advance`."""

    def mask(self) -> Mask | None:
        """The tokens that may come next: uint32 words `[ceil(V / 32)]`, token t is bit t % 32 of word t // 32.

        None allows every token.
        """

    def settle(self, drawn: int) -> int:
        """The token to use where `drawn` was drawn. The same until the next `advance`; BAD_TOKEN stays BAD_TOKEN."""

    def advance(self, token: int) -> None:
        """The reply goes on with `token`."""

    def fork(self) -> Constraint:
        """An independent copy that checks guesses: only `mask`, `advance` and `fork` of it are called."""


@runtime_checkable
class Finishing(Protocol):
    """What a `Constraint` may have, too: it brings the reply to its own end before the tokens are used up.

    Attributes:
        was_cut_short: whether it has replaced a draw for that.
    """

    was_cut_short: bool

    def end_within(self, tokens: int) -> None:
        """Called before the first token with the most tokens of the reply."""


class Unconstrained:
    """The constraint that allows everything and changes nothing."""

    def mask(self) -> None:
        """None: every token is allowed."""

    def settle(self, drawn: int) -> int:
        """`drawn` itself."""
        return drawn

    def advance(self, token: int) -> None:
        """Do nothing: there is no state."""

    def fork(self) -> Unconstrained:
        """The same object: there is no state."""
        return self


def pack_mask(tokens: Collection[int], vocab_size: int) -> mx.array:
    """The mask that allows `tokens`, ids below `vocab_size`."""
    words = [0] * -(-vocab_size // _BITS)
    for token in tokens:
        words[token // _BITS] |= 1 << token % _BITS
    return mx.array(words, dtype=mx.uint32)


def mask_of_bytes(packed: bytes | bytearray, vocab_size: int) -> mx.array:
    """The mask whose words are these bytes, least significant first; bytes behind the last word are left out."""
    words: Any = memoryview(packed).cast("I")[: -(-vocab_size // _BITS)]
    return mx.array(words)


def apply_masks(logits: mx.array, masks: Sequence[mx.array | None]) -> mx.array:
    """Logits `[B, V]` with -inf where a row's mask does not allow the token; lazy, one expression for all rows.

    A row whose mask allows nothing is all -inf: the sampler draws BAD_TOKEN there, and `check_mask` names the cause.

    Args:
        masks: one a row, as `Constraint.mask` gives them; rows of None stay as they are.
    """
    if all(mask is None for mask in masks):
        return logits
    words = -(-logits.shape[-1] // _BITS)
    free = mx.full((words,), 2**_BITS - 1, dtype=mx.uint32)
    packed = mx.stack([free if mask is None else mask for mask in masks])
    bits = mx.right_shift(packed[:, :, None], mx.arange(_BITS, dtype=mx.uint32)) & 1
    allowed = bits.reshape(len(masks), -1)[:, : logits.shape[-1]] == 1
    return mx.where(allowed, logits, mx.array(-mx.inf, dtype=logits.dtype))


def check_mask_shape(mask: object, vocab_size: int) -> None:
    """Raise `GenerationError` for what is no packed mask of so many tokens."""
    words = -(-vocab_size // _BITS)
    if not isinstance(mask, mx.array) or mask.shape != (words,) or mask.dtype != mx.uint32:
        found = f"{mask.dtype} of shape {mask.shape}" if isinstance(mask, mx.array) else type(mask).__name__
        raise GenerationError(
            f"constraint: found a mask that is {found}, expected uint32 of shape ({words},)",
            hint="pack_mask(tokens, vocab_size) makes one.",
        )


def check_mask(mask: mx.array, vocab_size: int) -> None:
    """Raise `GenerationError` if `mask` allows no token below `vocab_size`."""
    last = vocab_size % _BITS
    kept = mx.full((-(-vocab_size // _BITS),), 2**_BITS - 1, dtype=mx.uint32)
    if last:
        kept[-1] = 2**last - 1
    if not mx.any(mask & kept).item():
        raise GenerationError(
            "constraint: found no token that it allows, expected at least one",
            hint="The constraint cannot be met from here on: loosen it, or allow an end token.",
        )
