"""A config's list of modules that are not quantized, compared with how they are stored, which decides.

Entries are matched as transformers does (`should_convert_module`), and further as ModelOpt's globs and
compressed-tensors' `re:` are meant: from a name's start up to a dot, or at its end.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from mlxqwen.files.checkpoint import TensorInfo
from mlxqwen.files.tensor_names import without_wrappers
from mlxqwen_convert.name_patterns import NamePattern, Work

__all__ = ["Exemptions"]

_MOST_EXPRESSIONS = 128
_MOST_STEPS = 5_000_000
# So many are compared with the end of each name, wherever a word of it begins; more at its dots alone.
_MOST_ENDINGS = 1_000
_ONE_EXPERT = re.compile(r"experts\W*[\d\[\\(]")
_NUMBER_OF_EXPERT = re.compile(r"\.experts\.\d+\.")
_WORD_OF_WEIGHT = re.compile(r"\.(weight|weight_packed|qweight)\Z")
_PLAIN = re.compile(r"[\w.-]*", re.ASCII)
_SHOWN = 3


class Exemptions:
    """The list of one config, and the modules that are stored otherwise than it says."""

    def __init__(self, key: str | None, entries: Sequence[str]) -> None:
        self._key = key
        self._work = Work(_MOST_STEPS)
        self._unread: list[str] = []
        self._listed_all_the_same: list[str] = []
        self._not_listed: list[str] = []
        literals: dict[str, None] = {}
        self._patterns: list[NamePattern] = []
        for entry in entries:
            if _PLAIN.fullmatch(entry):
                literals |= {entry.rstrip("."): None, without_wrappers(entry.rstrip(".")): None}
            elif len(self._patterns) < _MOST_EXPRESSIONS:
                self._read(entry)
            else:
                self._unread.append(entry)
        self._is_wrapped = any("language_model" in entry for entry in entries)
        # Experts are tens of thousands: where no entry is about a single one, one stands for those of its layer.
        self._tells_experts_apart = any(_ONE_EXPERT.search(entry) for entry in entries)
        self._known: dict[str, bool] = {}
        literals.pop("", None)
        self._literals = frozenset(literals)
        self._endings = tuple(literals) if len(literals) <= _MOST_ENDINGS else ()

    def _read(self, entry: str) -> None:
        text, found = entry.removeprefix("re:"), []
        attempts = [text] if entry.startswith("re:") else [text, _expression_of_glob(text)]
        for attempt in attempts:
            try:
                found.append(NamePattern(attempt, self._work))
            except ValueError:
                continue
        self._patterns += found
        if not found:
            self._unread.append(entry)

    def names(self, name: str) -> bool:
        """Whether the list has a module, by its name in Qwen3 or under the prefix of a model of several modalities."""
        if not self._tells_experts_apart:
            name = _NUMBER_OF_EXPERT.sub(".experts.0.", name)
        if name not in self._known:
            self._known[name] = self._names(name)
        return self._known[name]

    def _names(self, name: str) -> bool:
        dots = [at for at, letter in enumerate(name) if letter == "."]
        parts = [name, *(name[:at] for at in dots), *(name[at + 1 :] for at in dots)]
        if not self._literals.isdisjoint(parts) or name.endswith(self._endings):
            return True
        bare = name.removeprefix("model.")
        wrapped = (f"model.language_model.{bare}", f"language_model.{name}") if self._is_wrapped else ()
        try:
            return any(pattern.matches(spelling) for pattern in self._patterns for spelling in (name, *wrapped))
        except ValueError as cause:
            self._patterns.clear()
            self._unread.append(str(cause))
            return False

    def compare(self, info: TensorInfo, *, is_float: bool, is_expected_quantized: bool) -> None:
        """Note a weight that is stored otherwise than the list says."""
        name = _WORD_OF_WEIGHT.sub("", info.name.partition("[")[0])
        if is_float != self.names(name):
            if not is_float:
                self._listed_all_the_same.append(name)
            elif is_expected_quantized:
                self._not_listed.append(f"{name} ({info.dtype})")

    def notes(self) -> list[str]:
        """A line for each kind of disagreement; none where an expression could not be read."""
        if self._unread:
            return [f"config.json's {self._key} has entries that are not read, such as {self._unread[0][:80]!r}"]
        notes = []
        if self._listed_all_the_same:
            found = _some(self._listed_all_the_same)
            notes.append(f"stored quantized and read as such, though config.json's {self._key} lists them: {found}")
        if self._not_listed:
            found = _some(self._not_listed)
            why = "does not say so" if self._key is None else f"{self._key} does not list them"
            config = "config.json" if self._key is None else "config.json's"
            notes.append(f"stored unquantized and read as such, though {config} {why}: {found}")
        return notes


def _expression_of_glob(glob: str) -> str:
    """ModelOpt's and fnmatch's `*` and `?` as an expression; everything else is meant as it stands."""
    return "".join({"*": ".*", "?": "."}.get(letter) or re.escape(letter) for letter in glob)


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN:,} more"
