"""Train, tune, evaluate and plot the demo model.

    python scripts/demo {train,tune,evaluate,plot_budget,plot_stream} [options]

Each command has its own --help.
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

COMMANDS = ("train", "tune", "evaluate", "plot_budget", "plot_stream")


def main(arguments: list[str]) -> int:
    """Run the command that the first argument names → the exit status."""
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help"):
        print(__doc__)
        return 0
    if name not in COMMANDS:
        print(f"demo: {name}: no such command; there are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    sys.argv = [f"demo {name}", *arguments[1:]]
    import_module(f"demo.{name}").main()
    return 0


if __name__ == "__main__":
    scripts = Path(__file__).resolve().parents[1]
    sys.path[:0] = [str(scripts.parent), str(scripts.parent / "convert"), str(scripts)]
    sys.exit(main(sys.argv[1:]))
