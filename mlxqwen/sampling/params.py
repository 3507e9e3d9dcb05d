"""The parameters of sampling: their ranges, the model cards' profiles, and which source of a value wins.

Qwen's cards advise: temperature 0.6 and top-p 0.95 for thinking, 0.7 and 0.8 without, top-k 20 and min-p 0 for both;
against endless repetition a presence penalty, for quantized weights of 1.5.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mlxqwen.checks import check_integer, check_number
from mlxqwen.errors import OptionError
from mlxqwen.files.json_file import json_kind

__all__ = ["NON_THINKING", "THINKING", "SamplingParams", "resolve_sampling"]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to draw the next token. Every default leaves the model's distribution as it is.

    Args:
        temperature: divides the logits, 0 to 100; 0 is greedy.
        top_k: keep the k most likely tokens and all that tie with the k-th; 0 or -1 keeps all.
        top_p: keep the fewest tokens whose probability reaches this, in (0, 1]; of equals the lower ids.
        min_p: keep tokens at least this fraction as likely as the most likely one, 0 to 1.
        presence_penalty: subtracted from the logit of each token already in the reply, -2 to 2.
        frequency_penalty: the same, times how often the token is in the reply, -2 to 2.
        repetition_penalty: divides positive and multiplies negative logits of tokens in the prompt or the reply, 0.01
            to 100.
        logit_bias: token id to a number in [-100, 100] that is added to its logit before everything else. An id may
            be given as text, as in JSON, whose keys are always text.
        seed: 0 to 2**64 - 1; the same seed draws the same tokens. None draws anew each time.

    Raises:
        OptionError: a value of the wrong type or out of range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] | None = dataclasses.field(default=None, hash=False)
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, (low, high, low_is_open) in _RANGES.items():
            value = check_number(name, getattr(self, name), low, high, low_is_open=low_is_open)
            object.__setattr__(self, name, value)
        object.__setattr__(self, "top_k", max(check_integer("top_k", self.top_k, -1, _MOST_TOKENS), 0))
        if self.seed is not None:
            object.__setattr__(self, "seed", check_integer("seed", self.seed, 0, 2**64 - 1))
        if self.logit_bias is not None:
            object.__setattr__(self, "logit_bias", _bias(self.logit_bias))

    @property
    def greedy(self) -> bool:
        """Whether every draw is the most likely token."""
        return self.temperature == 0.0


_MOST_TOKENS = 2**31 - 1
_DIGITS = re.compile(r"[0-9]{1,10}")
_RANGES = {
    "temperature": (0.0, 100.0, False),
    "top_p": (0.0, 1.0, True),
    "min_p": (0.0, 1.0, False),
    "presence_penalty": (-2.0, 2.0, False),
    "frequency_penalty": (-2.0, 2.0, False),
    "repetition_penalty": (0.01, 100.0, False),
}


def _bias(value: object) -> dict[int, float]:
    if not isinstance(value, Mapping):
        raise OptionError(f"logit_bias: found {value!r}, expected a mapping of token ids to numbers")
    bias = {
        check_integer("logit_bias token id", _id_of(token), 0, _MOST_TOKENS): check_number(
            f"logit_bias of token {token}", number, -100.0, 100.0
        )
        for token, number in value.items()
    }
    if len(bias) < len(value):
        raise OptionError("logit_bias: found a token id twice, as a number and as text, expected it once")
    return bias


def _id_of(token: object) -> object:
    """The id that `token` spells in decimal digits; else `token` itself."""
    return int(token) if isinstance(token, str) and _DIGITS.fullmatch(token) else token


THINKING = SamplingParams(temperature=0.6, top_p=0.95, top_k=20, min_p=0.0)
NON_THINKING = SamplingParams(temperature=0.7, top_p=0.8, top_k=20, min_p=0.0)

LOW_BITS = 4
LOW_BIT_PRESENCE_PENALTY = 1.5

_PROFILE_KEYS = ("temperature", "top_p", "top_k", "min_p")
_FILE_KEYS = (*_PROFILE_KEYS, "presence_penalty", "frequency_penalty", "repetition_penalty")
_OPTION_KEYS = tuple(field.name for field in dataclasses.fields(SamplingParams))


def resolve_sampling(
    generation_config: object, *, thinking: bool, overrides: Mapping[str, Any], bits: int | None = None
) -> tuple[SamplingParams, tuple[str, ...]]:
    """The parameters to use, and one line for each value of the file that had to be ignored.

    A later source replaces an earlier one: the checkpoint's file, the model card's profile for the mode (temperature,
    top-p, top-k and min-p, so that greedy is never a default), the user's options. Weights of 4 bits or fewer repeat
    themselves more: they get a presence penalty of 1.5 unless the file or the user gives another.

    Args:
        generation_config: the parsed `generation_config.json`, whatever it holds; other keys are ignored.
        thinking: which profile.
        overrides: the user's options by the names of `SamplingParams`; None means not given.
        bits: of the quantized weights; None if they are not.

    Raises:
        OptionError: an override that is unknown or out of range.
    """
    from_file, notes = _from_generation_config(generation_config)
    profile = THINKING if thinking else NON_THINKING
    for name in overrides:
        if name not in _OPTION_KEYS:
            raise OptionError(f"sampling option: found {name!r}, expected one of {', '.join(_OPTION_KEYS)}")
    chosen = {name: value for name, value in overrides.items() if value is not None}
    card = {name: getattr(profile, name) for name in _PROFILE_KEYS}
    low_bits = {} if bits is None or bits > LOW_BITS else {"presence_penalty": LOW_BIT_PRESENCE_PENALTY}
    return SamplingParams(**{**low_bits, **from_file, **card, **chosen}), notes


def _from_generation_config(config: object) -> tuple[dict[str, Any], tuple[str, ...]]:
    if not isinstance(config, Mapping):
        return {}, (f"generation_config.json: found {json_kind(config)}, expected an object; ignored",)
    values: dict[str, Any] = {}
    notes: list[str] = []
    for name in _FILE_KEYS:
        if config.get(name) is None:
            continue
        try:
            values[name] = getattr(SamplingParams(**{name: config[name]}), name)
        except OptionError as error:
            notes.append(f"generation_config.json: {error.problem}; ignored")
    return values, tuple(notes)
