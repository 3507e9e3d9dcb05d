"""The tests. What is equal to the last bit is so with MLX's own products: `tests/test_blas.py` looks at the others.

Each process computes on one core, since as many test processes run as there are cores: `tests/test_cores.py` looks at
more.
"""

import os

os.environ.setdefault("MLXQWEN_BLAS", "off")
os.environ.setdefault("MLXQWEN_CORES", "1")
