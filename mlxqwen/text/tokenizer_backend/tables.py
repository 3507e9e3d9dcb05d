"""Vocabulary and merges as flat tables, and those as the bytes of a file.

    magic and version       8 bytes
    CRC-32 of all that follows, and bytes of facts, merges and tokens in number: 4 × uint32
    facts                   JSON, UTF-8, padded by blanks to a multiple of 8
    pairs                   uint64 a merge: left id << 32 | right id, ascending
    ranks                   uint32 a merge: that of the pair at the same place
    products                uint32 a merge: what the merge of each rank makes
    starts                  uint32 a token, and one more: where its spelling begins
    spellings               UTF-8: a line feed, and each token of the vocabulary in order of ids with one behind it

Numbers are in the byte order of the machine, which is part of a file's name.
"""

from __future__ import annotations

import json
import struct
import zlib
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["NO_MERGE", "DamagedTablesError", "Tables"]

NO_MERGE = 2**32
"""The rank of pairs that are never merged: behind all others."""

_MAGIC = b"mlxqtok1"
_HEAD = struct.Struct("=8sIIII")


class DamagedTablesError(ValueError):
    """Bytes that are no tables, or not those that were written."""


@dataclass(frozen=True, slots=True)
class Tables:
    """What a tokenizer's JSON says of its vocabulary and merges.

    Args:
        facts: what else must be known; any JSON.
        pairs, ranks, products, starts, spellings: see this module.
    """

    facts: Mapping[str, Any]
    pairs: Sequence[int]
    ranks: Sequence[int]
    products: Sequence[int]
    starts: Sequence[int]
    spellings: bytes

    @classmethod
    def make(
        cls, facts: Mapping[str, Any], tokens: Iterable[str] = (), merges: Iterable[tuple[int, int, int]] = ()
    ) -> Tables:
        """Of tokens in the order of ids, none with a line feed, and merges in that of ranks: left, right, product."""
        spelled = [token.encode() for token in tokens]
        starts = array("I", [1])
        for spelling in spelled:
            starts.append(starts[-1] + len(spelling) + 1)
        rules = list(merges)
        pairs = [left << 32 | right for left, right, _ in rules]
        ranks = sorted(range(len(pairs)), key=pairs.__getitem__)
        return cls(
            facts,
            array("Q", sorted(pairs)),
            array("I", ranks),
            array("I", [product for *_, product in rules]),
            starts,
            b"".join((b"\n", *(spelling + b"\n" for spelling in spelled))),
        )

    @classmethod
    def unpack(cls, data: bytes) -> Tables:
        """Raises `DamagedTablesError`."""
        if len(data) < _HEAD.size:
            raise DamagedTablesError("shorter than its head")
        magic, checksum, facts, merges, tokens = _HEAD.unpack_from(data)
        view = memoryview(data)
        if magic != _MAGIC or checksum != zlib.crc32(view[12:]):
            raise DamagedTablesError("not what was written")
        sections, end = [], _HEAD.size
        for size in (facts, 8 * merges, 4 * merges, 4 * merges, 4 * (tokens + 1)):
            sections.append(view[end : end + size])
            end += size
        if end > len(data):
            raise DamagedTablesError("shorter than its head says")
        described, pairs, ranks, products, starts = sections
        try:
            known = json.loads(bytes(described))
            numbers = pairs.cast("Q"), ranks.cast("I"), products.cast("I"), starts.cast("I")
        except (ValueError, TypeError, RecursionError) as cause:
            raise DamagedTablesError("not in its format") from cause
        if not isinstance(known, dict):
            raise DamagedTablesError("facts that are no object")
        return cls(known, *numbers, data[end:])

    def pack(self) -> bytes:
        """The bytes that `unpack` takes."""
        facts = json.dumps(self.facts).encode()
        facts += b" " * (-len(facts) % 8)
        parts = (facts, *map(bytes, (self.pairs, self.ranks, self.products, self.starts)), self.spellings)
        body = struct.pack("=III", len(facts), len(self.pairs), len(self.starts) - 1) + b"".join(parts)
        return struct.pack("=8sI", _MAGIC, zlib.crc32(body)) + body

    def rank(self, left: int, right: int) -> int:
        """Of the merge of two ids; `NO_MERGE` if there is none."""
        pair = left << 32 | right
        place = bisect_left(self.pairs, pair)
        return self.ranks[place] if place < len(self.pairs) and self.pairs[place] == pair else NO_MERGE

    def spelling(self, token_id: int) -> str | None:
        """A token in the alphabet of byte-level tokens; None beyond the vocabulary."""
        if not 0 <= token_id < len(self.starts) - 1:
            return None
        return self.spellings[self.starts[token_id] : self.starts[token_id + 1] - 1].decode()

    def find(self, token: str) -> int | None:
        """The id of a token, by its spelling."""
        if "\n" in token:
            return None
        place = self.spellings.find(b"\n%b\n" % token.encode())
        return None if place < 0 else bisect_right(self.starts, place)
