"""What a template may name and call: attributes, methods, operators and globals."""

from __future__ import annotations

import types
from collections.abc import Mapping
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
import jinja2.exceptions
import jinja2.ext
import jinja2.runtime
import jinja2.sandbox
from jinja2.utils import Cycler, Joiner, Namespace

from mlxqwen.errors import TemplateError
from mlxqwen.text.sandbox.filters import make_filters, make_tests
from mlxqwen.text.sandbox.meter import Group, MeteredContext, forbidden, length, meter_of
from mlxqwen.text.sandbox.strings import METERED_METHODS, check_power, check_product, check_short, format_text
from mlxqwen.text.sandbox.syntax import GenerationBlock

STRING_METHODS = """
capitalize casefold center count endswith find index isalnum isalpha isascii isdecimal isdigit islower isnumeric
isspace istitle isupper join ljust lower lstrip partition removeprefix removesuffix replace rfind rindex rjust
rpartition rsplit rstrip split splitlines startswith strip swapcase title upper zfill
"""
LOOP_ATTRIBUTES = """
changed cycle depth depth0 first index index0 last length nextitem previtem revindex revindex0
"""
ATTRIBUTES: Mapping[type, frozenset[str]] = {
    str: frozenset(STRING_METHODS.split()),
    dict: frozenset({"copy", "get", "items", "keys", "values"}),
    list: frozenset({"count", "index"}),
    tuple: frozenset({"count", "index"}),
    Group: frozenset({"count", "grouper", "index", "list"}),
    jinja2.runtime.LoopContext: frozenset(LOOP_ATTRIBUTES.split()),
    Cycler: frozenset({"current", "next", "reset"}),
}


class RefusedAttributeError(jinja2.exceptions.SecurityError):
    """A template has used an attribute that it may not use."""


class Refused(jinja2.StrictUndefined):
    """Such an attribute; even a list that holds it cannot be printed."""

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
    if not isinstance(name, str) or name.startswith("_"):
        raise forbidden(f"the name {name!r} in a namespace")
    if isinstance(value, Namespace | jinja2.runtime.Macro):
        raise forbidden(f"a value of type {type(value).__name__} in a namespace")


class MeteredEnvironment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Jinja's sandbox with the operations of templates metered; see the module."""

    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "%", "**"})
    context_class = MeteredContext

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Whether a template may use this attribute: a few methods of plain types."""
        if not super().is_safe_attribute(obj, attr, value):
            return False
        return isinstance(obj, Namespace) or attr in ATTRIBUTES.get(type(obj), ())

    def unsafe_undefined(self, obj: Any, attribute: str) -> jinja2.Undefined:
        """Undefined to those who ask whether it is there, and refused to those who use it in any way."""
        return Refused(f"{type(obj).__name__}.{attribute}", exc=RefusedAttributeError)

    def wrap_str_format(self, value: Any) -> None:
        """`str.format` is no allowed attribute, so there is nothing to wrap."""
        return

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        """An arithmetic operator, its result measured beforehand where it can explode."""
        meter = meter_of(context)
        meter.spend(length(left) + length(right))
        if operator == "*":
            check_product(meter, left, right)
            check_product(meter, right, left)
        elif operator == "**":
            check_power(left, right)
        elif operator == "%" and isinstance(left, str):
            return meter.admit(format_text(meter, left, right))
        return meter.admit(self.binop_table[operator](left, right))

    def call(self, context: jinja2.runtime.Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        """A call of a macro, a global or a method, its arguments and its result measured."""
        meter = meter_of(context)
        given = [*args, *(value for name, value in kwargs.items() if not name.startswith("_"))]
        for value in given:
            meter.weigh(value)
        owner = getattr(obj, "__self__", None)
        if isinstance(obj, types.BuiltinMethodType) and type(owner) is str:
            method = METERED_METHODS.get(obj.__name__)
            if method is not None:
                named = {name: value for name, value in kwargs.items() if not name.startswith("_")}
                return meter.admit(method(meter, owner, *args, **named))
            meter.spend(len(owner))
        return meter.admit(super().call(context, obj, *args, **kwargs))


def raise_exception(message: object = "") -> None:
    raise TemplateError(f"chat template: {message}")


def strftime_now(format: str) -> str:
    check_short(format)
    return datetime.now().strftime(format)


@jinja2.pass_context
def finalize(context: jinja2.runtime.Context, value: Any) -> str:
    meter = meter_of(context)
    text = meter.text(value)
    meter.spend(len(text))
    meter.make(len(text))
    return text


@lru_cache(maxsize=1)
def make_environment() -> MeteredEnvironment:
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
