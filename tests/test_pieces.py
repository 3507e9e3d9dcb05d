"""Long texts are encoded in pieces, with the ids of the whole."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
import tokenizers
from tokenizers import AddedToken, Regex, normalizers, pre_tokenizers, processors

from mlxqwen.files.hub import DEMO_FOLDER
from mlxqwen.text.pieces import pieces, splits_alike
from mlxqwen.text.tokenizer import Tokenizer
from mlxqwen.text.tokenizer_file import SPLIT_PATTERNS

DEMO = Tokenizer.from_folder(DEMO_FOLDER)
# What expressions split at, what NFC joins or replaces, and what a piece could be cut at.
PARTS = [
    *("a", "Bc", "é", "e\u0301", "o\u0308", "你", "好", "한", "\u1112\u1161\u11ab", "à", "ſ", "'s", "'", "'LL"),
    *("0", "7", "12", "٣", " ", "  ", "\n", "\n\n", "\r\n", "\t", "\u00a0", "\u2000", "\u2028", "\u3000", "\x1c"),
    *(".", ",", "!", "。", "，", "(", '"', "=", "\u0338", "\u0301", "\u212b", "\u037e", "😀", "<|im_end|>", "<think>"),
]


def tokenizer(pattern: str, *, normalizer: bool = True, **byte_level: bool) -> tokenizers.Tokenizer:
    """With the demo's vocabulary, behind another expression."""
    made = tokenizers.Tokenizer.from_file(str(DEMO_FOLDER / "tokenizer.json"))
    made.normalizer = normalizers.NFC() if normalizer else None
    settings = {"add_prefix_space": False, "use_regex": False, **byte_level}
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(**settings)]
    )
    return made


@pytest.mark.parametrize("settings", [{}, {"normalizer": False}, {"add_prefix_space": True}, {"use_regex": True}])
@pytest.mark.parametrize("pattern", SPLIT_PATTERNS)
def test_ids_are_those_of_the_whole(pattern: str, settings: dict[str, bool]) -> None:
    made = tokenizer(pattern, **settings)
    assert splits_alike(made)
    random.seed(0)
    cuts = 0
    for length in (1, 2, 3, 5):
        for _ in range(150):
            text = "".join(random.choices(PARTS, k=random.randint(1, 60)))
            parts = [*pieces(text, length)]
            cuts += len(parts) - 1
            assert "".join(parts) == text
            assert [n for part in parts for n in made.encode(part).ids] == made.encode(text).ids, parts
    assert cuts > 1_000


def test_the_demos_tokenizer_takes_pieces_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "How many r's are in strawberry? 三。\n" * 5_000
    expected = DEMO._backend.encode(text).ids
    taken: list[int] = []
    call = tokenizers.Tokenizer.encode

    class Noting:
        def __getattr__(self, name: str) -> Any:
            return getattr(DEMO._backend, name)

        def encode(self, text: str, **options: Any) -> Any:
            taken.append(len(text))
            return call(DEMO._backend, text, **options)

    assert DEMO._encode(Noting(), text) == expected  # type: ignore[arg-type]
    assert max(taken) < 33_000
    assert sum(taken) == len(text)
    assert DEMO.encode(text) == expected
    taken.clear()
    assert DEMO._encode(Noting(), "a" * 40_000) == DEMO._backend.encode("a" * 40_000).ids  # type: ignore[arg-type]
    assert taken == [40_000]  # there is no place


def with_step(**step: Any) -> tokenizers.Tokenizer:
    made = tokenizer(SPLIT_PATTERNS[0])
    description = json.loads(made.to_str())
    description["pre_tokenizer"]["pretokenizers"][0] |= step
    return tokenizers.Tokenizer.from_str(json.dumps(description))


def with_token(**flags: Any) -> tokenizers.Tokenizer:
    made = tokenizer(SPLIT_PATTERNS[0])
    made.add_tokens([AddedToken(**{"content": "<x>", **flags})])
    return made


def with_template() -> tokenizers.Tokenizer:
    made = tokenizer(SPLIT_PATTERNS[0])
    made.post_processor = processors.TemplateProcessing("<think> $A", special_tokens=[("<think>", 746)])
    return made


def without_split() -> tokenizers.Tokenizer:
    made = tokenizer(SPLIT_PATTERNS[0])
    made.pre_tokenizer = pre_tokenizers.ByteLevel()
    return made


OTHERS = {
    "another expression": lambda: tokenizer(r"\p{L}+\s*"),
    "what is merged": lambda: with_step(behavior="MergedWithNext"),
    "what is inverted": lambda: with_step(invert=True),
    "ByteLevel alone": without_split,
    "a template": with_template,
    "a token that takes white space before it": lambda: with_token(lstrip=True),
    "and behind it": lambda: with_token(rstrip=True),
    "a token that is a word": lambda: with_token(single_word=True),
    "a token of two words": lambda: with_token(content="two words"),
    "a token that is cut in NFC": lambda: with_token(content="a\u037e"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_others_take_texts_as_a_whole(other: str) -> None:
    assert splits_alike(with_token())
    assert not splits_alike(OTHERS[other]())
