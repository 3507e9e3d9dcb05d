"""A tokenizer from tables: the library splits, the tables merge."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import groupby, pairwise
from operator import itemgetter

import tokenizers

from mlxqwen.tokenizer_backend.library import LibraryBackend, without_added_tokens
from mlxqwen.tokenizer_backend.tables import NO_MERGE, Tables

__all__ = ["MAX_WORK", "CompiledBackend"]

MAX_WORK = 64 * 1024
"""Bytes that are merged in Python before the whole tokenizer is read: about as much time as reading it takes.

A word of n bytes counts as n more for each 256 of them, for merging takes the square of a word's length.
"""


class CompiledBackend:
    """What `compiler.compile_tokenizer` has made tables of; equal to it in all that it gives.

    The library works on a skeleton: the tokenizer without merges, its vocabulary the 256 bytes and the added tokens.
    Normalizer, added tokens, pre-tokenizer and post-processor are those of the file, so the ids that come out are those
    of single bytes, word by word. BPE then merges within a word, the pair of the lowest rank first, the leftmost of
    equals, as the library does.

    Args:
        tables: what `compile_tokenizer` gives.
        load: reads the whole tokenizer.
    """

    def __init__(self, tables: Tables, load: Callable[[], LibraryBackend]) -> None:
        self._tables = tables
        self._load = load
        self._whole: LibraryBackend | None = None
        self._work = 0
        self._words: dict[tuple[int, ...], Sequence[int]] = {}
        self._skeleton = tokenizers.Tokenizer.from_str(tables.facts["skeleton"])
        self.added_tokens: Mapping[int, tokenizers.AddedToken] = self._skeleton.get_added_tokens_decoder()
        self.vocab_size: int = tables.facts["vocab_size"]
        self.longest_token: int = tables.facts["longest_token"]

    def token_to_id(self, token: str) -> int | None:
        found: int | None = self._skeleton.token_to_id(token)
        return self._tables.find(token) if found is None else found

    def id_to_token(self, token_id: int) -> str | None:
        found: str | None = self._skeleton.id_to_token(token_id)
        return self._tables.spelling(token_id) if found is None else found

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        if self._whole is None and len(text) <= MAX_WORK - self._work:
            ids = self._merge(self._skeleton.encode(text, add_special_tokens=add_special_tokens))
            if ids is not None:
                return ids
        return self._library().encode(text, add_special_tokens=add_special_tokens)

    def encode_plain(self, text: str) -> list[int]:
        if self._whole is None and len(text) <= MAX_WORK - self._work:
            ids = self._merge(self._plain_skeleton.encode(text, add_special_tokens=False))
            if ids is not None:
                return ids
        return self._library().encode_plain(text)

    @cached_property
    def _plain_skeleton(self) -> tokenizers.Tokenizer:
        return without_added_tokens(self._skeleton)

    def _library(self) -> LibraryBackend:
        if self._whole is None:
            self._whole = self._load()
            self._words.clear()
        return self._whole

    def _merge(self, encoding: tokenizers.Encoding) -> list[int] | None:
        """The ids of a text that the skeleton has split; None where the whole tokenizer is worth its price."""
        ids: list[int] = []
        for word in _words_of(encoding):
            merged = self._words.get(word)
            if merged is None:
                self._work += len(word) * (1 + len(word) // 256)
                if self._work > MAX_WORK:
                    return None
                merged = self._words[word] = self._merge_word(word)
            ids += merged
        return ids

    def _merge_word(self, word: Sequence[int]) -> list[int]:
        rank, products = self._tables.rank, self._tables.products
        symbols = list(word)
        ranks = [rank(left, right) for left, right in pairwise(symbols)]
        while ranks and (lowest := min(ranks)) != NO_MERGE:
            place = ranks.index(lowest)
            symbols[place : place + 2] = [products[lowest]]
            del ranks[place]
            if place > 0:
                ranks[place - 1] = rank(symbols[place - 1], symbols[place])
            if place < len(ranks):
                ranks[place] = rank(symbols[place], symbols[place + 1])
        return symbols


def _words_of(encoding: tokenizers.Encoding) -> Iterator[tuple[int, ...]]:
    """The ids of each word; those that a post-processor has added are words of their own."""
    for word, pairs in groupby(zip(encoding.word_ids, encoding.ids, strict=True), key=itemgetter(0)):
        ids = tuple(token_id for _, token_id in pairs)
        if word is None:
            yield from ((token_id,) for token_id in ids)
        else:
            yield ids
