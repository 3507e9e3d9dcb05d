"""What callers give as a model and its tokenizer: checked, so that the wrong order is told as such."""

from __future__ import annotations

from mlxqwen.errors import OptionError
from mlxqwen.model.given import check_model, given_kind, is_model
from mlxqwen.text.tokenizer import Tokenizer

__all__ = ["check_loaded"]


def check_loaded(model: object, tokenizer: object, call: str) -> None:
    """Raise `OptionError` unless `model` is a loaded model and `tokenizer` a tokenizer.

    Args:
        model, tokenizer: what was given as such.
        call: how the function is called, such as `generate(model, tokenizer, prompt)`.
    """
    hint = f"It is called as {call}."
    if isinstance(model, Tokenizer) and is_model(tokenizer):
        raise OptionError("model, tokenizer: found the tokenizer before the model, expected the model first", hint=hint)
    check_model(model, call)
    if not isinstance(tokenizer, Tokenizer):
        raise OptionError(
            f"tokenizer: found {given_kind(tokenizer)}, expected the tokenizer of model, tokenizer = mlxqwen.load(…)",
            hint=hint,
        )
