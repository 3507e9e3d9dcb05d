"""`mlxqwen convert`: a checkpoint in another format → a folder in MLX's."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlxqwen.cli.completion import complete_folder
from mlxqwen.cli.interrupts import INTERRUPTED, leave_at_once, tell_interrupted
from mlxqwen.cli.spellings import SpelledCommand, spelled_option
from mlxqwen.cli.streams import silence_streams
from mlxqwen.cli.table import Column, columns_of, table
from mlxqwen.cli.terminal import ConversionProgress, be_quiet, count_of, print_error
from mlxqwen.console import Output
from mlxqwen.errors import OptionError, one_line

if TYPE_CHECKING:
    from mlxqwen_convert.report import Report

__all__ = ["convert"]

_BITS = click.Choice(["16", "8", "6", "5", "4", "3", "2"])


_COLUMNS = (
    Column("kind"),
    Column("modules", right=True, left_out=8),
    Column("weights", right=True, left_out=7),
    Column("from", left_out=2),
    Column("to"),
    Column("how", left_out=4),
    Column("before", right=True, left_out=3),
    Column("after", right=True, left_out=1),
    Column("bits/w", right=True, left_out=5),
    Column("error", right=True),
    Column("largest", right=True, left_out=6),
)


def _parse_keep(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> tuple[tuple[str, int], ...]:
    parsed = []
    for value in values:
        glob, _, bits = value.rpartition("=")
        if not glob or bits not in _BITS.choices:
            expected = f"GLOB=BITS, such as '*.down_proj=8', with bits of {', '.join(_BITS.choices)}"
            raise click.BadParameter(f"found {value!r}, expected {expected}.", ctx, param)
        parsed.append((glob, int(bits)))
    return tuple(parsed)


def _not_empty(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    if value == "":
        raise click.BadParameter("found no name, expected a folder to write.", ctx, param, "'OUTPUT'")
    return value


def _hub_id(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    if value is not None:
        from mlxqwen_convert.upload import check_repo_id

        try:
            check_repo_id(value)
        except OptionError:
            raise click.BadParameter(f"found {value!r}, expected organisation/model.", ctx, param) from None
    return value


_option = partial(spelled_option, "Options")


@click.command(cls=SpelledCommand)
@click.argument("source", required=False, shell_complete=complete_folder)
@click.argument("output", required=False, type=click.Path(), callback=_not_empty)
@_option("--hf-path", metavar="SOURCE", hidden=True)
@_option("-m", "--model", metavar="SOURCE", hidden=True)
@_option("--mlx-path", metavar="OUTPUT", type=click.Path(), hidden=True, callback=_not_empty)
@_option("--revision", help="Branch, tag or commit of a hub id.")
@_option(
    "--bits",
    type=_BITS,
    also=("--q-bits",),
    help="Bits a weight; 16 only dequantizes. By default 8 for FP8, 4 for BF16, and the source's own for AWQ, GPTQ and "
    "compressed-tensors, whose codes are kept as they are.",
)
@_option(
    "--group-size",
    also=("--q-group-size",),
    type=click.Choice(["32", "64", "128"]),
    help="Weights that share a scale; by default the source's, or 64.",
)
@_option(
    "--dtype",
    type=click.Choice(["auto", "bfloat16", "float16", "float32"]),
    default="auto",
    show_default=True,
    help="Of scales and of what stays unquantized; auto: float16 for integer codes (bfloat16 where that loses "
    "nothing), else the source's.",
)
@_option("--lm-head-bits", type=_BITS, help="Other bits for the output head.")
@_option("--embed-bits", type=_BITS, help="Other bits for the embeddings.")
@_option(
    "--keep",
    callback=_parse_keep,
    multiple=True,
    metavar="GLOB=BITS",
    help='Other bits for some modules, such as "*.down_proj=8"; of several that match one, the last counts.',
)
@_option("--quality", is_flag=True, help="Search for better scales; several times slower.")
@_option(
    "--device",
    type=click.Choice(["cpu", "gpu"]),
    default="cpu",
    show_default=True,
    help="Where to compute; a GPU may round otherwise than a processor does.",
)
@_option("--strict", is_flag=True, help="Refuse what groups do not divide, instead of leaving it unquantized.")
@_option("--ignore-adapter", is_flag=True, help="Leave out an adapter that lies beside the weights.")
@_option("--verify/--no-verify", default=True, show_default=True, help="Read everything back and compare.")
@_option("--resume", is_flag=True, help="Go on with an unfinished conversion.")
@_option("--dry-run", is_flag=True, help="Print the plan, and what is in its way, and write nothing.")
@_option(
    "--upload-repo",
    metavar="ID",
    callback=_hub_id,
    help="Push the finished folder to this hub id; needs HF_TOKEN or a login.",
)
@_option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@_option("-q", "--quiet", is_flag=True, help="Print nothing but errors.")
def convert(as_json: bool, quiet: bool, upload_repo: str | None, **options: Any) -> int:
    """Turn SOURCE (a folder, hub id or alias) into OUTPUT, a folder that MLX's loaders read.

    Without OUTPUT its name is that of SOURCE with the new bits, in the current folder. Reads BF16, F16, F32, FP8, AWQ,
    GPTQ, compressed-tensors and MLX checkpoints, dense and mixture of experts.
    """
    with leave_at_once():
        from mlxqwen.files.aliases import naming_alias
        from mlxqwen_convert import convert as convert_folder

    source, output = _paths(options)
    if quiet:
        be_quiet()
    for name in ("bits", "group_size", "lm_head_bits", "embed_bits"):
        options[name] = None if options[name] is None else int(options[name])
    if upload_repo is not None:
        with leave_at_once():
            from mlxqwen_convert.upload import require_token

        require_token(upload_repo)
    if output is None:
        output = _chosen_output(source, options)
        if not quiet:
            _note(f"no OUTPUT was given: {output}")
    if options["resume"] and not options["dry_run"] and _nothing_to_resume(output) and not quiet:
        _note(f"nothing to resume beside {output}: the conversion begins from the start")
    progress = ConversionProgress(sys.stderr)
    try:
        with naming_alias(source):
            report = convert_folder(source, output, progress=progress, **options)
    except KeyboardInterrupt:
        progress.close()
        tell_interrupted("; the same command with --resume goes on from here")
        return INTERRUPTED
    except OptionError as error:
        raise _in_options_words(error, options) from None
    finally:
        progress.close()
    if not quiet:
        for note in _warnings(report):
            _note(note)
    text = json.dumps(report.as_dict(), ensure_ascii=False) + "\n" if as_json else _text(report)
    if not (quiet and not as_json) and not _print(text, report):
        return 1
    if report.refusal is not None:  # of a dry run
        print_error(report.refusal, report.hint)
        return 1
    if upload_repo is not None and not options["dry_run"]:
        address = _upload(report, upload_repo)
        if not quiet:
            Output(sys.stderr if as_json else sys.stdout).write(f"uploaded: {address}\n")
    return 0


def _paths(options: dict[str, Any]) -> tuple[str, str | None]:
    """SOURCE and OUTPUT, taken out of the options; --model and mlx-lm's --hf-path and --mlx-path are the same."""
    paths = []
    for names in (("source", "model", "hf_path"), ("output", "mlx_path")):
        values = {name: options.pop(name) for name in names}
        given = {name: value for name, value in values.items() if value is not None}
        if len(given) > 1:
            first, second = list(given)[:2]
            shown = first.upper() if first == names[0] else _flag(first)
            raise click.UsageError(f"Give {shown} or {_flag(second)}, not both.")
        paths.append(next(iter(given.values()), None))
    source, output = paths
    if source is None:
        raise click.UsageError("Missing argument 'SOURCE'.")
    return source, output


def _chosen_output(source: str, options: Mapping[str, Any]) -> str:
    """A name in the current folder that tells what it will be, such as `Qwen3-4B-8bit`. Raises `MlxqwenError`."""
    from mlxqwen.files.hub import looked_at
    from mlxqwen_convert.output_name import output_name
    from mlxqwen_convert.plan import Options, make_plan

    names = ("bits", "group_size", "dtype", "lm_head_bits", "embed_bits", "keep", "quality", "strict")
    try:
        with looked_at(source, revision=options["revision"]) as folder:
            plan = make_plan(folder, Options(*(options[name] for name in names)))
    except OptionError as error:
        raise _in_options_words(error, options) from None
    return output_name(plan)


def _warnings(report: Report) -> Iterator[str]:
    """What a user should know who expects more of the result than it can be."""
    source = Path(report.source)
    # What was only looked at for a dry run is gone by now.
    if source.is_dir() and not (source / "tokenizer.json").is_file():
        yield f"{report.source} has no tokenizer.json: the result has none either, and cannot be asked without one"
    grows = [
        row for row in report.kinds if (bits := _bits(row.source)) and bits <= 4 and bits < (_bits(row.target) or 16)
    ]
    if grows:
        yield (
            f"{grows[0].kind}: from {grows[0].source} to {grows[0].target} takes more room, and nothing that was lost "
            "when it was quantized comes back"
        )


def _bits(label: str) -> int | None:
    """The bits of codes in a label such as `MLX 4-bit g64` or `compressed-tensors int4`; None for floats."""
    found = re.search(r"\b(\d)-bit|\bint(\d)", label)
    return None if found is None else int(found[1] or found[2])


def _nothing_to_resume(output: str) -> bool:
    """Whether neither `output` nor its unfinished folder exists."""
    target = Path(os.path.expanduser(output))
    return not os.path.lexists(target) and not os.path.isdir(target.with_name(f"{target.name}.partial"))


def _note(text: str) -> None:
    sys.stderr.write(f"note: {one_line(text)}\n")


def _in_options_words(error: OptionError, options: Mapping[str, Any]) -> OptionError:
    """The library's `group_size: …` as `--group-size: …`, and its `group_size (--group-size)` as well."""
    name = error.problem.partition(":")[0]
    if name not in options:
        return error
    hint = error.hint
    for other in options:
        hint = hint.replace(f"{other} ({_flag(other)})", _flag(other))
    return OptionError(f"{_flag(name)}{error.problem.removeprefix(name)}", hint=hint)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _print(text: str, report: Report) -> bool:
    """Write the result. If that fails, the error says that the conversion itself has not."""
    try:
        Output(sys.stdout).write(text)
    except BrokenPipeError:
        raise
    except OSError as error:
        hint = f"The conversion itself is whole in {report.output}." if report.output else ""
        print_error(f"standard output: {error.strerror or error}", hint)
        silence_streams()
        return False
    return True


def _upload(report: Report, repo_id: str) -> str:
    """Upload the folder → the address of the commit."""
    from mlxqwen_convert.upload import upload, upload_command

    folder = Path(report.output)
    try:
        return upload(folder, repo_id)
    except KeyboardInterrupt:
        command = one_line(upload_command(folder, repo_id))
        tell_interrupted(f"; the folder is whole, this uploads it: {command}")
        raise


def _table(report: Report) -> str:
    """Modules by kind: from → to, sizes, bits a weight, and errors where they were measured."""
    from mlxqwen_convert.sizes import size_of

    verified = any((row.relative_error, row.absolute_error) != (None, None) for row in report.kinds)
    rows = []
    for row in report.kinds:
        exact = row.method == "copy" or (row.relative_error == 0 and row.absolute_error is None)
        errors = ["exact", ""] if exact else [_percent(row.relative_error), _percent(row.largest_error)]
        if row.absolute_error is not None:  # of weights that are all 0
            errors[0] += f"{'; ' if errors[0] else ''}zeros {row.absolute_error:.3g} off"
        cells = [row.kind, f"{row.modules:,}", count_of(row.parameters), row.source, row.target, row.method]
        cells += [size_of(row.source_bytes), size_of(row.target_bytes), f"{8 * row.target_bytes / row.parameters:.2f}"]
        rows.append(cells + errors)
    return table(_COLUMNS if verified else _COLUMNS[:-2], rows, columns_of(sys.stdout))


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.3g} %"


def _text(report: Report) -> str:
    from mlxqwen_convert.sizes import size_of

    notes = [note for note in report.notes if note != report.refusal]  # which is told as an error
    text = "".join(f"note: {one_line(note)}\n" for note in notes) + _table(report)
    before, after = (sum(getattr(row, side) for row in report.kinds) for side in ("source_bytes", "target_bytes"))
    sizes = f"{size_of(before)} → {size_of(after)}, {report.bits_per_weight:.2f} bits a weight"
    if not report.output:
        return f"{text}{sizes}; expected peak memory {size_of(report.expected_peak_bytes)}. Nothing was written.\n"
    verified = "verified" if report.verified else "not verified"
    return f"{text}{sizes}, {verified}, in {report.seconds:.1f} s: {one_line(report.output)}\n"
