"""A tokenizer from tables: the library splits, the tables merge."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from heapq import heapify, heappop, heappush
from itertools import groupby, pairwise
from operator import itemgetter

import tokenizers

from mlxqwen.errors import TokenizerError
from mlxqwen.text.tokenizer_backend.library import LibraryBackend, guard, without_added_tokens
from mlxqwen.text.tokenizer_backend.tables import NO_MERGE, DamagedTablesError, Tables

__all__ = ["MAX_WORK", "CompiledBackend"]

logger = logging.getLogger("mlxqwen")

MAX_WORK = 64 * 1024
"""Bytes that are merged in Python before the whole tokenizer is read: about as much time as reading it takes."""

_SHORT = 64  # bytes of a word up to which a search for the lowest rank is quicker than a heap


class CompiledBackend:
    """What `compiler.compile_tokenizer` has made tables of; equal to it in all that it gives.

    The library works on a skeleton: the tokenizer without merges, its vocabulary the 256 bytes and the added tokens.
    Normalizer, added tokens, pre-tokenizer and post-processor are those of the file, so the ids that come out are those
    of single bytes, word by word. BPE then merges within a word, the pair of the lowest rank first, the leftmost of
    equals, as the library does.

    Args:
        tables: what `compile_tokenizer` gives.
        load: reads the whole tokenizer. If it raises `TokenizerError`, the tables go on alone: slower, with the same
            ids.

    Raises:
        DamagedTablesError: the tables' facts are not those of a tokenizer.
    """

    def __init__(self, tables: Tables, load: Callable[[], LibraryBackend]) -> None:
        self._tables = tables
        self._load = load
        self._whole: LibraryBackend | None = None
        self._is_alone = False
        self._work = 0
        self._words: dict[tuple[int, ...], Sequence[int]] = {}
        try:
            self._skeleton = guard(lambda: tokenizers.Tokenizer.from_str(tables.facts["skeleton"]), "skeleton", "")
            self.vocab_size, self.longest_token = (int(tables.facts[name]) for name in ("vocab_size", "longest_token"))
        except (TokenizerError, KeyError, TypeError, ValueError, OverflowError) as cause:
            raise DamagedTablesError("not the facts of a tokenizer") from cause
        self.added_tokens: Mapping[int, tokenizers.AddedToken] = self._skeleton.get_added_tokens_decoder()

    def token_to_id(self, token: str) -> int | None:
        found: int | None = self._skeleton.token_to_id(token)
        return self._tables.find(token) if found is None else found

    def id_to_token(self, token_id: int) -> str | None:
        found: str | None = self._skeleton.id_to_token(token_id)
        return self._tables.spelling(token_id) if found is None else found

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        ids = self._merge(text, lambda: self._skeleton.encode(text, add_special_tokens=add_special_tokens))
        if ids is not None:
            return ids
        library = self._library()
        if library is None:
            return self.encode(text, add_special_tokens=add_special_tokens)
        return library.encode(text, add_special_tokens=add_special_tokens)

    def encode_plain(self, text: str) -> list[int]:
        ids = self._merge(text, lambda: self._plain_skeleton.encode(text, add_special_tokens=False))
        if ids is not None:
            return ids
        library = self._library()
        return self.encode_plain(text) if library is None else library.encode_plain(text)

    @cached_property
    def _plain_skeleton(self) -> tokenizers.Tokenizer:
        return without_added_tokens(self._skeleton)

    def _library(self) -> LibraryBackend | None:
        """The whole tokenizer; None if it is there no more, and the tables are alone from now on."""
        if self._whole is None:
            try:
                self._whole = self._load()
            except TokenizerError as error:
                self._is_alone = True
                logger.warning("%s; its compiled tables go on alone, with the same ids but slower", error.problem)
            self._words.clear()
        return self._whole

    def _merge(self, text: str, split: Callable[[], tokenizers.Encoding]) -> list[int] | None:
        """The ids of a text that `split` splits; None where the whole tokenizer is worth its price, or is there."""
        if not self._is_alone and (self._whole is not None or len(text) > MAX_WORK - self._work):
            return None
        ids: list[int] = []
        for word in _words_of(split()):
            merged = self._words.get(word)
            if merged is None:
                self._work += len(word)
                if self._work > MAX_WORK:
                    if not self._is_alone:
                        return None
                    self._words.clear()
                    self._work = 0
                merged = self._words[word] = self.merge_word(word)
            ids += merged
        return ids

    def merge_word(self, word: Sequence[int]) -> list[int]:
        """The ids of bytes → those of the word's tokens."""
        return self._merge_short(word) if len(word) <= _SHORT else self._merge_long(word)

    def _merge_long(self, word: Sequence[int]) -> list[int]:
        """In n · log n: the pairs wait in a heap, those that have changed since they came into it are passed over."""
        rank, products = self._tables.rank, self._tables.products
        symbols: list[int | None] = [*word]
        before, after = [*range(-1, len(word) - 1)], [*range(1, len(word) + 1)]
        waiting = [(found, place) for place, pair in enumerate(pairwise(word)) if (found := rank(*pair)) != NO_MERGE]
        heapify(waiting)

        def rank_at(place: int) -> int:
            left = symbols[place] if place >= 0 else None
            right = symbols[after[place]] if left is not None and after[place] < len(symbols) else None
            return NO_MERGE if left is None or right is None else rank(left, right)

        while waiting:
            lowest, place = heappop(waiting)
            if rank_at(place) != lowest:
                continue
            taken = after[place]
            symbols[place], symbols[taken] = products[lowest], None
            after[place] = after[taken]
            if after[taken] < len(symbols):
                before[after[taken]] = place
            for changed in (before[place], place):
                if (found := rank_at(changed)) != NO_MERGE:
                    heappush(waiting, (found, changed))
        return [symbol for symbol in symbols if symbol is not None]

    def _merge_short(self, word: Sequence[int]) -> list[int]:
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
