"""The command line: options, printing, exit codes.

Arguments and files go in; answers go to standard output, all else to standard error. The work is done by
`mlxqwen.engine` and `mlxqwen_convert`: nothing here decides what a model answers or how a file is converted.

Next to nothing is imported before `main` runs, so that Ctrl-C is quiet from the beginning.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress

from mlxqwen.cli.interrupts import BROKEN_PIPE, INTERRUPTED, end_interrupted_line, leave_at_once

__all__ = ["is_out_of_memory", "main"]


def main() -> None:
    """Run `mlxqwen` and exit: 0, 1 for an error, 2 for usage, 130 for Ctrl-C, 141 if the reader of a pipe has gone."""
    try:
        status = _run()
        sys.stdout.flush()
    except KeyboardInterrupt:
        status = INTERRUPTED
        end_interrupted_line()
    except BrokenPipeError:
        status = BROKEN_PIPE
        _silence()
    except OSError as error:
        status = 1
        _report(error)
    if _download_goes_on():  # its threads would hold up the end until their connections are given up
        with suppress(OSError, AttributeError):
            sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def _download_goes_on() -> bool:
    transfer = sys.modules.get("mlxqwen.files.transfer")
    return transfer is not None and transfer.has_abandoned()


def _run() -> int:
    with leave_at_once():
        import click

        from mlxqwen.cli.commands import mlxqwen
        from mlxqwen.cli.spellings import usage_message
        from mlxqwen.cli.streams import name_streams, open_missing_streams
        from mlxqwen.cli.terminal import print_error
        from mlxqwen.errors import MlxqwenError

    nowhere_to_write = sys.stdout is None
    name_streams()
    open_missing_streams()
    if nowhere_to_write:
        print_error("standard output: closed, expected somewhere to write to")
        return 1
    try:
        result = mlxqwen.main(prog_name="mlxqwen", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return error.exit_code
    except click.UsageError as error:
        command = error.ctx.command_path if error.ctx is not None else "mlxqwen"
        takes_prompt = error.ctx is not None and any(param.name == "prompt" for param in error.ctx.command.params)
        dash = isinstance(error, click.NoSuchOption) and takes_prompt
        way_out = " Put -- before a prompt that begins with a dash." if dash else ""
        print_error(usage_message(error), f"Try '{command} --help'.{way_out}")
        return error.exit_code
    except click.ClickException as error:
        print_error(error.format_message())
        return error.exit_code
    except click.Abort:  # click has ended the line on standard error
        if not sys.stderr.isatty():
            end_interrupted_line()
        return INTERRUPTED
    except MlxqwenError as error:
        print_error(error.problem, error.hint)
        return 1
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        print_error("out of memory", "Use a smaller model, a shorter prompt, --kv-bits 8 or --max-kv-size.")
        return 1
    return int(result or 0)


def is_out_of_memory(error: Exception) -> bool:
    """Whether MLX ran out of memory, which its RuntimeErrors say in words."""
    return isinstance(error, MemoryError) or any(word in str(error) for word in ("allocate", "OutOfMemory"))


def _report(error: OSError) -> None:
    """Print a failed read or write, such as to a full disk; standard error may be closed too."""
    from mlxqwen.cli.terminal import print_error

    with suppress(OSError):
        print_error(*_told(error))
    _silence()


def _told(error: OSError) -> tuple[str, str]:
    """Problem and hint: what failed is the error's file or stream; it has none where the working folder is gone."""
    reason = error.strerror or str(error)
    problem, hint = reason if error.filename is None else f"{error.filename}: {reason}", ""
    if isinstance(error, PermissionError) and error.filename is not None:
        hint = "Check its permissions, and those of the folders that it lies in."
    if isinstance(error, FileNotFoundError):
        try:
            os.getcwd()
        except FileNotFoundError:
            problem = f"working folder: {reason}" if error.filename is None else problem
            hint = "The working folder was removed: change to one that exists (cd)."
    return problem, hint


def _silence() -> None:
    from mlxqwen.cli.streams import silence_streams

    silence_streams()
