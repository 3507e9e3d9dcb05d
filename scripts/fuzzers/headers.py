"""Safetensors headers: what is read here, the format's own reader reads, with the same tensors."""

from __future__ import annotations

import json
import random
import struct
import tempfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from mlxqwen.errors import MlxqwenError
from mlxqwen.files.checkpoint import read_header

_DTYPES = {"F32": 4, "BF16": 2, "U8": 1, "I32": 4, "F8_E4M3": 1}
_ODD: list[Any] = [-1, 1 << 63, 1 << 64, 1.5, "1", None, [], {}, True, "F32", "X", 0, 2]


def make_file(seed: int) -> bytes:
    """A file of a few tensors, of which most are changed somewhere."""
    draw = random.Random(seed)
    header: dict[str, Any] = {}
    end = 0
    for number in range(draw.randrange(4)):
        dtype = draw.choice(list(_DTYPES))
        shape = [draw.randrange(4) for _ in range(draw.randrange(3))]
        size = _DTYPES[dtype]
        for side in shape:
            size *= side
        header[draw.choice(["a", "é", "model.x"]) + str(number)] = {
            "dtype": dtype,
            "shape": shape,
            "data_offsets": [end, end + size],
        }
        end += size
    if draw.random() < 0.3:
        header["__metadata__"] = draw.choice([{"format": "mlx"}, {}, {"a": 1}, [], None])
    for _ in range(draw.randrange(3)):
        if not header:
            break
        name = draw.choice(list(header))
        entry = header[name]
        kind = draw.randrange(5)
        if kind == 0 or not isinstance(entry, dict) or not entry:
            header[name] = draw.choice(_ODD)
        elif kind == 1:
            entry[draw.choice(list(entry))] = draw.choice(_ODD)
        elif kind == 2 and isinstance(entry.get("data_offsets"), list) and entry["data_offsets"]:
            place = draw.randrange(len(entry["data_offsets"]))
            entry["data_offsets"][place] = draw.choice([*_ODD, end, end + 1, 1])
        elif kind == 3:
            entry.pop(draw.choice(list(entry)))
        else:
            entry[draw.choice(["more", "dtype"])] = draw.choice(_ODD)
    text = json.dumps(header).encode() + b" " * draw.randrange(9)
    if draw.random() < 0.2:
        text = text.replace(b'"a0"', b'"a1"') if draw.random() < 0.5 else text[: draw.randrange(len(text) + 1)]
    length = len(text) + (draw.choice([1, -1, 1 << 40]) if draw.random() < 0.1 else 0)
    return struct.pack("<Q", max(length, 0)) + text + bytes(max(end + draw.choice([0, 0, 0, 1, -1]), 0))


def check(seed: int) -> str | None:
    """What broke: a file that is read here alone, or with other tensors. None if nothing."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.safetensors")
        path.write_bytes(make_file(seed))
        try:
            tensors, _ = read_header(path)
        except MlxqwenError:
            return None
        try:
            with safe_open(path, framework="numpy") as theirs:
                expected = {name: tuple(theirs.get_slice(name).get_shape()) for name in theirs.keys()}  # noqa: SIM118
        except (SafetensorError, ValueError) as error:
            return f"read, but safetensors says {error}"
    found = {name: tuple(info.shape) for name, info in tensors.items()}
    return None if found == expected else f"found {found}, expected {expected}"
