"""What callers give in the place of a loaded model: checked, so that another thing is told as what it is."""

from __future__ import annotations

from mlxqwen.errors import OptionError, one_line
from mlxqwen.files.config import ModelConfig

__all__ = ["check_model", "given_kind", "is_model"]

_OURS = "mlxqwen."


def is_model(given: object) -> bool:
    """Whether `given` is a loaded model, or stands for one: it has a `ModelConfig`."""
    return isinstance(getattr(given, "config", None), ModelConfig)


def check_model(given: object, call: str) -> None:
    """Raise `OptionError` unless `given` is a loaded model.

    Args:
        given: what was given as `model`.
        call: how the function is called, such as `make_cache(model)`.
    """
    if not is_model(given):
        raise OptionError(
            f"model: found {given_kind(given)}, expected the model of model, tokenizer = mlxqwen.load(…)",
            hint=f"It is called as {call}.",
        )


def given_kind(given: object) -> str:
    """What a value is, for errors: its type, with the module of another library's; a text as it is."""
    if isinstance(given, str):
        return f"the text {one_line(repr(given), 80)}"
    kind = type(given)
    is_known = kind.__module__ == "builtins" or kind.__module__.startswith(_OURS)
    return kind.__qualname__ if is_known else f"{kind.__module__}.{kind.__qualname__}"
