"""`mlxqwen convert`."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import click

from mlxqwen.cli.completion import complete_folder
from mlxqwen.cli.interrupts import INTERRUPTED
from mlxqwen.cli.terminal import ConversionProgress
from mlxqwen.errors import OptionError, one_line

if TYPE_CHECKING:
    from mlxqwen_convert.report import Report

__all__ = ["convert"]

_BITS = click.Choice(["16", "8", "6", "5", "4", "3", "2"])


@click.command()
@click.argument("source", shell_complete=complete_folder)
@click.argument("output", type=click.Path())
@click.option("--revision", help="Branch, tag or commit of a hub id.")
@click.option(
    "--bits",
    type=_BITS,
    help="Bits a weight; 16 only dequantizes. By default 8 for FP8, 4 for BF16, and the source's own for AWQ, GPTQ and "
    "compressed-tensors, whose codes are kept as they are.",
)
@click.option(
    "--group-size",
    type=click.Choice(["32", "64", "128"]),
    help="Weights that share a scale; by default the source's, or 64.",
)
@click.option(
    "--dtype",
    type=click.Choice(["auto", "bfloat16", "float16", "float32"]),
    default="auto",
    show_default=True,
    help="Of scales and of what stays unquantized; auto: float16 for integer codes, else the source's.",
)
@click.option("--lm-head-bits", type=_BITS, help="Other bits for the output head.")
@click.option("--embed-bits", type=_BITS, help="Other bits for the embeddings.")
@click.option(
    "--keep", multiple=True, metavar="GLOB=BITS", help='Other bits for some modules, such as "*.down_proj=8".'
)
@click.option("--quality", is_flag=True, help="Search for better scales; several times slower.")
@click.option("--strict", is_flag=True, help="Refuse what groups do not divide, instead of leaving it unquantized.")
@click.option("--verify/--no-verify", default=True, show_default=True, help="Read everything back and compare.")
@click.option("--resume", is_flag=True, help="Go on with an unfinished conversion.")
@click.option("--dry-run", is_flag=True, help="Print the plan and write nothing.")
@click.option("--upload-repo", metavar="ID", help="Push the finished folder to this hub id; needs HF_TOKEN.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def convert(source: str, output: str, as_json: bool, **options: Any) -> int:
    """Turn SOURCE (a folder or hub id) into OUTPUT, a folder that MLX's loaders read.

    Reads BF16, F16, F32, FP8, AWQ, GPTQ, compressed-tensors and MLX checkpoints, dense and mixture of experts.
    """
    from mlxqwen_convert import convert as convert_folder

    for name in ("bits", "group_size", "lm_head_bits", "embed_bits"):
        options[name] = None if options[name] is None else int(options[name])
    options["keep"] = [_parse_keep(text) for text in options["keep"]]
    progress = ConversionProgress(sys.stderr)
    try:
        report = convert_folder(source, output, progress=progress, **options)
    except KeyboardInterrupt:
        progress.close()
        sys.stderr.write("interrupted; the same command with --resume goes on from here\n")
        return INTERRUPTED
    finally:
        progress.close()
    if as_json:
        sys.stdout.write(json.dumps(report.as_dict(), ensure_ascii=False) + "\n")
    else:
        sys.stdout.write(_text(report))
    return 0


def _parse_keep(text: str) -> tuple[str, int]:
    glob, _, bits = text.rpartition("=")
    if not glob or not bits.isdecimal():
        raise OptionError(f"--keep: found {text!r}, expected GLOB=BITS", hint='For example --keep "*.down_proj=8".')
    return glob, int(bits)


def _text(report: Report) -> str:
    from mlxqwen_convert.report import plan_table, size_of

    text = "".join(f"note: {one_line(note)}\n" for note in report.notes) + plan_table(report.kinds)
    sizes = (
        f"{size_of(report.source_bytes)} → {size_of(report.target_bytes)}, {report.bits_per_weight:.2f} bits a weight"
    )
    if not report.output:
        return f"{text}{sizes}; expected peak memory {size_of(report.expected_peak_bytes)}. Nothing was written.\n"
    verified = "verified" if report.verified else "not verified"
    return f"{text}{sizes}, {verified}, in {report.seconds:.1f} s: {report.output}\n"
