"""A grammar compiled on trial, in a process of its own that has little time and memory.

Schemas and expressions of strangers may take minutes and gigabytes to compile (patterns that are intersected, divisors
of many digits), and a thread that compiles cannot be ended.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llguidance import LLParserLimits

__all__ = ["UNDECIDED", "compile_in_bounds", "parser_limits", "readable"]

MAX_LEXER_STATES = 20_000  # of up to 3 kB
MAX_GRAMMAR_SIZE = 200_000

MAX_SECONDS = 3
"""Of one processor, for each grammar."""
MAX_WAIT = 20
"""Seconds until the answers of a call are given up: there are many grammars, or the machine has other things to do."""
MAX_MEMORY = 2 * 2**30

_PROGRAM = """
import json, math, resource, sys, time
def bound(kind, most):
    try:
        resource.setrlimit(kind, (most, resource.getrlimit(kind)[1]))
    except (OSError, ValueError):
        pass  # macOS bounds no memory
bound(resource.RLIMIT_AS, int(sys.argv[3]))
bound(resource.RLIMIT_CORE, 0)
sys.path.append(sys.argv[1])
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
class Bytes:
    is_tokenizer_wrapper, bos_token_id, eos_token_id, special_token_ids = True, None, 256, [256]
    tokens = [bytes([n]) for n in range(256)] + [b"end"]
    def __call__(self, text):
        return list(text.encode())
vocabulary = LLTokenizer(Bytes(), n_vocab=257, eos_token=[256])
states, size = map(int, sys.argv[4:])
limits = LLParserLimits(max_lexer_states=states, max_grammar_size=size, verbose_errors=False)
for grammar in json.load(sys.stdin):
    bound(resource.RLIMIT_CPU, math.ceil(time.process_time()) + int(sys.argv[2]))
    matcher = LLMatcher(vocabulary, grammar, log_level=0, limits=limits)
    if not matcher.is_error():
        matcher.compute_bitmask()
    print(json.dumps(matcher.get_error() if matcher.is_error() else None), flush=True)
    matcher = None  # so that the next one has the memory
"""

_TOO_LONG = f"it takes more than {MAX_SECONDS} seconds or {MAX_MEMORY // 2**30} GB to compile"
UNDECIDED = f"no answer came within {MAX_WAIT} seconds"
"""What is said of a grammar that may be innocent: others took the time, or the machine had other things to do."""
_trials = threading.BoundedSemaphore(2)


def parser_limits() -> LLParserLimits:
    """The limits of llguidance's own."""
    import llguidance

    return llguidance.LLParserLimits(
        max_lexer_states=MAX_LEXER_STATES, max_grammar_size=MAX_GRAMMAR_SIZE, verbose_errors=False
    )


def readable(error: str) -> str:
    """The first line of an error of llguidance's."""
    line = error.strip().partition("\n")[0][:300]
    return "no text fits it" if not line or line.startswith("NoExtension") else line


def compile_in_bounds(grammars: Sequence[str]) -> list[str | None]:
    """Why each grammar in llguidance's JSON form cannot be compiled; None if it can, `UNDECIDED` if time ran out.

    They are compiled for a vocabulary of single bytes, so they may name no tokens. Each has the bounds to itself: a
    process that ends early says something of the grammar that it was at, and the others get another process.
    """
    answers: list[str | None] = []
    with _trials:
        deadline = time.monotonic() + MAX_WAIT
        while len(answers) < len(grammars):
            found, is_over = _answers(grammars[len(answers) :], deadline - time.monotonic())
            answers += found
            if not is_over:
                break
            if len(answers) < len(grammars):
                answers.append(_TOO_LONG)
    return answers + [UNDECIDED] * (len(grammars) - len(answers))


def _answers(grammars: Sequence[str], seconds: float) -> tuple[list[str | None], bool]:
    """What one process says of the grammars, in order, as far as it comes; whether it ended in `seconds`."""
    import llguidance

    if seconds <= 0:
        return [], False
    folder = str(Path(llguidance.__file__).parent.parent)
    bounds = map(str, (MAX_SECONDS, MAX_MEMORY, MAX_LEXER_STATES, MAX_GRAMMAR_SIZE))
    process = subprocess.Popen(
        [sys.executable, "-I", "-c", _PROGRAM, folder, *bounds],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        encoding="utf-8",
    )
    is_over = True
    try:
        output, _ = process.communicate(json.dumps(list(grammars)), timeout=seconds)
    except BaseException as cause:
        process.kill()
        output, _ = process.communicate()
        if not isinstance(cause, subprocess.TimeoutExpired):
            raise
        is_over = False
    told = [json.loads(line) for line in output.splitlines(keepends=True) if line.endswith("\n")]
    return [None if one is None else readable(one) for one in told], is_over
