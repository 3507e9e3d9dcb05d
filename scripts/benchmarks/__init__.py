"""What `scripts/bench` measures, one concept a file. Nothing here imports MLX or mlx-lm before a part is run."""

import mlxqwen  # noqa: F401  # before MLX, so that both sides have the same BLAS: see mlxqwen.blas
