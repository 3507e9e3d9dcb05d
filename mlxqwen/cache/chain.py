"""A prompt as a chain of blocks: each has a key, a hash over the key before it and its own tokens."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence

from mlxqwen.cache.blocks import BLOCK

__all__ = ["KEY_BYTES", "TokenChain", "seed"]

KEY_BYTES = 16
_TOKEN_BYTES = array("i").itemsize
_BLOCK_BYTES = BLOCK * _TOKEN_BYTES


def seed(*names: str) -> bytes:
    """The key before the first block: a hash of what must be equal for blocks to be shared."""
    return _hash(repr(names).encode())


class TokenChain:
    """The whole blocks of a list of tokens.

    Args:
        seed: the key before the first block.
        tokens: ids, 32-bit.

    Attributes:
        seed: as given.
        coded: all tokens as int32 bytes, those after the last whole block too.
        keys: the keys of the whole blocks.
    """

    def __init__(self, seed: bytes, tokens: Sequence[int]) -> None:
        self.seed = seed
        self.coded = array("i", tokens).tobytes()
        self.keys: list[bytes] = []
        key = seed
        for number in range(len(tokens) // BLOCK):
            key = _hash(key + self.block(number))
            self.keys.append(key)

    def __len__(self) -> int:
        return len(self.keys)

    def block(self, number: int) -> bytes:
        """The tokens of a block as int32 bytes."""
        return self.coded[number * _BLOCK_BYTES : (number + 1) * _BLOCK_BYTES]

    def before(self, number: int) -> bytes:
        """The key before a block."""
        return self.keys[number - 1] if number else self.seed

    def starts_with(self, other: TokenChain) -> bool:
        """Whether the whole blocks of `other` are the first blocks of this chain."""
        return len(other) <= len(self) and (not other.keys or self.keys[len(other) - 1] == other.keys[-1])


def _hash(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=KEY_BYTES).digest()
