"""The `tokenizers` library as a backend."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Protocol, TypeVar

import tokenizers

from mlxqwen.errors import MlxqwenError, TokenizerError

__all__ = ["LibraryBackend", "TokenizerBackend", "guard", "without_added_tokens"]

_T = TypeVar("_T")


class TokenizerBackend(Protocol):
    """Byte-level BPE: text ↔ ids, in the alphabet of `tokenizer.json`."""

    @property
    def added_tokens(self) -> Mapping[int, tokenizers.AddedToken]:
        """By id."""

    @property
    def vocab_size(self) -> int:
        """The number of tokens, added ones included."""

    @property
    def longest_token(self) -> int:
        """Bytes of the longest token, at least 1."""

    def token_to_id(self, token: str) -> int | None: ...

    def id_to_token(self, token_id: int) -> str | None: ...

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """With added tokens recognised; `add_special_tokens` adds what the file's post-processor does."""

    def encode_plain(self, text: str) -> list[int]:
        """Without."""


class LibraryBackend:
    """All of a tokenizer, as the library reads it; truncation and padding are switched off.

    Raises:
        TokenizerError: it is not byte-level.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, source: str) -> None:
        if not isinstance(tokenizer.decoder, tokenizers.decoders.ByteLevel):
            found = "no decoder" if tokenizer.decoder is None else f"decoder {type(tokenizer.decoder).__name__}"
            raise TokenizerError(
                f"{source}: found {found}, expected ByteLevel",
                hint="Only the byte-level tokenizers of the Qwen family are supported.",
            )
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self.tokenizer = tokenizer
        self.added_tokens: Mapping[int, tokenizers.AddedToken] = tokenizer.get_added_tokens_decoder()

    @classmethod
    def parse(cls, data: bytes, source: str) -> LibraryBackend:
        """What a `tokenizer.json` holds. Raises `TokenizerError` if it is damaged, or of another kind."""
        tokenizer = guard(
            lambda: tokenizers.Tokenizer.from_buffer(data),
            f"{source}: not a readable tokenizer",
            "Download tokenizer.json anew.",
        )
        return cls(tokenizer, source)

    @cached_property
    def vocab_size(self) -> int:
        size: int = self.tokenizer.get_vocab_size(with_added_tokens=True)
        return size

    @cached_property
    def longest_token(self) -> int:
        # In the alphabet of byte-level tokens each character is one byte.
        added = (len(token.content.encode()) for token in self.added_tokens.values())
        return max(1, *map(len, self.tokenizer.get_vocab(with_added_tokens=False)), *added)

    def token_to_id(self, token: str) -> int | None:
        found: int | None = self.tokenizer.token_to_id(token)
        return found

    def id_to_token(self, token_id: int) -> str | None:
        found: str | None = self.tokenizer.id_to_token(token_id)
        return found

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def encode_plain(self, text: str) -> list[int]:
        ids: list[int] = self._plain.encode(text, add_special_tokens=False).ids
        return ids

    @cached_property
    def _plain(self) -> tokenizers.Tokenizer:
        return without_added_tokens(self.tokenizer)


def without_added_tokens(tokenizer: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """The same model behind the same normalizer and pre-tokenizer."""
    plain = tokenizers.Tokenizer(tokenizer.model)
    if tokenizer.normalizer is not None:
        plain.normalizer = tokenizer.normalizer
    if tokenizer.pre_tokenizer is not None:
        plain.pre_tokenizer = tokenizer.pre_tokenizer
    return plain


def guard(call: Callable[[], _T], problem: str, hint: str) -> _T:
    """Run code of the `tokenizers` library: its errors are bare, its panics pass by `except Exception`."""
    try:
        return call()
    except (KeyboardInterrupt, SystemExit, MemoryError, MlxqwenError):
        raise
    except BaseException as error:
        raise TokenizerError(f"{problem}: {error}", hint=hint) from error
