"""The output's `README.md`: what it was made of, how, and how far it is from that."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from mlxqwen.files.hub import MODELSCOPE_PREFIX
from mlxqwen_convert.plan import Plan
from mlxqwen_convert.report import KindRow, Report
from mlxqwen_convert.sizes import size_of

__all__ = ["model_card"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)
_LICENCE = re.compile(r"^license:\s*([\w.-]+)\s*$", re.MULTILINE)
_HUB_CACHE = re.compile(r"models--([\w.-]+?)--([\w.-]+)", re.ASCII)
_MAX_CARD_BYTES = 1 << 20


def model_card(plan: Plan, report: Report, name: str, base_model: str | None = None) -> str:
    """The text of the card.

    Args:
        plan, report: the conversion.
        name: the output's.
        base_model: the hub id that the source was named by; taken from the hub's cache otherwise.
    """
    base = _base_model(plan.folder, base_model)
    licence = _licence(plan.folder)
    head = ["library_name: mlx", "pipeline_tag: text-generation"]
    head += [f"license: {licence}"] if licence else []
    head += [f"base_model: {base}", "base_model_relation: quantized"] if base else []
    head += ["tags:", "- mlx", "- qwen3"] + ([f"- {plan.target.bits}-bit"] if plan.target else [])
    made_of = f"[{base}](https://huggingface.co/{base})" if base else f"a checkpoint in {plan.source.label} form"
    lines = ["---", *head, "---", "", f"# {_plain(name)}", ""]
    lines += [f"Made of {made_of} by `mlxqwen convert`: {plan.source.label} → {report.target}.", ""]
    lines += [f"{size_of(report.target_bytes)}, {report.bits_per_weight:.2f} bits a weight.", ""]
    lines += ["```sh", f'mlxqwen generate --model {_argument(f"./{name}")} "Hello"', "```", ""]
    lines += ["## How it was made", ""]
    lines += [f"- {how}" for how in _how(plan)]
    lines += [f"- {_plain(note)}" for note in report.notes]
    lines += ["", "## Errors", "", *_error_table(report), ""]
    return "\n".join(lines)


def _how(plan: Plan) -> list[str]:
    methods = {entry.method for entry in plan.modules}
    described = {
        "repack": "Integer codes were moved as they are: every one equals the source's.",
        "quantize": "Weights were quantized from float32, each code the nearest under the scale and bias as stored.",
        "dequantize": "Quantized weights were dequantized in float32 and stored unquantized.",
        "cast": f"What is not quantized was rounded to {plan.dtype}.",
    }
    lines = [text for method, text in described.items() if method in methods]
    if plan.options.quality and "quantize" in methods:
        lines.append("Scale and bias of each group were searched for the least squared error.")
    if plan.options.device == "gpu" and "quantize" in methods:
        lines.append("That was computed on a GPU, which may round otherwise than a processor does.")
    lines.append(f"Scales, biases and unquantized weights are {plan.dtype}.")
    return lines


def _error_table(report: Report) -> list[str]:
    if not report.verified:
        return ["Not verified."]
    lines = ["Relative to the dequantized source, as read back from the disk:", ""]
    lines += ["| weights | from | to | error | largest of a tensor |", "| --- | --- | --- | --- | --- |"]
    for row in report.kinds:
        cells = [row.kind, row.source, row.target, *_errors(row)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _errors(row: KindRow) -> tuple[str, str]:
    if row.absolute_error is not None:
        relative = "" if row.relative_error is None else f"{100 * row.relative_error:.3g} %; "
        return (f"{relative}zeros {row.absolute_error:.3g} off", f"{100 * (row.largest_error or 0):.3g} %")
    if not row.relative_error or row.largest_error is None:
        return ("exact", "exact")
    return (f"{100 * row.relative_error:.3g} %", f"{100 * row.largest_error:.3g} %")


def _base_model(folder: Path, given: str | None) -> str | None:
    if given is not None and _HUB_ID.fullmatch(repo_id := given.removeprefix(MODELSCOPE_PREFIX)):
        return repo_id
    for part in folder.resolve().parts:
        if match := _HUB_CACHE.fullmatch(part):
            return f"{match[1]}/{match[2]}"
    return None


def _licence(folder: Path) -> str | None:
    """The licence that the source's own card names in its head."""
    card = folder / "README.md"
    if not card.is_file():
        return None
    try:
        with card.open("rb") as file:
            text = file.read(_MAX_CARD_BYTES).decode("utf-8", "replace")
    except OSError:  # the card of a model is no part of it
        return None
    head = text.split("\n---", 1)[0] if text.startswith("---") else ""
    match = _LICENCE.search(head)
    return match[1] if match else None


def _argument(text: str) -> str:
    """One word for a shell, on one line."""
    return shlex.quote("".join(c for c in text if c.isprintable()))


def _plain(text: str) -> str:
    """Text that can neither end its line nor begin markup."""
    line = "".join(c for c in text if c.isprintable())
    return re.sub(r"([<>\[\]`|])", r"\\\1", line)
