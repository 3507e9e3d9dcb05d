"""`tokenizer.json` → a tokenizer of the `tokenizers` library, which gets only what was checked here.

The library runs what the file says: a normalizer that replaces a character by 300,000 ends the process, a regular
expression may take minutes for a page of text. So the JSON is parsed here, each part is compared with a short list of
kinds, and the library builds a byte-level BPE from Python values. For Qwen3's file that takes as long as the library's
own parser does (0.38 s beside 0.40 s of one core).
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import tokenizers

from mlxqwen.errors import MlxqwenError, TokenizerError
from mlxqwen.files.json_file import json_kind, read_json_object

__all__ = ["build_tokenizer", "guard", "read_tokenizer"]

MAX_FILE_BYTES = 64 * 2**20
MAX_VALUES = 4_000_000
"""JSON values of one file, counted by commas, those in strings included; Qwen3's has 456,396."""
MAX_ADDED_TOKENS = 2_048  # as many as chat templates can be told from text
MAX_ADDED_TOKEN_BYTES = 1_024
MAX_ADDED_BYTES = 2**20
"""Of all added tokens together: so many take a first chat a second and a half, and 120 MB."""
MAX_STEPS = 16
"""Steps of a normalizer, pre-tokenizer or post-processor, and the special tokens that a post-processor adds."""

SPLIT_PATTERNS = (
    # Qwen2, Qwen2.5, Qwen3
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    # Qwen3.5
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    # Llama 3
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
)
"""The regular expressions that are run: the library bounds neither their time nor lets itself be interrupted."""

# Kinds that leave a text's length as it is, but for a factor below ten.
_KINDS = {
    "normalizer": ("normalizers", ("NFC",)),
    "pre_tokenizer": ("pretokenizers", ("Split", "Digits", "Punctuation", "ByteLevel")),
    "post_processor": ("processors", ("ByteLevel", "TemplateProcessing")),
    "decoder": ("decoders", ("ByteLevel",)),
}
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_OWN_FILE = "Use the tokenizer.json that Qwen publishes for this model."

_T = TypeVar("_T")


def read_tokenizer(path: Path) -> tokenizers.Tokenizer:
    """The tokenizer of a file.

    Raises:
        TokenizerError: the file is missing, damaged or too large; or as `build_tokenizer`.
    """
    with _collector_paused():
        description = read_json_object(path, error=TokenizerError, max_bytes=MAX_FILE_BYTES, parse=_parse)
        return build_tokenizer(description, str(path))


def build_tokenizer(description: Mapping[str, Any], source: str) -> tokenizers.Tokenizer:
    """The tokenizer that a parsed `tokenizer.json` describes; its truncation and padding are left out.

    Args:
        description: any JSON object, also a hostile one.
        source: the file that errors name.

    Raises:
        TokenizerError: it is no byte-level BPE, or a part of it could make texts longer without bound, run without end,
            or take more memory than a tokenizer needs.
    """
    for part in _KINDS:
        _check_part(description.get(part), part, source)
    added = _added_tokens(description.get("added_tokens"), source)
    model = _model(description.get("model"), source)
    without_model = {
        "version": description.get("version", "1.0"),
        "added_tokens": [],
        **{part: description.get(part) for part in _KINDS},
        "model": {"type": "BPE", "vocab": {}, "merges": []},
    }

    def build() -> tokenizers.Tokenizer:
        tokenizer = tokenizers.Tokenizer.from_str(json.dumps(without_model))
        tokenizer.model = tokenizers.models.BPE(**model)
        tokenizer.add_tokens([tokenizers.AddedToken(**token) for token in added])
        return tokenizer

    return guard(build, f"{source}: not a readable tokenizer", _OWN_FILE)


def guard(call: Callable[[], _T], problem: str, hint: str) -> _T:
    """Run code of the `tokenizers` library, whose errors say little and whose panics are no `Exception`s."""
    try:
        return call()
    except (KeyboardInterrupt, SystemExit, MemoryError, MlxqwenError):
        raise
    except BaseException as error:
        raise TokenizerError(f"{problem}: {str(error)[:300]}", hint=hint) from error


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Hundreds of thousands of new lists make the garbage collector look for cycles, of which JSON has none."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _parse(text: str) -> Any:
    """`json.loads` in bounds.

    `parse_json` takes more than twice its time. It refuses keys that appear twice, which two parsers may read in two
    ways; here the library parses nothing of the file.
    """
    if text.count(",") > MAX_VALUES:
        raise ValueError(f"more than {MAX_VALUES:,} values")
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _check_part(value: object, part: str, source: str) -> None:
    """Refuse a part that could lengthen text by more than a small factor, or take long."""
    steps = list(_steps(value, part, source))
    for kind in ("ByteLevel", "TemplateProcessing"):
        count = sum(step["type"] == kind for step in steps)
        if count > 1:
            raise _unfit(f"{source}: {part}", f"{count} times {kind}", "at most one")
    for step in steps:
        if step["type"] == "Split":
            _check_pattern(step.get("pattern"), f"{source}: {part}: Split")
        elif step["type"] == "TemplateProcessing":
            _check_template(step, f"{source}: {part}: TemplateProcessing")


def _steps(value: object, part: str, source: str) -> Iterator[Mapping[str, Any]]:
    """The steps of a part; those of a sequence one by one."""
    name, kinds = _KINDS[part]
    waiting, count = [] if value is None else [value], 0
    while waiting:
        step = waiting.pop()
        count += 1
        if count > MAX_STEPS:
            raise _unfit(f"{source}: {part}", f"more than {MAX_STEPS} steps", "fewer")
        kind = step.get("type") if isinstance(step, dict) else None
        if isinstance(step, dict) and kind == "Sequence" and isinstance(step.get(name), list):
            waiting += step[name][: MAX_STEPS + 1]
        elif isinstance(step, dict) and kind in kinds:
            yield step
        else:
            found = _shown(kind if isinstance(step, dict) else step)
            raise _unfit(f"{source}: {part}", found, f"{', '.join(kinds)}, a Sequence of these, or null")


def _check_pattern(pattern: object, where: str) -> None:
    match pattern:
        case {"String": str(text)} if len(text) <= MAX_ADDED_TOKEN_BYTES:
            return
        case {"Regex": str(text)} if text in SPLIT_PATTERNS:
            return
        case {"Regex": text}:
            raise _unfit(where, f"the pattern {_shown(text)}", "one of those of Qwen's tokenizers")
    raise _unfit(where, "no short pattern", 'a {"String": …} or {"Regex": …}')


def _check_template(step: Mapping[str, Any], where: str) -> None:
    """Check that a template only adds a few tokens to the one text that it gets."""
    pieces, tokens = step.get("single"), step.get("special_tokens")
    if not isinstance(pieces, list) or not isinstance(tokens, dict) or max(len(pieces), len(tokens)) > MAX_STEPS:
        raise _unfit(where, "no short lists", f"single and special_tokens, of at most {MAX_STEPS} each")
    texts = sum(isinstance(piece, dict) and "Sequence" in piece for piece in pieces)
    if texts != 1:
        raise _unfit(where, f"the text {texts} times", "once")
    for token in tokens.values():
        ids = token.get("ids") if isinstance(token, dict) else None
        if not isinstance(ids, list) or len(ids) > MAX_STEPS:
            raise _unfit(where, "a special token without a short list of ids", f"ids, at most {MAX_STEPS}")


def _added_tokens(value: object, source: str) -> list[dict[str, Any]]:
    """The arguments of `tokenizers.AddedToken`; the ids of the file are those that the library gives."""
    where = f"{source}: added_tokens"
    if value is None:
        return []
    if not isinstance(value, list):
        raise _unfit(where, json_kind(value), "a list")
    if len(value) > MAX_ADDED_TOKENS:
        raise _unfit(where, f"{len(value):,} tokens", f"at most {MAX_ADDED_TOKENS:,}")
    added, size = [], 0
    for place, token in enumerate(value):
        content = token.get("content") if isinstance(token, dict) else None
        if not isinstance(content, str) or not all(isinstance(token.get(flag), bool) for flag in _FLAGS):
            expected = f"an object with content and {', '.join(_FLAGS)}"
            raise _unfit(f"{where}[{place}]", _shown(token), expected)
        nbytes = len(content.encode(errors="surrogatepass"))
        if nbytes > MAX_ADDED_TOKEN_BYTES:
            found = f"{_shown(content)} of {nbytes:,} bytes"
            raise _unfit(f"{where}[{place}]", found, f"at most {MAX_ADDED_TOKEN_BYTES:,}")
        size += nbytes
        added.append({"content": content, **{flag: token[flag] for flag in _FLAGS}})
    if size > MAX_ADDED_BYTES:
        raise _unfit(where, f"{size:,} bytes", f"at most {MAX_ADDED_BYTES:,} in all")
    return added


def _model(value: object, source: str) -> dict[str, Any]:
    """The arguments of `tokenizers.models.BPE`."""
    where = f"{source}: model"
    if not isinstance(value, dict):
        raise _unfit(where, json_kind(value), "an object")
    vocab, merges = value.get("vocab"), value.get("merges")
    if value.get("type", "BPE") != "BPE" or not isinstance(vocab, dict) or not isinstance(merges, list):
        raise _unfit(where, f"type {_shown(value.get('type'))}", "BPE with vocab and merges")
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if value.get(option):
            raise _unfit(f"{where}: {option}", _shown(value[option]), "none")
    options = {name: value.get(name) for name in ("unk_token", "fuse_unk", "byte_fallback", "ignore_merges")}
    return {
        "vocab": vocab,
        "merges": _pairs(merges, where),
        **{name: option for name, option in options.items() if option is not None},
    }


def _pairs(merges: list[Any], where: str) -> list[tuple[str, ...]]:
    """Merges as newer files have them, lists of two, or as older ones, with a blank between; the library counts."""
    kinds = set(map(type, merges))
    if kinds <= {list}:
        return list(map(tuple, merges))
    if kinds == {str}:
        return [tuple(merge.split(" ")) for merge in merges if not merge.startswith("#version")]
    raise _unfit(f"{where}: merges", " and ".join(sorted(kind.__name__ for kind in kinds)), "lists of two tokens")


def _shown(value: object) -> str:
    """A value of the file, for an error."""
    return repr(value[:60]) if isinstance(value, str) else json_kind(value)


def _unfit(where: str, found: str, expected: str, *, hint: str = _OWN_FILE) -> TokenizerError:
    return TokenizerError(f"{where}: found {found}, expected {expected}", hint=hint)
