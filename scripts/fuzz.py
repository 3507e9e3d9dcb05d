"""Try random input by seeds, and print each seed that breaks a rule.

    scripts/fuzz NAME [--seconds N] [--seed S]     NAME is a module of scripts/fuzzers, or all

Each fuzzer has `check(seed)`, which makes one input and says what it broke, or None. The exit status is 1 if a rule was
broken. CI runs all of them for a minute together; an hour by hand begins at another seed.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import sys
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).parent.parent
MOST_SHOWN = 5  # of one fuzzer
NAMES = sorted(path.stem for path in (ROOT / "scripts" / "fuzzers").glob("[!_]*.py"))


def run(name: str, seconds: float, first: int) -> int:
    """Try seeds from `first` on until the time is over → how many broke a rule."""
    check = importlib.import_module(f"fuzzers.{name}").check
    until, seed, broken = time.monotonic() + seconds, first, 0
    while seed == first or time.monotonic() < until:
        try:
            problem = check(seed)
        except Exception:
            problem = traceback.format_exc()
        if problem is not None:
            broken += 1
            if broken <= MOST_SHOWN:
                print(f"{name}: seed {seed}: {problem}", flush=True)
        seed += 1
    print(f"{name}: {seed - first:,} tried from seed {first} on, {broken} broke a rule", flush=True)
    return broken


def main() -> int:
    """Run the fuzzers that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=[*NAMES, "all"])
    parser.add_argument("--seconds", type=float, default=60, help="for all of them together")
    parser.add_argument("--seed", type=int, default=0, help="the first")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    sys.path[:0] = [str(ROOT), str(ROOT / "convert"), str(ROOT / "scripts")]
    names = NAMES if options.name == "all" else [options.name]
    return int(sum([run(name, options.seconds / len(names), options.seed) for name in names]) > 0)


if __name__ == "__main__":
    sys.exit(main())
