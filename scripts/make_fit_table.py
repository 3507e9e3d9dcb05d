"""Write the README's table of what fits a Mac: for each release and memory the most bits, as `mlxqwen info` sizes them.

    python scripts/make_fit_table.py            # rewrites the table in README.md

What Metal recommends as a working set, and so lets models take, is two thirds of the memory of Macs up to 36 GB and
three quarters of larger ones.
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from make_checkpoint import SHAPES  # noqa: E402

from mlxqwen.device import Device  # noqa: E402
from mlxqwen.model.footprint import Footprint, measure, size_up  # noqa: E402
from tests.sparse_checkpoints import write_sparse  # noqa: E402

MEMORIES = (8, 16, 24, 32, 64, 128, 256, 512)
BITS = (16, 8, 6, 4)
CONTEXT = 8_192
TABLE = re.compile(r"^\| release \| 8 GB .*?(?=\n\n)", re.DOTALL | re.MULTILINE)


def mac(gigabytes: int) -> Device:
    """A Mac with this memory."""
    memory = gigabytes << 30
    usable = memory * 2 // 3 if gigabytes <= 36 else memory * 3 // 4
    return Device(f"Mac, {gigabytes} GB", is_gpu=True, memory=memory, usable_memory=usable)


def most_bits(forms: dict[int, Footprint], device: Device) -> str:
    """The most bits in which a release fits; a dash if it does not in any."""
    fitting = (bits for bits in BITS if size_up(forms[bits], device, tokens=CONTEXT).fits)
    return str(next(fitting, "–"))


def table(releases: Iterable[str] = tuple(SHAPES)) -> str:
    """The table of these releases, in markdown."""
    head = ["release", *(f"{memory} GB" for memory in MEMORIES)]
    rows = [head, ["---", *["---:"] * len(MEMORIES)]]
    with tempfile.TemporaryDirectory() as name:
        for release, config in SHAPES.items():
            forms = {bits: measure(write_sparse(Path(name) / f"{release}-{bits}", config, bits=bits)) for bits in BITS}
            rows.append([release, *(most_bits(forms, mac(memory)) for memory in MEMORIES)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    """Rewrite the table."""
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    readme.write_text(TABLE.sub(table(), text), encoding="utf-8")


if __name__ == "__main__":
    main()
