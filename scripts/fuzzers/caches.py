"""Files of the disk tier: whatever becomes of their bytes, they give the blocks that were written, or are damaged."""

from __future__ import annotations

import random
import tempfile
from pathlib import Path

import mlx.core as mx

from mlxqwen.cache.block_file import DamagedRunError, encode_header, open_run, payloads
from mlxqwen.cache.blocks import BLOCK
from mlxqwen.cache.chain import TokenChain

_BLOCKS = 2


def make_run(draw: random.Random) -> tuple[TokenChain, list[tuple[mx.array, ...]], bytes]:
    """A chain, its blocks, and the bytes of their file."""
    chain = TokenChain(bytes(16), [draw.randrange(99) for _ in range(BLOCK * _BLOCKS)])
    shape = (1, 2, BLOCK, 4)
    blocks = [
        tuple(mx.array([draw.random() for _ in range(2 * BLOCK * 4)]).reshape(shape) for _ in range(2))
        for _ in range(_BLOCKS)
    ]
    data = encode_header(chain, 0, blocks) + b"".join(bytes(view) for block in blocks for view in payloads(block))
    return chain, blocks, data


def damaged(draw: random.Random, data: bytes) -> bytes:
    """The bytes with a few changes: flipped bits, cuts, insertions, stretches moved."""
    changed = bytearray(data)
    for _ in range(draw.randrange(1, 4)):
        place = draw.randrange(len(changed)) if changed else 0
        kind = draw.randrange(4)
        if kind == 0 and changed:
            changed[place] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del changed[place : place + draw.randrange(1, 99)]
        elif kind == 2:
            changed[place:place] = draw.randbytes(draw.randrange(1, 9))
        else:
            changed[place:] = changed[: draw.randrange(len(changed) + 1)]
    return bytes(changed)


def check(seed: int) -> str | None:
    """What broke: other blocks than were written, or another error. None if nothing."""
    draw = random.Random(seed)
    chain, blocks, data = make_run(draw)
    changed = data if seed % 16 == 0 else damaged(draw, data)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "run")
        path.write_bytes(changed)
        try:
            run = open_run(path)
            if run is None:
                return "no file was found"
            try:
                common = run.common(chain, 0)
                read = list(run.read(0, common))
            finally:
                run.close()
        except DamagedRunError as error:
            return str(error) if changed == data else None
    same = all(
        mx.array_equal(a, b).item()
        for found, block in zip(read, blocks, strict=False)
        for a, b in zip(found, block, strict=True)
    )
    return None if same else "other blocks than were written"
