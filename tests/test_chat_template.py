"""Chat templates: transformers' text and ids, and templates that mean harm."""

import copy
import json
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mlxqwen.errors import MessagesError, OptionError, TemplateError
from mlxqwen.text.sandbox import render
from tests.test_tokenizer import QWEN

CASES = json.loads((Path(__file__).parent / "golden" / "chat_template.json").read_text())["cases"]
USER = {"role": "user", "content": "Hello"}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_text_and_ids_of_transformers(case: dict[str, Any]) -> None:
    arguments = {key: value for key, value in case.items() if key not in ("name", "text", "ids")}
    before = copy.deepcopy(arguments)
    assert QWEN.apply_chat_template(**arguments, tokenize=False) == case["text"]
    assert QWEN.apply_chat_template(**arguments) == case["ids"]
    assert arguments == before


def text(*messages: Any, **arguments: Any) -> str:
    return QWEN.apply_chat_template(list(messages), tokenize=False, **arguments)


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    assert text({"role": "user", "content": parts}) == text(USER)


@pytest.mark.parametrize("content", [{}, {"content": None}])
def test_missing_content_beside_tool_calls_is_empty(content: dict[str, Any]) -> None:
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    assert text(USER, {**call, **content}) == text(USER, {**call, "content": ""})


def test_enable_thinking_none_is_undefined() -> None:
    template = "{{ enable_thinking is defined }}"
    assert text(USER, chat_template=template) == "False"
    assert text(USER, chat_template=template, enable_thinking=False) == "True"


def test_special_tokens_are_variables() -> None:
    template = "{{ eos_token }}{{ pad_token }}{{ bos_token is defined }}"
    assert text(USER, chat_template=template) == "<|im_end|><|endoftext|>False"


@pytest.mark.parametrize(
    ("messages", "named"),
    [
        (None, "messages: found null"),
        ("Hello", "messages: found text"),
        (USER, "messages: found an object"),
        ([], "empty list"),
        (["Hello"], r"messages\[0\]: found text"),
        ([USER, {"content": "x"}], r"messages\[1\]: role: found none"),
        ([{"role": 3, "content": "x"}], "role: found 3"),
        ([{"role": "user"}], "content: found none"),
        ([{"role": "user", "content": None}], "content: found none"),
        ([{"role": "user", "content": 3}], "content: found a number"),
        ([{"role": "user", "content": [{"type": "image"}]}], r"content\[0\]: found 'image'"),
        ([{"role": "user", "content": "a\ud800"}], "surrogate"),
        ([{"role": "assistant", "content": "", "tool_calls": [{"\udc00": 1}]}], "surrogate"),
        ([{"role": "user", "content": "x", "when": datetime(2026, 1, 1)}], "when: found datetime"),
    ],
)
def test_bad_messages_are_named(messages: Any, named: str) -> None:
    with pytest.raises(MessagesError, match=named):
        QWEN.apply_chat_template(messages)


def test_endless_nesting_is_refused() -> None:
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(MessagesError, match="nested deeper"):
        QWEN.apply_chat_template([{**USER, "tool_calls": loop}])


@pytest.mark.parametrize("tools", ["f", [print], {"name": "f"}, ["f"]])
def test_tools_must_be_schemas(tools: Any) -> None:
    with pytest.raises(MessagesError, match="tools"):
        QWEN.apply_chat_template([USER], tools=tools)


def test_arguments_that_contradict_or_mean_nothing_here() -> None:
    with pytest.raises(OptionError, match="exclude each other"):
        text(USER, continue_final_message=True, add_generation_prompt=True)
    with pytest.raises(OptionError, match="return_tensors"):
        text(USER, return_tensors="np")
    assert text(USER, return_dict=False) == text(USER)


def test_a_message_that_the_template_drops_cannot_be_continued() -> None:
    with pytest.raises(MessagesError, match="does not appear"):
        text(USER, {"role": "assistant", "content": "x"}, continue_final_message=True, chat_template="y")


def test_continued_message_that_holds_text_like_a_marker() -> None:
    assert text({"role": "user", "content": "CONTINUE_FINAL_MESSAGE_TAG x"}, continue_final_message=True).endswith(
        "CONTINUE_FINAL_MESSAGE_TAG x"
    )


# --- arguments of calls, as text and as objects -------------------------------------------------------

# How templates write a call's arguments: Qwen3 (either), Qwen2.5 and Hermes, Qwen3-Coder, Gemma 4, DeepSeek-R1.
EITHER = "{% if a is string %}{{ a }}{% else %}{{ a | tojson }}{% endif %}"
AS_JSON = "{{ a | tojson }}"
WALKING = "{% for k, v in a | items %}<parameter={{ k }}>{{ v | tojson if v is mapping else v }}{% endfor %}"
WALKING_OR_TEXT = (
    "{% if a is mapping %}{% for k, v in a.items() %}<{{ k }}>{{ v }}{% endfor %}{% else %}{{ a }}{% endif %}"
)
AS_TEXT = "{{ 'json ' + a }}"
PRINTING = "{{ a }}"
CALLS = (
    "{% for m in messages %}{% for c in m.tool_calls or [] %}{% set a = c.function.arguments %}%s{% endfor %}"
    "{{ m.content }}{% endfor %}"
)


def with_arguments(arguments: Any) -> list[dict[str, Any]]:
    calls = [{"id": "abcdefghi", "type": "function", "function": {"name": "f", "arguments": arguments}}]
    return [USER, {"role": "assistant", "content": "", "tool_calls": calls}, {"role": "tool", "content": "done"}]


@pytest.mark.parametrize("arguments", ['{"b":1,  "c": {"d": [2]}}', '{"b": "\\u00e9 \\ud83d\\ude00"}', "{}"])
@pytest.mark.parametrize(
    ("how", "as_object"),
    [(EITHER, False), (AS_JSON, True), (WALKING, True), (WALKING_OR_TEXT, True), (AS_TEXT, False), (PRINTING, False)],
)
def test_text_of_an_object_is_an_object_where_the_template_needs_one(how: str, as_object: bool, arguments: str) -> None:
    source = CALLS.replace("%s", how)
    messages = with_arguments(arguments)
    before = copy.deepcopy(messages)
    given = with_arguments(json.loads(arguments)) if as_object else messages
    expected = render(source, {"messages": [{**m, "content": m["content"]} for m in given]})
    assert text(*messages, chat_template=source) == expected
    assert messages == before


@pytest.mark.parametrize("arguments", ['{"b":1}', "{}", "", "null", "[1]", "no JSON", '{"b": NaN}', '{"b": "\\ud800"}'])
def test_qwen3_s_template_writes_text_as_it_is(arguments: str) -> None:
    assert f'"arguments": {arguments}}}' in text(*with_arguments(arguments))


@pytest.mark.parametrize("arguments", ["", "null", "[1]", "no JSON", '{"b": NaN}', '{"b": "\\ud800"}', "[" * 10_000])
def test_text_that_holds_no_object_stays_text(arguments: str) -> None:
    assert (
        text(*with_arguments(arguments), chat_template=CALLS.replace("%s", AS_JSON))
        == f"Hello{json.dumps(arguments)}done"
    )
    with pytest.raises(TemplateError, match="item pairs from a mapping"):
        text(*with_arguments(arguments), chat_template=CALLS.replace("%s", WALKING))


@pytest.mark.parametrize("calls", [["f"], [None], [[]], "f", {"a": 1}, [{"function": "f"}], [{"function": None}]])
def test_calls_of_odd_shapes_are_left_to_the_template(calls: Any) -> None:
    message = {"role": "assistant", "content": "", "tool_calls": calls}
    assert text(USER, message, chat_template=AS_JSON.replace("a", "messages[1].tool_calls", 1)) == json.dumps(calls)


def test_a_call_that_is_its_own_function() -> None:
    message = {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": '{"b": 1}'}]}
    source = (
        "{% for m in messages %}{% for c in m.tool_calls or [] %}{% set c = c.function or c %}"
        "{% for k, v in c.arguments | items %}{{ k }}={{ v }}{% endfor %}{% endfor %}{% endfor %}."
    )
    assert text(USER, message, chat_template=source) == "b=1."


# --- the language, against Jinja itself ---------------------------------------------------------------


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in [3, 1, 2] | sort %}{{ loop.index }}{{ a }}{% if not loop.last %}, {% endif %}{% endfor %}",
        "{% for a in range(9) %}{% if a == 2 %}{% continue %}{% endif %}{% if a > 4 %}"
        "{% break %}{% endif %}{{ a }}{% endfor %}",
        "{% for a in range(9) if a is odd %}{{ a }}{% else %}none{% endfor %}",
        "{% for k, v in {'a': 1, 'b': [2]}.items() %}{{ k }}={{ v }};{% endfor %}",
        "{% for k, v in {'b': 1, 'a': 2} | dictsort %}{{ k }}{{ v }}{% endfor %}",
        "{% macro m(a, b=2) %}<{{ a }}{{ b }}{{ varargs }}{{ caller() if caller else '' }}>{% endmacro %}"
        "{{ m(1) }}{{ m(1, 3, 4) }}{% call m('x') %}inner{% endcall %}",
        "{% set n = namespace(a=1, l=[]) %}{% for i in range(3) %}{% set n.a = n.a + i %}"
        "{% set n.l = n.l + [i] %}{% endfor %}"
        "{{ n.a }}{{ n.l }}",
        "{{ 'a' ~ 1 ~ none ~ [1.5, 'x'] ~ undefined_name }}|{{ 2 ** 10 }}|{{ 7 // 2 }}|"
        "{{ 7 % 4 }}|{{ 7 / 2 }}|{{ -3 | abs }}",
        "{{ 'a,b,,c'.split(',') }}{{ 'a b  c'.split() }}{{ 'a,b,c'.rsplit(',', 1) }}{{ 'x\ny\r\nz'.splitlines() }}",
        "{{ '  x '.strip() }}{{ 'xxaxx'.strip('x') }}{{ 'ab'.replace('a', 'cc') }}{{ 'aaa'.replace('a', 'b', 2) }}",
        "{{ ['a', 'b'] | join('-') }}{{ '-'.join(['a', 'b']) }}{{ [{'k': 1}, {'k': 2}] | join('+', attribute='k') }}",
        "{{ [{'r': 'a', 'v': 1}, {'r': 'b', 'v': 2}] | selectattr('r', 'equalto', 'b') | map(attribute='v') | list }}",
        "{{ ['a', 'b'] | map('upper') | join }}{{ [1, 2, 3] | reject('odd') | list }}{{ [1, 1, 2] | unique | list }}",
        "{% if [] | selectattr('a') %}true{% endif %}",
        "{{ [1, 2, 3][::-1] }}{{ 'abc'[1:] }}{{ [1, 2, 3][-1] }}{{ {'a': {'b': 1}}.a.b }}{{ {'a': 1}['a'] }}",
        "{{ 1 if x is defined else 2 }}{{ x | default('d') }}{{ '' | default('e', true) }}"
        "{{ none is none }}{{ 'a' in 'cat' }}",
        "{{ [1, 2] | length }}{{ [1, 2] | first }}{{ [1, 2] | last }}{{ [1, 2] | sum }}"
        "{{ [1, 2] | max }}{{ 'ab' | reverse }}",
        "{{ 'hello world' | title }}{{ 'aB' | upper }}{{ 'aB' | lower }}{{ 'aB' | capitalize }}"
        "{{ ' a ' | trim }}{{ '5' | int + 1 }}",
        "{{ 1.25 | round(1) }}{{ '2.5' | float }}{{ 'a\nb' | indent(2) }}{{ 3 | string }}"
        "{{ 'a' is string }}{{ {} is mapping }}",
        "{% set x %}a{{ 1 }}{% endset %}{{ x }}{% filter upper %}abc{% endfilter %}"
        "{% with y = 2 %}{{ y }}{% endwith %}",
        "{% for a in [1, [2, [3]]] recursive %}{{ loop(a) if a is not number else a }}{% endfor %}",
        "  {% if true %}\n  a\n  {% endif %}\n{#- c #}\n{%- raw %}{{ x }}{% endraw %}",
        "{% for a in 'abc' %}{{ loop.cycle('x', 'y') }}{{ loop.previtem }}{{ loop.nextitem }}"
        "{{ loop.revindex }}{% endfor %}",
        "{{ dict(a=1) }}{{ 1 < 2 < 3 }}{{ not true }}{{ 1 == 1.0 and 'x' or 'y' }}{{ (1, 'a') }}"
        "{{ true }}{{ 'a' * 3 }}",
        "{{ '<a href=\"x\">&\\'' | e }}{{ 1 | escape }}",
        "{% for g in [{'r': 'b', 'i': 1}, {'r': 'A', 'i': 2}, {'r': 'a', 'i': 3}] | groupby('r') %}"
        "{{ g }}{{ g.grouper }}{{ g.list | map(attribute='i') | list }}{{ g[0] }}{{ g | length }}{% endfor %}",
        "{% for k, v in [{'r': 'b'}, {}] | groupby('r', default='c', case_sensitive=true) %}{{ k }}{{ v }}{% endfor %}",
        "{{ range(5) | batch(2) | list }}{{ range(5) | batch(2, 'x') | list }}{{ [1] | batch(3, [0]) | list }}",
        "{{ 'a bc  d-e' | wordcount }}{{ '' | wordcount }}{{ 12 | wordcount }}",
        "{{ '%s|%5d|%-8.3f|%%|%x' % ('a', 3, 1.5, 255) }}{{ '%(a)s %(b)03d' % {'a': [1], 'b': 2} }}",
        "{{ '%s' % [1, 2] }}{{ '%s' % {'a': 1} }}{{ 'x%%' % () }}{{ '%s%s' % (nothing, none) }}{{ 7 % 4 }}",
        "{{ '%s-%02d' | format('a', 5) }}{{ '%(a)s' | format(a=1) }}",
        "{% set d = {'a': 1} %}{% set e = d.copy() %}{{ e }}{{ e.a }}{{ d == e }}",
        "{{ 'a'.ljust(3) }}|{{ 'a'.rjust(3, '.') }}|{{ '-7'.zfill(5) }}|"
        "{{ 'a'.center(4, '*') }}|{{ 'a' | center(5) }}|",
        "{{ messages.append is defined }}{{ messages.append is undefined }}"
        "{{ messages.append | default('none') }}{% set x = messages[0].update %}",
    ],
)
def test_the_sandbox_renders_as_jinja_does(source: str) -> None:
    plain = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    assert render(source, {"messages": [USER]}) == plain.from_string(source).render(messages=[USER])


@pytest.mark.parametrize(
    ("arguments", "keywords"),
    [
        ("", {}),
        ("ensure_ascii=true", {"ensure_ascii": True}),
        ("indent=2", {"indent": 2}),
        ("indent='\t', sort_keys=true", {"indent": "\t", "sort_keys": True}),
        ("separators=(',', ':')", {"separators": (",", ":")}),
    ],
)
def test_tojson_is_json_dumps(arguments: str, keywords: dict[str, Any]) -> None:
    value = {"ü<&>'\"": [1, 2.5, None, True, {"b": "\u2028", "a": []}]}
    assert render(f"{{{{ x | tojson({arguments}) }}}}", {"x": value}) == json.dumps(
        value, **{"ensure_ascii": False, **keywords}
    )


def test_generation_blocks_and_the_date() -> None:
    assert render("{% generation %}a{{ 1 }}{% endgeneration %}b", {}) == "a1b"
    assert render("{{ strftime_now('%Y') }}", {}) == datetime.now().strftime("%Y")


def test_templates_cannot_change_the_caller_s_data() -> None:
    with pytest.raises(TemplateError, match=r"dict\.update"):
        render("{{ messages[0].update(role='system') }}", {"messages": [USER]})


# --- templates that mean harm -------------------------------------------------------------------------

GROW = "{%% set n = namespace(s='ab', l=[1], i=3) %%}{%% for i in range(60) %%}{%% set n.%s %%}{%% endfor %%}{{ n.s }}"
NESTED = "{% for a in range(99999) %}{% for b in range(99999) %}%s{% endfor %}{% endfor %}"

STEPS = "too many steps"
SYNTAX = "too much syntax"
MEMORY = "too much memory"
SIZE = "a value grows too large"
INTEGER = "an integer grows too large"
DEPTH = "RecursionError: maximum recursion depth exceeded"
WIDTH = "a %-format of this kind or width"

TOO_EXPENSIVE = {
    "loops": (STEPS, NESTED.replace("%s", "{% for c in range(99999) %}{% endfor %}")),
    "loops that write": (MEMORY, NESTED.replace("%s", "x" * 1000)),
    "loop that filters": (
        STEPS,
        "{% for a in range(99999) %}{% for b in range(99999) if b < 0 %}{% endfor %}{% endfor %}",
    ),
    "loop of many nodes": (STEPS, "{% for a in range(99999) %}" + "{% if a %}{% endif %}" * 1000 + "{% endfor %}"),
    "long range": ("OverflowError: Range too big", "{% for a in range(10 ** 12) %}{% endfor %}"),
    "doubling by ~": (SIZE, GROW % "s = n.s ~ n.s"),
    "doubling by +": (SIZE, GROW % "s = n.s + n.s"),
    "doubling by *": (SIZE, GROW % "s = n.s * 2"),
    "doubling by replace": (SIZE, GROW % "s = n.s.replace('a', 'aaaa')"),
    "doubling by the replace filter": (SIZE, GROW % "s = n.s | replace('a', 'aaaa')"),
    "doubling by join": (SIZE, GROW % "s = n.s.join([n.s, n.s])"),
    "doubling by the join filter": (SIZE, GROW % "s = [n.s, n.s] | join(n.s)"),
    "doubling by a block": (SIZE, GROW % "s %}{{ n.s }}{{ n.s }}{% endset"),
    "doubling a list": (SIZE, GROW % "l = n.l + n.l"),
    "nesting lists": (SIZE, GROW % "l = [n.l, n.l]"),
    "nesting dicts": (SIZE, GROW % "l = {'a': n.l, 'b': n.l}"),
    "nesting tuples": (SIZE, GROW % "l = (n.l, n.l)"),
    "nesting by dict()": (SIZE, GROW % "l = dict(a=n.l, b=n.l)"),
    "squaring": (INTEGER, GROW % "i = n.i * n.i"),
    "constant text": (SIZE, "{{ 'a' * 10000000000 }}"),
    "constant list": (SIZE, "{{ [0] * 10000000000 }}"),
    "constant power": (INTEGER, "{{ 2 ** (10 ** 9) }}"),
    "constant center": (SIZE, "{{ 'x'.center(10000000000) }}"),
    "ljust": (SIZE, "{{ 'x'.ljust(10000000000) }}"),
    "zfill": (SIZE, "{{ 'x'.zfill(10000000000) }}"),
    "center filter": (SIZE, "{{ 'x' | center(10000000000) }}"),
    "indent filter": (SIZE, "{{ 'a\nb' | indent(10000000000) }}"),
    "batch": (SIZE, "{{ [1] | batch(10000000000, 0) | list }}"),
    "printf": ("a %-format of this kind or width", "{{ '%999999999d' % 1 }}"),
    "format": ("str.format is not allowed", "{{ '{:999999999}'.format(1) }}"),
    "format filter": ("a %-format of this kind or width", "{{ '%999999999d' | format(1) }}"),
    "json indentation": ("JSON is spaced too widely", "{{ [[1]] | tojson(indent=1000000000) }}"),
    "json separators": ("JSON is spaced too widely", "{{ [1, 2] | tojson(separators=['x' * 1000000, ':']) }}"),
    "rounding": ("a rounding is too precise", "{{ 5 | round(-10000000000) }}"),
    "sum of lists": ("a sum of something else than numbers is not allowed", "{{ ([[1]] * 1000) | sum(start=[]) }}"),
    "strip of many": ("an argument is too long", "{{ ('a' * 500000).strip('b' * 400000 + 'a') }}"),
    "search from the right": (STEPS, "{{ ('a' * 1000000).rfind('ab' + 'a' * 500000) }}"),
    "words": (SIZE, "{% for i in range(99) %}{% set x = ('a ' * 400000).split() %}{% endfor %}"),
    "lists": (MEMORY, "{% for i in range(9999) %}{% set x = range(30000) | list %}{% endfor %}"),
    "map": (STEPS, "{% set s = 'a' * 100000 %}{{ range(30000) | map('replace', '1', s) | list }}"),
    "comparisons": (
        MEMORY,
        "{% set s = 'a' * 1000000 %}{% set l = [s] %}{% for i in range(99999) %}"
        "{% if s ~ 'b' in s %}{% endif %}{% endfor %}",
    ),
    "macro without end": (DEPTH, "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}"),
    "macro tree": (STEPS, "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}"),
    "loop without end": (DEPTH, "{% for a in [1] recursive %}{{ loop([1, 1]) }}{% endfor %}"),
    "arguments": (
        SIZE,
        "{% macro m(n) %}{% if n %}{{ m(n - 1, varargs, varargs) }}{% endif %}{% endmacro %}{{ m(60) }}",
    ),
    "caller": (
        MEMORY,
        "{% macro m() %}{% for i in range(99999) %}{{ caller() }}{% endfor %}{% endmacro %}"
        "{% call m() %}" + "x" * 100_000 + "{% endcall %}",
    ),
    "long source": ("found 1048577 characters", "x" * (2**20 + 1)),
    "much syntax": (SYNTAX, "{{ a ~ 1 }}" * 10_000),
    "branches × names": (
        SYNTAX,
        "".join(f"{{%set a{i}=1%}}" for i in range(3000)) + "{%if x%}{%endif%}" * 4900,
    ),
    "elifs × names": (
        SYNTAX,
        "".join(f"{{%set a{i}=1%}}" for i in range(900)) + "{%if x%}" + "{%elif x%}" * 300 + "{%endif%}",
    ),
    "nested ifs × names": (
        SYNTAX,
        "".join(f"{{%set a{i}=1%}}" for i in range(3000)) + "{%if x%}" * 60 + "{%endif%}" * 60,
    ),
    "choices × names": (SYNTAX, "".join(f"{{{{a{i} if x}}}}" for i in range(500))),
    "nested macros": (SYNTAX, "{%macro a()%}" * 90 + "{{x}}" * 6000 + "{%endmacro%}" * 90),
    "long hexadecimal number": (INTEGER, "{{ 0x" + "f" * 100_000 + " }}"),
    "attributes of attributes": (
        STEPS,
        "{{ range(9999) | map(attribute='a.' * 10000, default={'a': 1}) | list }}",
    ),
    "attributes to sort by": (STEPS, "{{ range(9999) | sort(attribute='a,' * 10000) }}"),
    "integers of one hash": (INTEGER, "{{ (2 ** 61 - 1) * 5 }}"),
    "parentheses": (DEPTH, "{{ " + "(" * 30_000 + "1" + ")" * 30_000 + " }}"),
    "brackets": (DEPTH, "{{ " + "[" * 3000 + "]" * 3000 + " }}"),
    "nested ifs": (
        "RecursionError: maximum recursion depth exceeded",
        "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
    ),
    "nested loops": ("SyntaxError: too many statically nested", "{% for a in [1] %}" * 30 + "{% endfor %}" * 30),
    "long sum": (DEPTH, "{{ " + "a+" * 30_000 + "a }}"),
    "long number": ("ValueError: Exceeds the limit", "{{ " + "9" * 100_000 + " }}"),
    "searches": (
        STEPS,
        "{% set s = 'a' * 1000000 %}{% for i in range(99999) %}{% if s.count('ab') %}{% endif %}{% endfor %}",
    ),
    "words to count": (
        MEMORY,
        "{% set s = 'a ' * 30000 %}{% for i in range(99999) %}{% if s | wordcount %}{% endif %}{% endfor %}",
    ),
    "printf with a precision": (WIDTH, "{{ '%.999999999f' % 1 }}"),
    "printf with flags": (WIDTH, "{{ '%-#0 +0999999999d' % 1 }}"),
    "printf with the width of an argument": (WIDTH, "{{ '%*d' % (999999999, 1) }}"),
    "printf with a nested name": (WIDTH, "{{ '%(a(b)c)999999999d' % {'a(b)c': 1} }}"),
    "printf of a character": (WIDTH, "{{ '%c' % 55296 }}"),
    "printf in pieces": (WIDTH, "{{ '%%%s%999999999d' % ('x', 1) }}"),
    "doubling by printf": (SIZE, GROW % "s = '%s%s' % (n.s, n.s)"),
    "doubling by printf of one name": (SIZE, GROW % "s = '%(a)s%(a)s' % {'a': n.s}"),
    "doubling by the format filter": (SIZE, GROW % "s = '%s%s' | format(n.s, n.s)"),
    "nesting by copy": (SIZE, GROW % "l = {'a': n.l, 'b': n.l}.copy()"),
    "nesting by batch": (SIZE, GROW % "l = [n.l, n.l] | batch(1) | list"),
    "nesting by groupby": (SIZE, GROW % "l = [{'a': n.l}, {'a': n.l}] | groupby('b', default=0)"),
    "filling a batch": (SIZE, "{{ [1] | batch(1000, 'x' * 100000) | list }}"),
    "escapes": (SIZE, "{{ ('<' * 1000000) | e }}"),
    "rjust": (SIZE, "{{ 'x'.rjust(10000000000) }}"),
}


@pytest.mark.parametrize(("reason", "source"), TOO_EXPENSIVE.values(), ids=TOO_EXPENSIVE.keys())
def test_expensive_templates_end_early(reason: str, source: str) -> None:
    with pytest.raises(TemplateError) as caught:
        render(source, {"messages": [USER]})
    assert caught.value.problem.startswith(f"chat template: {reason}")
    assert "\n" not in caught.value.problem


ATTACKS = {
    "{{ ''.__class__.__mro__ }}": "str.__class__",
    "{{ ''['__class__'] }}": "str.__class__",
    "{{ undefined_name.__class__.__mro__ }}": "Undefined.__class__",
    "{{ undefined_name._undefined_message }}": "Undefined._undefined_message",
    "{{ [''] | map(attribute='__class__') | list }}": "str.__class__",
    "{{ ['', 'a'] | sort(attribute='__class__') }}": "str.__class__",
    "{{ raise_exception.__globals__ }}": "function.__globals__",
    "{{ namespace.__init__.__globals__ }}": "type.__init__",
    "{{ namespace.mro() }}": "type.mro",
    "{{ cycler.__init__.__globals__ }}": "type.__init__",
    "{{ range.__call__ }}": "function.__call__",
    "{{ self.__init__ }}": "TemplateReference.__init__",
    "{{ self._TemplateReference__context }}": "TemplateReference._TemplateReference__context",
    "{% macro m() %}{% endmacro %}{{ m._func }}": "Macro._func",
    "{% for a in [1] %}{{ loop._iterator }}{% endfor %}": "LoopContext._iterator",
    "{% set n = namespace(__class__=1) %}": "the name '__class__' in a namespace",
    "{% set n = namespace() %}{% set n.n = n %}": "a value of type TemplateNamespace in a namespace",
    "{{ messages.append(1) }}": "list.append",
    "{{ messages[0].clear() }}": "dict.clear",
    "{{ (1).to_bytes(10) }}": "int.to_bytes",
    "{{ 'a'.encode() }}": "str.encode",
    "{% include 'a' %}": "line 1: include",
    "{% import 'a' as b %}": "line 1: import",
    "{% from 'a' import b %}": "line 1: fromimport",
    "{% extends 'a' %}": "line 1: extends",
    "{% block a %}{{ self.a() }}{% endblock %}": "line 1: block",
    "{% autoescape true %}<{% endautoescape %}": "line 1: scopedevalcontextmodifier",
    "{{ strftime_now('%c' * 1000) }}": "an argument is too long",
    "{{ messages.append ~ 'a' }}": "list.append",
    "{{ [messages.append] }}": "list.append",
    "{% if messages.append %}{% endif %}": "list.append",
    "{% for a in messages.append %}{% endfor %}": "list.append",
    "{{ messages.append == 1 }}": "list.append",
    "{{ messages.append.__class__ }}": "Refused.__class__",
    "{{ '%s' % messages.append }}": "list.append",
    "{{ '%s' % namespace }}": "printing a value of type type",
    "{{ '%s' | format(namespace()) }}": "printing a value of type TemplateNamespace",
    "{{ [{'a': 1}] | groupby('__class__') }}": "dict.__class__",
    "{{ ([{'a': 1}] | groupby('a'))[0]._asdict() }}": "_GroupTuple._asdict",
    "{{ '\\ud800' }}": "line 1: half of a surrogate pair",
    "{% set n = namespace() %}{{ n._Namespace__attrs }}": "TemplateNamespace._Namespace__attrs",
    "{{ namespace().__class__ }}": "TemplateNamespace.__class__",
    "{{ {}.copy.__self__ }}": "builtin_function_or_method.__self__",
}


@pytest.mark.parametrize(("source", "refused"), ATTACKS.items())
def test_attacks_are_refused(source: str, refused: str) -> None:
    with pytest.raises(TemplateError) as caught:
        render(source, {"messages": [USER]})
    assert caught.value.problem.startswith(f"chat template: {refused}")


@pytest.mark.parametrize(
    ("source", "named"),
    [
        ("{{ 'a b' | wordwrap(1, wrapstring='x' * 4000000) }}", "line 1: No filter named 'wordwrap'."),
        ("{{ [1] | slice(10000000000) | list }}", "line 1: No filter named 'slice'."),
        ("{{ lipsum(n=1000000000) }}", "'lipsum' is undefined"),
        ("{{ ''|attr('__class__') }}", "line 1: No filter named 'attr'."),
    ],
)
def test_what_is_costly_or_dangerous_and_not_there(source: str, named: str) -> None:
    with pytest.raises(TemplateError) as caught:
        render(source, {"messages": [USER]})
    assert caught.value.problem == f"chat template: {named}"


@pytest.mark.parametrize(
    ("source", "named"),
    [
        ("a\n{% if %}", "line 2"),
        ("{{ a.b.c }}", "'a' is undefined"),
        ("{{ 'a' + 1 }}", "TypeError"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ raise_exception('no tools\x1b[31m') }}", "no tools"),
        ("{{ 'a' | no_such_filter }}", "no_such_filter"),
        ("{{ namespace }}", "printing"),
    ],
)
def test_broken_templates_say_what_is_wrong(source: str, named: str) -> None:
    with pytest.raises(TemplateError, match=named) as caught:
        render(source, {})
    assert "\x1b" not in str(caught.value)


def test_large_conversations_are_within_the_limits() -> None:
    turns = [{"role": "user", "content": "x" * 2000}, {"role": "assistant", "content": "y" * 2000}] * 700
    assert len(text(*turns)) > 2_800_000
    long = {"role": "user", "content": "word " * 1_000_000}
    assert text(long).count("word") == 1_000_000


def test_a_template_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = 0
    really_compile = jinja2.Environment.compile

    def compile_and_count(*args: Any, **options: Any) -> Any:
        nonlocal compiled
        compiled += 1
        return really_compile(*args, **options)

    monkeypatch.setattr(jinja2.Environment, "compile", compile_and_count)
    source = "{{ messages[0].content }} is compiled once"
    assert [render(source, {"messages": [USER]}) for _ in range(3)] == [f"{USER['content']} is compiled once"] * 3
    assert compiled == 1
