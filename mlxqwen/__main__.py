"""`python -m mlxqwen`."""

from mlxqwen.cli import main

main()
