"""What one decoded token's graph costs the host, without the work of its kernels."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.comparison import Comparison, compared
from benchmarks.machine import has_mlx_lm
from benchmarks.primitives import KINDS, graph_costs
from benchmarks.settings import Settings
from benchmarks.sides import MLX_LM

__all__ = ["graph"]


def graph(settings: Settings) -> Iterator[Comparison]:
    """Primitives, and the median time in which the host builds them; see `primitives.py`."""
    names = ["mlxqwen", MLX_LM] if has_mlx_lm() else ["mlxqwen"]
    for kind in KINDS:
        settings.tell(f"graph, {kind}")
        turns = [
            graph_costs(kind, 50 if settings.quick else 200, has_mlx_lm=has_mlx_lm())
            for _ in range(settings.turns(3, quick=1))
        ]
        what = f"graph of a decoded token, 28 layers, {kind}"
        sides = dict(zip(names, zip(*turns, strict=True), strict=True))
        yield from compared(f"{what}: primitives", "", {name: [side[0].total] for name, side in sides.items()})
        times = {name: [cost.seconds * 1e6 for cost in side] for name, side in sides.items()}
        yield from compared(f"{what}: host time", "µs", times)
