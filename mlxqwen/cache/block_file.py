"""A file of consecutive blocks: a checked header, then the data of one block after the other.

    magic (16 bytes) | length of the header (uint32) | xxh3_128 of the header (16 bytes) | header, JSON | blocks

The header has the key before the first block (a hash of the model, the kind of cache and all tokens before), the
tokens, the dtypes and shapes of a block's parts, and a digest of each block. So the first blocks of a run can be used
without reading the others.
"""

from __future__ import annotations

import io
import json
import math
import os
import stat
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
from xxhash import xxh3_128

from mlxqwen.cache.blocks import BLOCK
from mlxqwen.cache.chain import KEY_BYTES, TokenChain
from mlxqwen.cache.storage import Stored

__all__ = ["BlockRun", "DamagedRunError", "encode_header", "open_run", "payloads"]

_MAGIC = b"mlxqwen-blocks-1"
_PREFIX = struct.Struct("<16sI16s")
_MAX_HEADER = 1 << 24
_BLOCK_TOKEN_BYTES = 4 * BLOCK
_DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16, "uint32": mx.uint32}


class DamagedRunError(Exception):
    """The file is no run of blocks, or has changed since it was written."""


@dataclass(frozen=True, slots=True)
class _Part:
    dtype: mx.Dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return self.dtype.size * math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class BlockRun:
    """An open run of blocks with a valid header. It has to be closed.

    Attributes:
        before: the key before the first block.
        tokens: int32 ids of each block.
        file: at any position.
    """

    before: bytes
    tokens: Sequence[bytes]
    file: io.FileIO
    _digests: Sequence[bytes]
    _parts: Sequence[_Part]
    _start: int

    def common(self, chain: TokenChain, number: int) -> int:
        """How many of its blocks equal those of `chain` from block `number` on."""
        if self.before != chain.before(number):
            return 0
        most = min(len(self.tokens), len(chain) - number)
        return next((n for n in range(most) if self.tokens[n] != chain.block(number + n)), most)

    def read(self, start: int, stop: int) -> Iterator[Stored]:
        """Read the blocks `start` to `stop`, each checked; evaluated.

        Raises:
            DamagedRunError: a block is not as it was written.
            OSError: the file cannot be read.
        """
        nbytes = sum(part.nbytes for part in self._parts)
        self.file.seek(self._start + start * nbytes)
        buffer = bytearray(nbytes)
        for number in range(start, stop):
            if self.file.readinto(buffer) != nbytes or xxh3_128(buffer).digest() != self._digests[number]:
                raise DamagedRunError("a block's numbers are not those that were written")
            parts, place = [], 0
            for part in self._parts:
                with memoryview(buffer) as view:
                    raw = mx.array(cast(Any, view[place : place + part.nbytes]))
                parts.append(raw.view(part.dtype).reshape(part.shape))
                place += part.nbytes
            mx.eval(parts)
            yield tuple(parts)

    def close(self) -> None:
        """Close the file."""
        self.file.close()


def encode_header(chain: TokenChain, number: int, blocks: Sequence[Stored]) -> bytes:
    """The bytes before the data of `blocks`, which are those of `chain` from block `number` on."""
    digests = []
    for block in blocks:
        digest = xxh3_128()
        for view in payloads(block):
            digest.update(view)
        digests.append(digest.digest())
    header = {
        "before": chain.before(number).hex(),
        "tokens": b"".join(chain.block(number + n) for n in range(len(blocks))).hex(),
        "parts": [[_name(part.dtype), list(part.shape)] for part in blocks[0]],
        "digests": b"".join(digests).hex(),
    }
    coded = json.dumps(header).encode()
    return _PREFIX.pack(_MAGIC, len(coded), xxh3_128(coded).digest()) + coded


def payloads(block: Stored) -> list[memoryview]:
    """The data of a block's parts, without a copy."""
    raw = [part.reshape(-1).view(mx.uint8) for part in block]
    mx.eval(raw)
    return [memoryview(cast(Any, part)) for part in raw]


def open_run(path: Path) -> BlockRun | None:
    """Open a file and check its header; None if this user has no such file.

    Raises:
        DamagedRunError: the file is no run, is cut short, or its header is not as it was written.
        OSError: it cannot be read.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    file = io.FileIO(descriptor)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
            file.close()
            return None
        return _parse(file, status.st_size)
    except BaseException:
        file.close()
        raise


def _parse(file: io.FileIO, size: int) -> BlockRun:
    prefix = file.read(_PREFIX.size)
    if len(prefix) < _PREFIX.size:
        raise DamagedRunError("it is cut short")
    magic, length, digest = _PREFIX.unpack(prefix)
    if magic != _MAGIC or length > min(_MAX_HEADER, size):
        raise DamagedRunError("it does not begin as it should")
    coded = file.read(length)
    if xxh3_128(coded).digest() != digest:
        raise DamagedRunError("its header is not the one that was written")
    try:
        header = json.loads(coded)
        tokens, digests = bytes.fromhex(header["tokens"]), bytes.fromhex(header["digests"])
        parts = [_Part(_DTYPES[name], tuple(shape)) for name, shape in header["parts"]]
        if not all(type(n) is int and 0 < n < 1 << 40 for part in parts for n in part.shape):
            raise ValueError("a shape that is none")
        run = BlockRun(
            before=bytes.fromhex(header["before"]),
            tokens=[tokens[n : n + _BLOCK_TOKEN_BYTES] for n in range(0, len(tokens), _BLOCK_TOKEN_BYTES)],
            file=file,
            _digests=[digests[n : n + KEY_BYTES] for n in range(0, len(digests), KEY_BYTES)],
            _parts=parts,
            _start=_PREFIX.size + length,
        )
        is_whole = size == run._start + len(run.tokens) * sum(part.nbytes for part in parts)
    except (ValueError, KeyError, TypeError, RecursionError):
        raise DamagedRunError("its header says nothing") from None
    if not is_whole or not run.tokens or len(run.tokens) != len(run._digests):
        raise DamagedRunError("it is cut short, or longer than it should be")
    return run


def _name(dtype: mx.Dtype) -> str:
    return str(dtype).rpartition(".")[2]
