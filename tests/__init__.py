"""The tests. What is equal to the last bit is so with MLX's own products: `tests/test_blas.py` looks at the others."""

import os

os.environ.setdefault("MLXQWEN_BLAS", "off")
