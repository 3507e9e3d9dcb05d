"""Random chat templates that try to take time, memory or Python objects.

With fewer steps than `meter.MAX_STEPS` has elsewhere more templates are tried; the time allowed follows the steps.
`tests/test_template_fuzz.py` runs some seeds.
"""

from __future__ import annotations

import random
import re
import time
import tracemalloc
from contextlib import suppress
from typing import Any

from mlxqwen.errors import TemplateError
from mlxqwen.text.sandbox import environment, meter, render

STEPS = 50_000
STEP_SECONDS = 10e-6  # ten times what a step takes at most on an idle core of 2024
PYTHON = re.compile(r"<(class|function|built-in|bound|module|generator|jinja2|.* at 0x)|0x7f[0-9a-f]{8}")
CALL = {"function": {"name": "f", "arguments": {"a": [1, None]}}}
VARIABLES: dict[str, Any] = {
    "messages": [
        {"role": "user", "content": "Hello <|im_end|> 漢字 \U0001f600"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "x y\nz" * 20},
    ],
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
    "big": 10**30,
}
PRELUDE = (
    "{% set n = namespace(t='ab', l=[1], i=1) %}{% set t, u, i = 'a b', '€é', 3 %}"
    "{% set l, k, d = [1, 2], ['x'], {'a': 1} %}{% set turn = cycler('a', 'b') %}{% set comma = joiner() %}"
    "{% macro m(x='a', y=1) %}{{ x }}{{ varargs }}{% endmacro %}"
)

ENVIRONMENT = environment.make_environment()
FILTERS = sorted(name for name in ENVIRONMENT.filters if name.isalpha())
TESTS = sorted(name for name in ENVIRONMENT.tests if name.isalpha())
METHODS = sorted(environment.ATTRIBUTES[str])
ATTRIBUTES = sorted(set().union(*environment.ATTRIBUTES.values()))
ATTRIBUTES += ["__class__", "__globals__", "__init__", "format", "append", "update", "_asdict", "mro", "role", "t"]
OPERATORS = ["+", "-", "*", "/", "//", "%", "**", "~", "==", "<", ">=", "in", "not in", "and", "or"]
ODD = ["missing", "self", "loop", "caller", "m", "n", "namespace", "range", "cycler", "turn", "comma", "big", "none"]
# @T is a text, @L a list, @D a dict, @I an integer, @O anything, @F a filter, @M a method, @A an attribute, @P a test,
# @Q an operator, @B a statement.
TEXTS = [
    "t", "u", "n.t", "'ab'", "''", "('1' * 9999)", "('a,' * 9999)", "messages[0].content", "'%s %5d'", "'x\\n'",
    "(@T + @T)", "(@T ~ @O)", "(@T * @I)", "@T[@I:@I]", "@T[::-1]", "(@T | @F)", "(@T | replace(@T, @T))",
    "@T.replace(@T, @T)", "@T.join(k)", "(@L | join(@T))", "(@O | tojson)", "(@O | tojson(indent=@I))",
    "(@O | string)", "('%s%s' % (@O, @T))", "('%(a)s%(a)s' % @D)", "(@T | format(@O, @I))", "@T.center(@I)",
    "@T.zfill(@I)", "(@T | indent(@I))", "(@T if @O else @T)", "m(@T, @I, @O)", "turn.next()", "comma()",
    "@T.strip(@T)", "@T.partition(@T)[0]", "@T.@M()", "@T.@M(@T)", "(@T | e)"
]  # fmt: skip
LISTS = [
    "l", "k", "n.l", "[]", "[@O]", "[@O, @O]", "(@O, @O)", "(@L + @L)", "(@L * @I)", "@L[@I:]", "@L[::-1]",
    "(range(@I) | list)", "@T.split(@T)", "@T.split()", "@T.rsplit(@T)", "@T.splitlines()", "(@T | list)",
    "(@L | map('@F') | list)", "(@L | sort)", "(@L | map(attribute=@T) | list)", "(@L | select('@P') | list)",
    "(@L | unique | list)", "(@L | batch(@I, @O) | list)", "(@L | groupby(@T))", "(@D | dictsort)",
    "(@D | items | list)", "(@D.items() | list)", "(@L | map('replace', @T, @T) | list)",
    "(@L | map('int', base=16) | list)", "messages", "(@L | reverse | list)",
    "(@L | selectattr(@T, '@P', @O) | list)"
]  # fmt: skip
DICTS = [
    "d", "{}", "{'a': @O, @T: @O}", "@D.copy()", "dict(a=@O)", "dict(@L | batch(2))", "dict(@D, b=@O)", "messages[1]"
]  # fmt: skip
INTEGERS = [
    "i", "n.i", "0", "(-1)", "7", "99999", "(10 ** 10)", "(@I + @I)", "(@I * @I)", "(@I ** @I)", "(@I // @I)",
    "(@I % @I)", "(-@I)", "(@T | length)", "(@L | length)", "(@T | int)", "@T.count(@T)", "@T.find(@T)", "(@L | sum)",
    "(1.5 | round(@I) | int)", "(@T | int(base=36))", "@L.index(@O)", "(@T | wordcount)", "@T.rfind(@T)"
]  # fmt: skip
OTHERS = [
    "@T", "@L", "@D", "@I", "(@O @Q @O)", "(@O | @F)", "(@O | @F(@O))", "(@O | @F(@O, @A=@O))", "(@O).@A",
    "(@O).@A(@O)", "(@O)[@O]", "@O[@O:@O]", "(@O is @P)", "(@O is @P(@O))", "(@O if @O else @O)", "1.5", "1e308",
    "(@T in @T)", "(@O in @L)", "@T.@M(@I)", "(@O | @F(@T, @I))"
]  # fmt: skip
CHOICES = {"T": TEXTS, "L": LISTS, "D": DICTS, "I": INTEGERS, "O": [*OTHERS, *ODD]}
NAMES = {"F": FILTERS, "M": METHODS, "A": ATTRIBUTES, "P": TESTS, "Q": OPERATORS}
STATEMENTS = [
    "{{ @O }}",
    "{% set t = @T %}",
    "{% set l = @L %}",
    "{% set d = @D %}",
    "{% set i = @I %}",
    "{% set n.t = @T %}",
    "{% set n.t = n.t ~ @T %}",
    "{% set n.l = n.l + [@O] %}",
    "{% set n.l = [n.l, n.l, @O] %}",
    "{% set n.i = n.i * @I + 1 %}",
    "{% set n.t %}@B@B{% endset %}",
    "{% if @O %}@B{% else %}@B{% endif %}",
    "{% for i in @L %}@B{% endfor %}",
    "{% for i in range(99999) %}@B@B{% endfor %}",
    "{% for i in range(99999) if @O %}@B{% endfor %}",
    "{% for i in @L recursive %}@B{{ loop(@L) }}{% endfor %}",
    "{% macro m(t, i=1) %}@B{{ varargs }}{{ kwargs }}{% endmacro %}{{ m(@T, @O, @O) }}",
    "{% macro m(t=1) %}@B{{ m(t) }}{{ m(t) }}{% endmacro %}{{ m() }}",
    "{% macro m() %}{{ caller() }}@B{{ caller() }}{% endmacro %}{% call m() %}@B{% endcall %}",
    "{% filter upper %}@B{% endfilter %}",
    "{% with t = @T, l = @L %}@B{% endwith %}",
    "text\n",
]


SIMPLE = {
    "T": TEXTS[:10],
    "L": ["l", "k", "n.l", "[]", "messages"],
    "D": ["d", "{}", "messages[1]"],
    "I": INTEGERS[:7],
    "O": ["t", "l", "d", "i", *ODD],
}


def make_template(seed: int) -> str:
    """The template of a seed."""
    choose = random.Random(seed).choice

    def fill(text: str, depth: int) -> str:
        def one(found: re.Match[str]) -> str:
            kind = found[1]
            if kind in NAMES:
                return choose(NAMES[kind])
            if kind == "B":
                return fill(choose(STATEMENTS), depth - 1) if depth > 0 else "x"
            return fill(choose(CHOICES[kind] if depth > 0 else SIMPLE[kind]), depth - 1)

        return re.sub("@([TLDIOFMAPQB])", one, text)

    return PRELUDE + "".join(fill("@B", 4) for _ in range(choose([1, 2, 3, 4]))) + "{{ n.t }}"


def broken_rule(source: str) -> str | None:
    """What a template has broken: an object of Python's in its text, or memory. None if nothing."""
    try:
        environment.compile_template(source)
    except Exception:  # `render` tells it again, as a TemplateError
        return None
    tracemalloc.start()
    try:
        text = render(source, VARIABLES)
    except TemplateError:
        text = ""  # Jinja's errors may name an object, by its type and address
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # 8 bytes for each unit, and what one operation adds to that.
    if peak > 8 * meter.MAX_MADE + 64 * meter.MAX_VALUE:
        return f"{peak / 2**20:.0f} MiB"
    found = PYTHON.search(text)
    return f"printed {found[0]}" if found else None


def check(seed: int) -> str | None:
    """What the template of a seed has broken: `broken_rule`, or the time that its steps take. None if nothing."""
    source = make_template(seed)
    limit, meter.MAX_STEPS = meter.MAX_STEPS, STEPS
    started = time.thread_time()
    try:
        with suppress(TemplateError):
            render(source, VARIABLES)
        seconds = time.thread_time() - started
        if seconds > 0.2 + STEP_SECONDS * STEPS:
            return f"{seconds:.1f} s\n{source}"
        problem = broken_rule(source) if seed % 4 == 0 else None  # measuring memory takes several times as long
        return f"{problem}\n{source}" if problem else None
    finally:
        meter.MAX_STEPS = limit
