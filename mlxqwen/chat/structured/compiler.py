"""Grammars compiled by llguidance (https://github.com/guidance-ai/llguidance), within bounds of time and memory.

A grammar is compiled by the thread that asks. What its matchers learn on the way is shared by all of them, which makes
masks several times quicker, and grows: so a compiled grammar is shared by few requests, and lives no longer than they.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any

from mlxqwen.chat.structured.trial import UNDECIDED, compile_in_bounds, parser_limits, readable
from mlxqwen.errors import MlxqwenError, OptionError
from mlxqwen.installation import install_command
from mlxqwen.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

__all__ = ["CompiledGrammar", "GrammarCompiler", "grammar_compiler", "problem_of"]

MAX_GRAMMAR_BYTES = 2 * 2**20
MAX_REMEMBERED = 256
MAX_USES = 64
"""Requests that share a compiled grammar."""
_BYTES_OF_SMALL = 16 * 1024
# What intersects schemas or expressions, or counts, may take long: llguidance bounds the steps of parsers, not these.
_COSTLY = ("allOf", "oneOf", "attern", "multipleOf", '"format', "~", "&")

_compilers: weakref.WeakKeyDictionary[Tokenizer, dict[tuple[int, int], GrammarCompiler]] = weakref.WeakKeyDictionary()
_making = threading.Lock()


def grammar_compiler(tokenizer: Tokenizer, vocab_size: int, ends: Collection[int]) -> GrammarCompiler:
    """The compiler for a tokenizer and a model's vocabulary; made at the first call, kept while the tokenizer lives.

    Args:
        tokenizer: spells the tokens.
        vocab_size: of the model, whose vocabulary may be padded.
        ends: the tokens that end a reply.

    Raises:
        OptionError: llguidance is not installed, or no token ends a reply.
    """
    end = min((token for token in ends if token < vocab_size), default=None)
    if end is None:
        raise OptionError(
            "structured output: found no token that ends a reply, expected one in config.json or tokenizer_config.json"
        )
    with _making:
        made = _compilers.setdefault(tokenizer, {})
        if (vocab_size, end) not in made:
            made[vocab_size, end] = GrammarCompiler(_vocabulary(tokenizer, vocab_size, end))
        return made[vocab_size, end]


class GrammarCompiler:
    """Compiles grammars for one vocabulary.

    Args:
        vocabulary: llguidance's view of it.
    """

    def __init__(self, vocabulary: LLTokenizer) -> None:
        self._vocabulary = vocabulary
        self._tried: OrderedDict[str, str | None] = OrderedDict()
        self._alive: weakref.WeakValueDictionary[str, CompiledGrammar] = weakref.WeakValueDictionary()
        self._lock = threading.Lock()

    def compile(self, grammar: str, where: str, *, on_trial: str | None = None) -> CompiledGrammar:
        """A grammar in llguidance's JSON form, compiled.

        Args:
            where: what errors name.
            on_trial: the grammar without the names of tokens, if it has any.

        Raises:
            OptionError: it cannot be compiled, not within its bounds, or allows nothing.
        """
        import llguidance

        with self._lock:
            shared = self._alive.get(grammar)
            if shared is not None and shared.problem is None and shared.uses < MAX_USES:
                shared.uses += 1
                return shared
        (problem,) = self.problems([grammar if on_trial is None else on_trial])
        if problem is None:
            matcher = llguidance.LLMatcher(self._vocabulary, grammar, log_level=0, limits=parser_limits())
            made = CompiledGrammar(matcher)
            problem = made.problem
        if problem is not None:
            raise OptionError(
                f"{where}: found what cannot be compiled: {problem}",
                hint="Leave out what it names, or say it in another way.",
            )
        with self._lock:
            self._alive[grammar] = made
        return made

    def problems(self, grammars: Sequence[str]) -> list[str | None]:
        """Why each grammar cannot be compiled in bounds; None if it can, or is plain enough to be just tried."""
        too_long = f"more than {MAX_GRAMMAR_BYTES:,} characters"
        found = {one: too_long for one in grammars if len(one) > MAX_GRAMMAR_BYTES}
        tried = [one for one in dict.fromkeys(grammars) if one not in found and _may_be_costly(one)]
        with self._lock:
            known = {one: self._tried[one] for one in tried if one in self._tried}
        new = [one for one in tried if one not in known]
        if new:
            known.update(zip(new, compile_in_bounds(new), strict=True))
            with self._lock:
                self._tried.update((one, problem) for one, problem in known.items() if problem != UNDECIDED)
                while len(self._tried) > MAX_REMEMBERED:
                    self._tried.popitem(last=False)
        return [found.get(one, known.get(one)) for one in grammars]


class CompiledGrammar:
    """A grammar at its beginning.

    Args:
        start: a matcher that has taken nothing yet.

    Attributes:
        problem: why it cannot be used; None if it can.
        first: packed bits of the tokens that it may begin with.
        may_be_empty: whether the empty text fits it.
        uses: how many requests have shared it.
    """

    def __init__(self, start: LLMatcher) -> None:
        self._start = start
        self.problem = problem_of(start)
        self.uses = 1
        self.first = b""
        self.may_be_empty = False
        if self.problem is None:
            first = start.deep_copy()
            self.first, self.may_be_empty = first.compute_bitmask(), first.is_accepting()
            self.problem = problem_of(first) or (None if any(self.first) else "it allows no text")

    def begin(self) -> LLMatcher:
        """A matcher of its own."""
        return self._start.deep_copy()


def _may_be_costly(grammar: str) -> bool:
    return len(grammar) > _BYTES_OF_SMALL or any(mark in grammar for mark in _COSTLY)


def problem_of(matcher: LLMatcher) -> str | None:
    """Why a matcher cannot go on, in a line; None if it can."""
    if not matcher.is_error():
        return None
    return readable(matcher.get_error())


class _Vocabulary:
    """What llguidance asks of a tokenizer. It must not hold the `Tokenizer`, which would never be let go."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(
        self, tokens: Sequence[bytes], special: Sequence[int], end: int, encode: Callable[[str], list[int]]
    ) -> None:
        self.tokens = tokens
        self.special_token_ids = special
        self.eos_token_id = end
        self._encode = encode

    def __call__(self, text: str) -> list[int]:
        return self._encode(text)


def _vocabulary(tokenizer: Tokenizer, vocab_size: int, end: int) -> Any:
    try:
        import llguidance
    except ImportError:
        raise OptionError(
            "structured output: found no llguidance, which keeps replies to a grammar",
            hint=f"Install it: {install_command('structured')}",
        ) from None
    added = tokenizer.added_token_ids
    # Names that no grammar can spell: a token of the tokenizer's own is never text.
    tokens = [f"\xff{n}".encode("latin-1") if n in added else tokenizer.token_bytes(n) for n in range(vocab_size)]
    special = [token for token in sorted(added) if token < vocab_size]
    vocabulary: Any = _Vocabulary(tokens, special, end, tokenizer.plain_encoder())
    try:
        return llguidance.LLTokenizer(vocabulary, n_vocab=vocab_size, eos_token=[end])
    except MlxqwenError:
        raise
    except Exception as cause:
        raise OptionError(f"structured output: this tokenizer cannot be used: {cause}") from None
