"""A tokenizer of the library → tables that are shown to give the same."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from mlxqwen.text.tokenizer_backend.compiled import MAX_WORK, CompiledBackend
from mlxqwen.text.tokenizer_backend.library import LibraryBackend
from mlxqwen.text.tokenizer_backend.tables import Tables

__all__ = ["UnsuitableError", "compile_tokenizer"]

# Texts of many kinds: contractions, numbers, white space, marks that NFC composes, scripts, code, private use.
_SAMPLES = (
    "It's 12,345.67 o'clock; we'LL see\n\n  twice  \t\r\n\r\n .",
    "Å é e\u0301 \u1100\u1161\u11a8 \u0e33 ½ ﬁ \u200d \ufeff \ufffd \x00 \ue000 \U0010fffd 👩‍👩‍👧 🇩🇪",
    "Привет, мир! Γειά σου Κόσμε مرحبا بالعالم שלום עולם नमस्ते दुनिया 你好,世界。こんにちは 안녕하세요 สวัสดี",
    "def f(x: int) -> None:\n    return {'a': [1, 2, *x]}  # ok?\n\tx **= 2; y = x<<3",
)
_EVERY = 59  # of so many tokens one is part of a text in which tokens of all kinds stand side by side


class UnsuitableError(ValueError):
    """A tokenizer that tables cannot stand for."""


def compile_tokenizer(library: LibraryBackend, facts: Mapping[str, Any]) -> Tables:
    """Tables from which `CompiledBackend` gives what the library does.

    They come from what the library itself says it has read. Every token is compared: its spelling, and the ids that the
    library's BPE gives its bytes. Beyond that, texts are: samples of many kinds, each added token, tokens side by side.

    Args:
        library: the whole tokenizer.
        facts: what else the tables are to remember.

    Raises:
        UnsuitableError: a model with rules beyond those of byte-level BPE, or something that came out otherwise.
    """
    description = json.loads(library.tokenizer.to_str())
    model, added = description["model"], description["added_tokens"]
    _check_model(model)
    vocab: dict[str, int] = model["vocab"]
    tokens = sorted(vocab, key=vocab.__getitem__)
    if [vocab[token] for token in tokens] != list(range(len(tokens))):
        raise UnsuitableError("ids with gaps")
    if any("\n" in token for token in tokens):
        raise UnsuitableError("a line feed in a token")
    merges = [(vocab[left], vocab[right], vocab[left + right]) for left, right in model["merges"]]
    contents = {token["content"]: token["id"] for token in added}
    alphabet = _alphabet(description)
    if not alphabet <= vocab.keys():
        raise UnsuitableError("bytes without a token")
    model["vocab"] = {**{byte: vocab[byte] for byte in sorted(alphabet)}, **contents}
    model["merges"] = []
    tables = Tables.make(
        {
            **facts,
            "skeleton": json.dumps(description),
            "vocab_size": library.vocab_size,
            "longest_token": library.longest_token,
        },
        tokens,
        merges,
    )
    kept = Tables.unpack(tables.pack())
    _compare_tokens(kept, library, vocab, alphabet)
    _compare_texts(kept, library)
    return tables


def _check_model(model: Mapping[str, Any]) -> None:
    if model["type"] != "BPE":
        raise UnsuitableError(f"a model of type {model['type']}")
    rules = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
    for rule in (*rules, "ignore_merges"):
        if model.get(rule):
            raise UnsuitableError(f"{rule}: {model[rule]!r}")


def _alphabet(description: Mapping[str, Any]) -> set[str]:
    """The characters of bytes, where the last thing done to a text before BPE is to spell it in them."""
    from tokenizers.pre_tokenizers import ByteLevel

    last = description["pre_tokenizer"]
    while last is not None and last["type"] == "Sequence" and last["pretokenizers"]:
        last = last["pretokenizers"][-1]
    if last is None or last["type"] != "ByteLevel":
        raise UnsuitableError("text that is not spelled in bytes")
    return set(ByteLevel.alphabet())


def _compare_tokens(tables: Tables, library: LibraryBackend, vocab: Mapping[str, int], alphabet: set[str]) -> None:
    """Each token as a word of its own, so also those of bytes that are no text."""
    compiled, whole = CompiledBackend(tables, lambda: library), library.tokenizer.model
    for token, token_id in vocab.items():
        if compiled.id_to_token(token_id) != library.id_to_token(token_id):
            raise UnsuitableError(f"another spelling of {token_id}")
        if alphabet.issuperset(token):  # no text becomes a token that is not
            expected = [part.id for part in whole.tokenize(token)]
            if compiled.merge_word([vocab[byte] for byte in token]) != expected:
                raise UnsuitableError(f"other ids for the token {token!r}")


def _compare_texts(tables: Tables, library: LibraryBackend) -> None:
    compiled = CompiledBackend(tables, lambda: library)
    if compiled.added_tokens.keys() != library.added_tokens.keys():
        raise UnsuitableError("other added tokens")
    size = 0
    for text in _texts(tables, library):
        if size + 4 * len(text) > MAX_WORK:
            compiled, size = CompiledBackend(tables, lambda: library), 0
        size += 4 * len(text)
        for special in (False, True):
            if compiled.encode(text, add_special_tokens=special) != library.encode(text, add_special_tokens=special):
                raise UnsuitableError(f"other ids for {text!r}")
        if compiled.encode_plain(text) != library.encode_plain(text):
            raise UnsuitableError(f"other ids for {text!r} without added tokens")


def _texts(tables: Tables, library: LibraryBackend) -> Iterator[str]:
    yield from _SAMPLES
    contents = [token.content for token in library.added_tokens.values()]
    yield from (f"a {content} b{content}{content}\n" for content in contents)
    ids = range(0, len(tables.starts) - 1, _EVERY)
    spelled: str = library.tokenizer.decode(list(ids), skip_special_tokens=False)
    yield from (spelled[start : start + 4096] for start in range(0, len(spelled), 4096))
