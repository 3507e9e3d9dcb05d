"""The command line: options, printing, exit codes. No logic."""

from __future__ import annotations

import os
import sys

from mlxqwen.cli.terminal import INTERRUPTED, print_error

__all__ = ["main"]

BROKEN_PIPE = 141  # 128 + SIGPIPE


def main() -> None:
    """Run `mlxqwen` and exit: 0, 1 for an error, 2 for usage, 130 for Ctrl-C."""
    try:
        sys.exit(_run())
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        # Whoever read our output has left; say nothing, not even when Python flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(BROKEN_PIPE)


def _run() -> int:
    import click

    from mlxqwen.cli.commands import mlxqwen
    from mlxqwen.errors import MlxqwenError

    try:
        result = mlxqwen.main(prog_name="mlxqwen", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except click.Abort:
        return INTERRUPTED
    except MlxqwenError as error:
        print_error(error.problem, error.hint)
        return 1
    except MemoryError:
        print_error("out of memory", "Use a smaller model, a shorter prompt, --kv-bits 8 or --max-kv-size.")
        return 1
    return int(result or 0)
