"""What one decoded token's graph costs the host, without the work of its kernels."""

from __future__ import annotations

from benchmarks.comparison import Comparison
from benchmarks.primitives import KINDS, compare
from benchmarks.settings import Settings
from benchmarks.sides import MLX_LM

__all__ = ["graph"]


def graph(settings: Settings) -> list[Comparison]:
    """Primitives, and the median time in which the host builds them; see `primitives.py`."""
    rows = []
    for kind in KINDS:
        settings.tell(f"graph, {kind}")
        pairs = [compare(kind, 50 if settings.quick else 200) for _ in range(settings.turns(3, quick=1))]
        what = f"graph of a decoded token, 28 layers, {kind}"
        totals = [[side.total for side in pair] for pair in pairs[:1]]
        rows.append(Comparison(f"{what}: primitives", MLX_LM, "", *map(list, zip(*totals, strict=True))))
        times = [[side.seconds * 1e6 for side in pair] for pair in pairs]
        rows.append(Comparison(f"{what}: host time", MLX_LM, "µs", *map(list, zip(*times, strict=True))))
    return rows
