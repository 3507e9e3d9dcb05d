"""Words and numbers for the demo model's data, with one in eight held out from training.

What is held out is decided by hash, so that training and evaluation never share a word or a pair of numbers.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Split = Literal["train", "held-out"]

# Words and prompts of Qwen3's model cards: people will try them, so they are never trained on.
CARD_WORDS = ("strawberry", "strawberries", "blueberry", "blueberries")
CARD_PROMPTS = (
    "Hello, please introduce yourself and tell me what you can do.",
    "Give me a short introduction to large language model.",
    "Give me a short introduction to large language models.",
    "Give me a detailed introduction to large language model.",
    "In a single sentence.",
    "Really?",
)

_WORDS = tuple(Path(__file__).with_name("words.txt").read_text(encoding="utf-8").split())


def _parts(text: str, empty: int = 0) -> tuple[str, ...]:
    return (*text.split(), *[""] * empty)


_ONSETS = _parts(
    "b c d f g h j k l m n p r s t v w y z bl br ch cl cr dr fl fr gl gr kn ph pl pr qu sc sh sk sl sm sn sp "
    "st str sw th tr tw wh wr spr spl scr thr",
    empty=6,
)
_NUCLEI = _parts("a e i o u a e i o u a e i o u ai au ay ea ee ei eu ie oa oi oo ou ow ue y aw ew")
_CODAS = _parts(
    "b ck d ff g ll m n ng nd nk nt p r rd rk rm rn rr rry rt s ss st t tt tch th x zz mp lt ld lf sk sp ct "
    "ft ry ly ies es er ers ing ed",
    empty=16,
)
_ALPHABET = "abcdefghijklmnopqrstuvwxyz"
_COMMON_LETTERS = "eeeaaarrriiooottnnssslllcuudppmhgbfywkvxzjq"


def in_split(key: str, split: Split) -> bool:
    """Whether `key` belongs to `split`: one key in eight is held out, by its CRC-32."""
    return (zlib.crc32(key.encode()) % 8 == 0) == (split == "held-out")


@dataclass(frozen=True)
class Source:
    """Where words and numbers come from: a random generator, a split, and pieces of words to practise."""

    random: random.Random
    split: Split = "train"
    pieces: Sequence[str] = ()
    only_common_words: bool = False

    def word(self, shortest: int = 3, longest: int = 14) -> str:
        """A lower-case word of the split, `shortest` to `longest` letters, never one of the cards'."""
        while True:
            word = self._any_word()
            if (
                shortest <= len(word) <= longest
                and in_split(word, self.split)
                and not word.startswith(("strawb", "blueb"))
            ):
                return word

    def _any_word(self) -> str:
        draw, choice = self.random.random(), self.random.choice
        if draw < 0.2 or self.only_common_words:
            return choice(_WORDS)
        if draw < 0.5 and self.pieces:
            return "".join(choice(self.pieces) for _ in range(self.random.randint(1, 4)))
        if draw < 0.6:
            return "".join(self.random.choices(_COMMON_LETTERS, k=self.random.randint(3, 12)))
        if draw < 0.7:
            word = self._pseudo_word()
            at = self.random.randrange(len(word))
            return word[:at] + word[at] * self.random.randint(1, 2) + word[at:]
        return self._pseudo_word()

    def _pseudo_word(self) -> str:
        choice = self.random.choice
        syllables = self.random.choices((1, 2, 3, 4), (1, 4, 4, 2))[0]
        return "".join(choice(_ONSETS) + choice(_NUCLEI) + choice(_CODAS) for _ in range(syllables))

    def letter(self, word: str) -> str:
        """A letter to count in `word`: mostly one that it has, often one that it repeats."""
        draw = self.random.random()
        repeated = [letter for letter in word if word.count(letter) > 1]
        if draw < 0.45 and repeated:
            return self.random.choice(repeated)
        if draw < 0.8:
            return self.random.choice(word)
        return self.random.choice(_ALPHABET)

    def number(self) -> int:
        """A number of one to three digits."""
        digits = self.random.choices((1, 2, 3), (1, 3, 4))[0]
        return self.random.randrange(10 ** (digits - 1) if digits > 1 else 0, 10**digits)

    def numbers(self, operator: str) -> tuple[int, int]:
        """Two numbers whose pair is of the split; for a difference the first is not the smaller."""
        while True:
            first, second = self.number(), self.number()
            if operator == "-" and first < second:
                first, second = second, first
            if self.has_numbers(first, operator, second):
                return first, second

    def has_numbers(self, first: int, operator: str, second: int) -> bool:
        """Whether a pair is of the split; a held-out one may not have been trained on in the other order either."""
        orders = {f"{first}{operator}{second}"}
        if self.split == "held-out" and operator in "+*":
            orders.add(f"{second}{operator}{first}")
        return all(in_split(order, self.split) for order in orders)
