"""What `scripts/bench` measures, one concept a file. Nothing here imports MLX or mlx-lm before a part is run."""
