"""A template and its variables → text."""

from __future__ import annotations

import types
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import jinja2
import jinja2.exceptions
import jinja2.ext
import jinja2.runtime
import jinja2.sandbox
from jinja2.filters import _GroupTuple
from jinja2.utils import Cycler, Joiner, Namespace

from mlxqwen.errors import TemplateError
from mlxqwen.text.sandbox import RenderError
from mlxqwen.text.sandbox.meter import Meter, MeteredContext, forbidden, length, too_expensive, weigh
from mlxqwen.text.sandbox.operations import (
    METHODS,
    check_power,
    check_product,
    format_text,
    make_filters,
    make_tests,
)
from mlxqwen.text.sandbox.syntax import MAX_SOURCE_CHARACTERS, GenerationBlock, SyntaxChecker

MAX_TIME_FORMAT = 256  # characters
STRING_METHODS = """
capitalize casefold center count endswith find index isalnum isalpha isascii isdecimal isdigit islower isnumeric
isspace istitle isupper join ljust lower lstrip partition removeprefix removesuffix replace rfind rindex rjust
rpartition rsplit rstrip split splitlines startswith strip swapcase title upper zfill
"""
LOOP_ATTRIBUTES = "changed cycle depth depth0 first index index0 last length nextitem previtem revindex revindex0"
ATTRIBUTES: Mapping[type, frozenset[str]] = {
    str: frozenset(STRING_METHODS.split()),
    dict: frozenset({"copy", "get", "items", "keys", "values"}),
    list: frozenset({"count", "index"}),
    tuple: frozenset({"count", "index"}),
    _GroupTuple: frozenset({"count", "grouper", "index", "list"}),
    jinja2.runtime.LoopContext: frozenset(LOOP_ATTRIBUTES.split()),
    Cycler: frozenset({"current", "next", "reset"}),
}
DICT_NAMES = frozenset(dir(dict))


class Refused(jinja2.StrictUndefined):
    """An attribute that a template may not use; even a list that holds it cannot be printed."""

    __slots__ = ()
    __repr__ = jinja2.StrictUndefined.__str__


class TemplateNamespace(Namespace):
    """`namespace()`: holds plain values only, so that namespaces cannot hold each other."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *rest = args
        attributes = dict(*rest, **kwargs)
        for name, value in attributes.items():
            check_stored(name, value)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        check_stored(name, value)
        super().__setitem__(name, value)


def check_stored(name: object, value: Any) -> None:
    """Refuse names and values that a template must not store in a namespace. Raises `TemplateError`."""
    if not isinstance(name, str) or name.startswith("_"):
        raise forbidden(f"the name {name!r} in a namespace")
    if isinstance(value, Namespace | jinja2.runtime.Macro):
        raise forbidden(f"a value of type {type(value).__name__} in a namespace")


class MeteredEnvironment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Jinja's sandbox, with attributes by an allowed list, and operators and calls counted."""

    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "%", "**"})
    context_class = MeteredContext

    def getattr(self, obj: Any, attribute: str) -> Any:
        """As Jinja's, quicker for what templates do most: `message.role`."""
        if type(obj) is dict and attribute in obj and attribute not in DICT_NAMES:
            return obj[attribute]
        return super().getattr(obj, attribute)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Whether a template may use this attribute: a few methods of plain types."""
        return attr in ATTRIBUTES.get(type(obj), ()) or (type(obj) is TemplateNamespace and attr[:1] != "_")

    def unsafe_undefined(self, obj: Any, attribute: str) -> jinja2.Undefined:
        """Undefined to those who ask whether it is there, and refused to those who use it in any way."""
        return Refused(f"{type(obj).__name__}.{attribute}", exc=jinja2.exceptions.SecurityError)

    def wrap_str_format(self, value: Any) -> None:
        """`str.format` is no allowed attribute, so there is nothing to wrap."""
        return

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """An arithmetic operator, bounded beforehand where its result can explode."""
        meter: Meter = context.meter
        if operator == "*":
            check_product(meter, left, right)
            check_product(meter, right, left)
        elif operator == "**":
            check_power(left, right)
        elif operator == "%" and type(left) is str:
            meter.spend(len(left))
            return meter.admit(format_text(meter, left, right))
        return meter.admit(self.binop_table[operator](left, right))

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        """A call of a macro, a global or a method, its arguments and its result counted."""
        meter: Meter = context.meter
        named = {name: value for name, value in kwargs.items() if not name.startswith("_")}
        for value in (*args, *named.values()):
            meter.read(value)
        if not isinstance(obj, types.BuiltinMethodType):
            return meter.admit(super().call(context, obj, *args, **kwargs))
        meter.spend(length(obj.__self__))
        method = METHODS.get(obj.__name__) if type(obj.__self__) is str else None
        return meter.admit(method(meter, obj.__self__, *args, **named) if method else obj(*args, **named))


def raise_exception(message: object = "") -> None:
    """What templates call to refuse a conversation. Raises `TemplateError` with their message."""
    raise TemplateError(f"chat template: {message}")


def strftime_now(format: str) -> str:
    """The local time, as templates ask for it. Raises `TemplateError` for a long format."""
    if len(format) > MAX_TIME_FORMAT:
        raise too_expensive("an argument is too long")
    from datetime import datetime

    return datetime.now().strftime(format)


@jinja2.pass_context
def finalize(context: MeteredContext, value: Any) -> str:
    """The text of a value that the template writes, counted by the meter."""
    text = context.meter.text(value)
    context.meter.write(len(text))
    return text


@lru_cache(maxsize=1)
def make_environment() -> MeteredEnvironment:
    """Jinja's environment with the filters and tests of this package, as transformers configures it."""
    environment = MeteredEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        optimized=False,
        finalize=finalize,
        extensions=[GenerationBlock, jinja2.ext.loopcontrols],
    )
    environment.filters = make_filters()
    environment.tests = make_tests()
    environment.globals = {
        "cycler": Cycler,
        "dict": lambda *args, **kwargs: dict(*args, **kwargs),
        "joiner": Joiner,
        "namespace": TemplateNamespace,
        "raise_exception": raise_exception,
        "range": jinja2.sandbox.safe_range,
        "strftime_now": strftime_now,
    }
    return environment


@lru_cache(maxsize=16)
def compile_template(source: str, replacements: tuple[tuple[str, str], ...] = ()) -> jinja2.Template:
    """A template, its syntax checked and the counting inserted. Raises `TemplateError`.

    `replacements` are made in the text that the template spells.
    """
    if len(source) > MAX_SOURCE_CHARACTERS:
        raise too_expensive(f"found {len(source)} characters, expected at most {MAX_SOURCE_CHARACTERS}")
    environment = make_environment()
    tree = SyntaxChecker(dict(replacements)).visit(environment.parse(source))
    tree.set_environment(environment)
    return jinja2.Template.from_code(environment, environment.compile(tree), environment.globals)


def render_template(source: str, variables: Mapping[str, Any], replacements: tuple[tuple[str, str], ...]) -> str:
    """See `mlxqwen.text.sandbox.render`."""
    try:
        template = compile_template(source, replacements)
        context: Any = template.new_context(dict(variables))
        context.meter = Meter(sum(weigh(value, 2**62) for value in variables.values()))
        return "".join(template.root_render_func(context))
    except TemplateError:
        raise
    except jinja2.exceptions.SecurityError as error:
        raise forbidden(str(error)) from error
    except jinja2.TemplateSyntaxError as error:
        raise TemplateError(f"chat template: line {error.lineno}: {error.message}") from error
    except Exception as error:
        kind = [] if isinstance(error, jinja2.TemplateError) else [type(error).__name__]
        raise RenderError(": ".join(["chat template", *kind, str(error) or "failed"])) from error
