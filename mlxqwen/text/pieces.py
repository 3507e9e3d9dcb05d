"""A long text in pieces whose ids, one after the other, are those of the whole.

The `tokenizers` library encodes a text in one call, during which nothing else runs and Ctrl-C is not heard, and holds
some 250 bytes for each of its bytes. It is cut where Qwen's expressions split it whatever stands around: none of their
matches goes on from a line feed to what is no white space, nor from a letter to a blank, digit or mark, and what they
match behind such a place does not depend on what stands before it. NFC joins nothing across it.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterator
from typing import Any

import tokenizers

from mlxqwen.text.tokenizer_file import SPLIT_PATTERNS

__all__ = ["pieces", "splits_alike"]

_PLACE = re.compile(r"(?<=\n)(?=\S)|(?<=[A-Za-z\u4e00-\u9fff])(?=[ 0-9,.;:!?、。，：；！？])")


def pieces(text: str, length: int) -> Iterator[str]:
    """Pieces of `length` characters and those up to the next place to cut, which together are `text`."""
    start = 0
    while (place := _PLACE.search(text, start + length)) is not None:
        yield text[start : place.start()]
        start = place.start()
    yield text[start:]


def splits_alike(backend: tokenizers.Tokenizer) -> bool:
    """Whether a tokenizer gives pieces the ids that they have in the whole: Qwen's do.

    What a file may have beside that: another expression first, added tokens that take white space in, look at what
    stands beside them or could be cut, and tokens that are put before or behind each text.
    """
    normalizer, pre_tokenizer = _settings(backend.normalizer), _settings(backend.pre_tokenizer)
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    first = steps[0] if steps else {}
    isolates = first.get("behavior") == "Isolated" and first.get("invert") is False
    return (
        (not normalizer or normalizer.get("type") == "NFC")
        and first.get("type") == "Split"
        and isolates
        and first["pattern"].get("Regex") in SPLIT_PATTERNS
        and backend.num_special_tokens_to_add(False) == 0
        and not any(map(_depends, backend.get_added_tokens_decoder().values()))
    )


def _settings(part: Any) -> dict[str, Any]:
    """What a normalizer or pre-tokenizer is made of, as in `tokenizer.json`; nothing without one."""
    settings: dict[str, Any] = {} if part is None else json.loads(part.__getstate__())
    return settings


def _depends(token: tokenizers.AddedToken) -> bool:
    """Whether an added token is another one, or none, where a text is cut beside it or in it."""
    forms = token.content, unicodedata.normalize("NFC", token.content)
    return token.lstrip or token.rstrip or token.single_word or any(map(_PLACE.search, forms))
