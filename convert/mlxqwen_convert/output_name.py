"""The name of a conversion's folder where none is given: that of its source, with the new bits."""

from __future__ import annotations

import os
import re

from mlxqwen.files.model_names import hub_id_of_folder
from mlxqwen_convert.plan import Plan

__all__ = ["output_name"]

_FORM = re.compile(r"[-_.](?:fp8|awq|gptq(?:-int\d)?|int\d|w\da\d+|mlx|bf16|fp?16|fp?32|\d-?bits?)$", re.IGNORECASE)
_DTYPES = {"BF16": "bf16", "F16": "fp16", "F32": "fp32"}


def output_name(plan: Plan) -> str:
    """For example `Qwen3-4B-8bit` of `Qwen/Qwen3-4B-FP8`, and `Qwen3-4B-bf16` of what is not quantized."""
    folder = os.path.normpath(plan.folder.absolute())  # "." has no name of its own
    name = (hub_id_of_folder(plan.folder) or os.path.basename(folder)).rpartition("/")[2] or "model"
    while (shorter := _FORM.sub("", name)) not in (name, ""):
        name = shorter
    form = _DTYPES.get(plan.dtype, plan.dtype) if plan.target is None else f"{plan.target.bits}bit"
    return f"{name}-{form}"
